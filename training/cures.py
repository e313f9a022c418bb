"""Train a cure's baseline and variants and put their open-set figures side by side: ``python -m training.cures --cure scale``.

Finished runs are taken as they are, an interrupted command continues. Figures are of the test part; nothing is chosen here
(``training.recommend`` chooses, without the test).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from openset import metrics
from openset.fitted_scores import ALL_SCORES
from openset.labels import GROUP_NAMES
from training.arm_differences import REPLICATES, ccr_replicates, differences
from training.arms import CURES, Arm
from training.choices import RUNS, seed_list
from training.comparisons import (
    require_common,
    require_trainable,
    require_unknowns,
    with_epochs_in_name,
)
from training.data import at_most
from training.engine import TrainingDiverged
from training.evaluation import score_test
from training.report import group_masks
from training.runs import TrainConfig, make_config, write_atomically
from training.scoring import Scored
from training.train import parse_option, train

logger = logging.getLogger(__name__)

FPR_TARGETS = (1e-3, 1e-2, 1e-1)
_TABLE_WIDTH, _WIDE_TABLE_WIDTH = 120, 160


def open_set_figures(scored: Scored) -> dict[str, Any]:
    """Accuracy, CCR@FPR by score and foreign group, and magnitudes by group of scored samples."""
    masks = group_masks(scored.labels)
    magnitudes = np.linalg.norm(scored.features, axis=1)
    return {
        "accuracy": metrics.accuracy(scored.predictions, scored.labels),
        "ccr_at_fpr": {
            name: {
                group: {
                    f"{target:g}": metrics.ccr_at_fpr(
                        metrics.oscr_curve(
                            scores, scored.predictions, scored.labels, against=label
                        ),
                        max_fpr=target,
                    )
                    for target in FPR_TARGETS
                }
                for label, group in GROUP_NAMES.items()
                if group in masks
            }
            for name, scores in scored.scores.items()
        },
        "mean_magnitude": {name: float(magnitudes[mask].mean()) for name, mask in masks.items()},
        "count": {name: int(mask.sum()) for name, mask in masks.items()},
    }


def rows_of_arms(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    configure: Callable[[Arm, int], TrainConfig],
    figures_of: Callable[[TrainConfig], dict[str, Any]],
    *,
    num_classes: int,
    runs: Path,
) -> list[dict[str, Any]]:
    """One row for every seed and arm, seeds outermost; a diverged run has a row that says so.

    An arm that cannot be trained is refused before the first one is.

    Args:
        arms: what is compared.
        seeds: of each.
        configure: arm and seed to the run's configuration.
        figures_of: trains a configuration and judges it; "accuracy" is among its figures.
        num_classes: C of the data.
        runs: where the runs lie.

    Raises:
        ValueError: an arm does not fit the protocol or so few classes, or its folder holds another run.
    """
    planned = []
    for seed in seeds:
        for arm in arms:
            try:
                config = configure(arm, seed)
                require_trainable(config, num_classes=num_classes, runs=runs)
            except ValueError as error:
                raise ValueError(f"{arm.name}: {error}") from error
            planned.append((arm, config))
    rows = []
    for number, (arm, config) in enumerate(planned, 1):
        row: dict[str, Any] = {
            "arm": arm.name, "loss": arm.loss, "options": arm.options, "preset": arm.preset, "seed": config.seed,
            "epochs": config.epochs, "run": config.name,
        }  # fmt: skip
        place = f"{number} of {len(planned)}, {arm.name}, seed {config.seed}"
        logger.info("%s: %s", place, config.name)
        try:
            row |= figures_of(config)
        except TrainingDiverged as error:
            row["diverged"] = str(error)
        rows.append(row)
        logger.info("%s: %s", place, row.get("diverged") or f"accuracy {row['accuracy']:.4f}")
    return rows


def compare_arms(
    arms: Sequence[Arm],
    *,
    protocol: str,
    epochs: int | None,
    seeds: Sequence[int],
    data: Path | None,
    options: dict[str, Any],
    runs: Path,
    device: str = "auto",
    per_class: int | None = None,
    score: str = "softmax",
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Train and score every arm with every seed on the test part; rows as ``rows_of_arms`` makes them.

    ``per_class`` training images of every class stand for all of them, where there is no time for more. Replicates are
    those of ``score``; ``show_progress`` draws bars.

    Raises:
        ValueError: an arm cannot be trained, or the test part holds no unknown; both before the first training.
    """

    def configure(arm: Arm, seed: int) -> TrainConfig:
        config = make_config(
            protocol, arm.loss, preset=arm.preset, seed=seed, epochs=epochs, data=data, device=device,
            options={**options, **arm.options},
        )  # fmt: skip
        return with_epochs_in_name(config, runs, "" if per_class is None else f"-n{per_class}")

    def figures_of(config: TrainConfig) -> dict[str, Any]:
        shown = None
        if per_class is not None:
            shown = config.load_data(("train", "validation"), decoded=True)
            shown = replace(shown, train=at_most(shown.train, per_class))
        run = train(config, runs=runs, show_progress=show_progress, data=shown)
        scored = score_test(
            run, device=config.device, scores=ALL_SCORES, show_progress=show_progress
        )
        return open_set_figures(scored) | {REPLICATES: ccr_replicates(scored, score, FPR_TARGETS)}

    test = configure(arms[0], seeds[0]).load_data(("test",))
    require_unknowns(test)
    return rows_of_arms(
        arms, seeds, configure, figures_of, num_classes=len(test.class_ids), runs=runs
    )


