"""Can foreign images be told from knowns by a histogram of values, blind to every shape? ``python -m training.shortcut``.

Where that is so, a model's open-set figures on the data may show its skill in telling sources of images apart
(``training.histogram_probe``). Nothing is trained but the probe; unknown classes are in its test alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.choices import DIGITS, RULES, RUNS
from training.protocols import PROTOCOLS, WITH_DIGITS, get_protocol

if TYPE_CHECKING:  # torch takes seconds
    from training.histogram_probe import Probe

logger = logging.getLogger(__name__)

# Training images of each class: photographs are decoded, and their histograms settle as soon.
_PER_CLASS = {"characters": 1000, "imagenet": 200, "folders": 200}
_TABLE_WIDTH = 150


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.shortcut", description=__doc__)
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="glyphs")
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--digits", choices=DIGITS, help="of toy and toy_vis; default: both that are there"
    )
    parser.add_argument("--image-size", type=int, help="of p1-p3 and folders")
    parser.add_argument(
        "--per-class", type=int, help="training images of each class; default: 1000, of photographs 200"
    )  # fmt: skip
    parser.add_argument(
        "--rule", choices=RULES, help="of the FPR; default: inclusive, for toy strict, as published"
    )
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--json", type=Path, help="default: runs/shortcut/<protocol>.json")
    parser.add_argument("--figure", type=Path, help="default: runs/shortcut/<protocol>.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("training").setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    # Torch takes seconds: what stands on the command line was read before.
    from openset.image_headers import UnreadableImage
    from training.data import MissingClasses, load_protocol
    from training.durable import replacing
    from training.histogram_probe import BINS, doubts, draw, probe
    from training.provenance import current_commit, device_name
    from training.runs import write_atomically

    protocol = arguments.protocol
    rule = arguments.rule or ("strict" if protocol in WITH_DIGITS else "inclusive")
    probes: list[Probe] = []
    rows: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    try:
        options, sources = _checked(arguments)
        per_class = arguments.per_class or _PER_CLASS[get_protocol(protocol).kind]
        for source in sources:
            title = protocol if source is None else f"{protocol}, {source.upper()}'s digits"
            chosen = options if source is None else options | {"digits": source}
            try:
                data = load_protocol(
                    protocol, data=arguments.data, parts=("train", "test"), **chosen
                )
            except FileNotFoundError as error:
                if source in (None, arguments.digits) or (source == sources[-1] and not probes):
                    raise
                logger.warning("%s is left out: %s", title, str(error).partition(";")[0])
                continue
            for note in data.notes:
                logger.info("%s: %s", title, note)
            probes.append(probe(data, title=title, per_class=per_class, workers=arguments.workers))
            rows += probes[-1].rows(rule=rule)
            notes[title] = data.notes
    except (FileNotFoundError, MissingClasses, UnreadableImage, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    print_rows(rows)
    for text in doubts(rows):
        logger.warning("warning: %s", text)
    name = "-".join([protocol, *([arguments.digits] if arguments.digits else [])])
    target = arguments.json or RUNS / "shortcut" / f"{name}.json"
    picture = arguments.figure or RUNS / "shortcut" / f"{name}.png"
    for file in (target, picture):
        file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "protocol": protocol, "options": options, "notes": notes, "bins": BINS, "per_class": per_class, "rule": rule,
        "commit": current_commit(), "device": device_name("cpu"), "rows": rows,
    }  # fmt: skip
    write_atomically(target, json.dumps(content, indent=2) + "\n")
    with replacing(picture) as partial:
        draw(probes).savefig(partial, dpi=150, format="png")
    logger.info("written: %s, %s", target, picture)
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[dict[str, Any], Sequence[str | None]]:
    """Options of ``load_protocol``, and the sources of digits.

    Raises:
        ValueError: an argument that this protocol does not take, or out of range.
    """
    protocol = arguments.protocol
    if arguments.per_class is not None and arguments.per_class < 1:
        raise ValueError(f"per-class must be at least 1, got {arguments.per_class}")
    if arguments.digits is not None and protocol not in WITH_DIGITS:
        raise ValueError(
            f"protocol {protocol} has no choice of digits, got {arguments.digits!r}; leave it out"
        )
    options: dict[str, Any] = {}
    if not get_protocol(protocol).is_of_characters:
        # A look at what is there: missing classes and broken files are named and left out.
        options |= {"allow_missing_classes": True, "on_unreadable": "skip"}
        if arguments.image_size is not None:
            options["image_size"] = arguments.image_size
    elif arguments.image_size is not None:
        raise ValueError(
            f"protocol {protocol} has images of one size, got image-size {arguments.image_size}; leave it out"
        )
    if protocol not in WITH_DIGITS:
        return options, [None]
    return options, DIGITS if arguments.digits is None else [arguments.digits]


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    from rich.table import Table

    from training.cures import FPR_TARGETS, print_wide

    table = Table(title="share of the knowns kept by a histogram of values, blind to every shape")
    for heading in ("data", "fitted on", "against"):
        table.add_column(heading)
    for heading in ("AUROC", *(f"kept at FPR {target:g}" for target in FPR_TARGETS)):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [_cell(row["kept_at_fpr"][f"{target:g}"]) for target in FPR_TARGETS]
        table.add_row(
            row["data"], row["fitted_on"], f"{row['against']}s", f"{row['auroc']:.4f}", *cells
        )
    print_wide(table, _TABLE_WIDTH)


def _cell(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    interval = found["interval"]
    ends = "" if interval is None else f" \\[{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{found['value']:.4f}{ends}"


if __name__ == "__main__":
    sys.exit(main())