def print_table(rows: list[dict[str, Any]], title: str, score: str = "softmax") -> None:
    """CCR@FPR against unknowns, accuracy and mean magnitudes, one line an arm and seed."""
    table = Table(title=title)
    for heading in ("arm", "seed"):
        table.add_column(heading)
    for heading in (*(f"{t:g}" for t in FPR_TARGETS), "Acc", "|known|", "|negative|", "|unknown|"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "diverged" in row:
            table.add_row(row["arm"], str(row["seed"]), *["diverged"] * 7)
            continue
        cells = [*row["ccr_at_fpr"][score]["unknown"].values(), row["accuracy"]]
        lengths = [row["mean_magnitude"].get(g) for g in ("known", "negative", "unknown")]
        table.add_row(
            row["arm"],
            str(row["seed"]),
            *("-" if v is None else f"{v:.4f}" for v in cells),
            *("-" if v is None else f"{v:.2f}" for v in lengths),
        )
    print_wide(table)


def print_differences(found: Sequence[dict[str, Any]], title: str) -> None:
    """Mean CCR@FPR of every arm that has a baseline, and the difference with its interval over classes."""
    table = Table(title=title)
    for heading in ("arm", "baseline"):
        table.add_column(heading)
    for target in FPR_TARGETS:
        table.add_column(f"CCR@{target:g}", justify="right")
        table.add_column("difference", justify="right")
    for entry in found:
        cells = []
        for target in FPR_TARGETS:
            one = entry[f"{target:g}"]
            cells += ["-", "-"] if one is None else [f"{one['mean']:.4f}", _with_interval(one)]
        table.add_row(entry["arm"], entry["baseline"], *cells)
    print_wide(table, _WIDE_TABLE_WIDTH)


def _with_interval(one: dict[str, Any]) -> str:
    interval = one["over_classes"]
    ends = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return f"{one['difference']:+.4f}{ends}"


def print_wide(table: Table, least: int = _TABLE_WIDTH) -> None:
    """Print a table of many columns; a narrow terminal wraps its lines, but no cell is cut."""
    console = Console()
    console.width = max(console.width, least)
    console.print(table)


def shared_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Arguments that every comparison of arms has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--protocol", default="glyphs")
    parser.add_argument("--epochs", type=int, help="default: the protocol's")
    parser.add_argument(
        "--seeds", type=seed_list, default=[42], help="1,2,3 or 2-3; default: 42 alone"
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--digits", choices=("emnist", "mnist"), help="of toy")
    parser.add_argument("--size", choices=("full", "small"), help="of glyphs; default: full")
    parser.add_argument("--image-size", type=int, help="of p1-p3")
    parser.add_argument(
        "--per-class", type=int, help="training images of each class; default: all of them"
    )
    parser.add_argument("--allow-missing-classes", action="store_true", help="of p1-p3")
    parser.add_argument(
        "--option", "-o", type=parse_option, action="append", default=[], metavar="KEY=VALUE",
        help="any option of make train, for all arms; may be repeated",
    )  # fmt: skip
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where the rows go; default: beside the runs")
    return parser


def common_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all arms are trained with: options of the data among the arguments, and any other; precision follows the device."""
    given = {
        key: getattr(arguments, key)
        for key in ("digits", "size", "image_size")
        if getattr(arguments, key) is not None
    }
    missing = {"allow_missing_classes": True} if arguments.allow_missing_classes else {}
    return {"precision": "auto", **given, **missing, **dict(arguments.option)}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = shared_parser("python -m training.cures", __doc__)
    parser.add_argument("--cure", required=True, choices=sorted(CURES))
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="some of its arms; default: all")
    parser.add_argument("--runs", type=Path, default=RUNS / "cures")
    parser.add_argument("--score", choices=ALL_SCORES, default="softmax", help="of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arms = CURES[arguments.cure]
    try:
        if unknown := set(arguments.arms or []) - {arm.name for arm in arms}:
            raise ValueError(
                f"{arguments.cure} has no arm {'; '.join(sorted(unknown))}; it has: {'; '.join(a.name for a in arms)}"
            )
        require_common(common_options(arguments), arms)
        rows = compare_arms(
            [arm for arm in arms if arguments.arms is None or arm.name in arguments.arms],
            protocol=arguments.protocol,
            epochs=arguments.epochs,
            seeds=arguments.seeds,
            data=arguments.data,
            options=common_options(arguments),
            runs=arguments.runs,
            device=arguments.device,
            per_class=arguments.per_class,
            score=arguments.score,
        )
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues where it stopped")
        return 130
    found = differences(rows, score=arguments.score, targets=FPR_TARGETS)
    target = arguments.json or arguments.runs / f"{arguments.cure}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "cure": arguments.cure, "protocol": arguments.protocol, **common_options(arguments),
        "per_class": arguments.per_class, "score": arguments.score, "differences": found,
        "rows": [{key: value for key, value in row.items() if key != REPLICATES} for row in rows],
    }  # fmt: skip
    write_atomically(target, json.dumps(content, indent=2) + "\n")
    title = (
        f"{arguments.protocol}, {arguments.cure}: CCR at FPR on unknowns, {arguments.score} score"
    )
    print_table(rows, title, arguments.score)
    print_differences(
        found,
        f"{title}: means over all seeds (-: one diverged or does not reach the FPR), paired differences with intervals over "
        "classes",
    )
    logger.info("written: %s", target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
