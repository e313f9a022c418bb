"""Train every loss for an epoch and print one table of CCR@FPR: ``python -m training.compare_losses``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.choices import RUNS
from training.comparisons import require_trainable, require_unknowns, with_epochs_in_name
from training.engine import TrainingDiverged
from training.evaluation import evaluate
from training.losses import LOSSES, THESIS_LOSSES
from training.report import FPR_TARGETS
from training.runs import make_config, write_atomically
from training.train import train

logger = logging.getLogger(__name__)


def compare(
    losses: list[str], *, protocol: str, epochs: int, size: str, data: Path | None, runs: Path
) -> list[dict[str, Any]]:
    """Train and evaluate each loss; one row each. Finished runs are taken as they are.

    A loss that diverges gets a row that says so; the others go on.

    Raises:
        ValueError: a loss cannot be trained, or the test part holds no unknown; both before the first training.
    """
    options: dict[str, Any] = {"precision": "auto"}
    if protocol == "glyphs":
        options["size"] = size
    configs = [
        with_epochs_in_name(
            make_config(protocol, loss, epochs=epochs, data=data, options=options), runs
        )
        for loss in losses
    ]
    test = configs[0].load_data(("test",))
    require_unknowns(test)
    for config in configs:
        require_trainable(config, num_classes=len(test.class_ids), runs=runs)
    rows: list[dict[str, Any]] = []
    for config in configs:
        loss, number = config.loss, f"{len(rows) + 1} of {len(losses)}"
        try:
            run = train(config, runs=runs, show_progress=False)
        except TrainingDiverged as error:
            rows.append({"loss": loss, "diverged": str(error), "run": config.name})
            logger.error("%s, %s: %s", number, loss, error)
            continue
        report = evaluate(run, show_progress=False)
        unknown = report["scores"]["softmax"]["unknown"]
        rows.append(
            {
                "loss": loss,
                "accuracy": report["accuracy"]["value"],
                "ccr_at_fpr": {key: cell["value"] for key, cell in unknown["ccr_at_fpr"].items()},
                "run": run.folder.name,
            }
        )
        logger.info("%s, %s: accuracy %.4f", number, loss, report["accuracy"]["value"])
    return rows


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """One line a loss."""
    table = Table(title=title)
    targets = [f"{target:g}" for target in FPR_TARGETS[:-1]]
    for heading in ("loss", *targets, "accuracy"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for row in rows:
        if "diverged" in row:
            table.add_row(row["loss"], *("diverged" for _ in [*targets, "accuracy"]))
            continue
        values = [row["ccr_at_fpr"][target] for target in targets] + [row["accuracy"]]
        table.add_row(row["loss"], *("-" if value is None else f"{value:.4f}" for value in values))
    Console().print(table)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.compare_losses", description=__doc__)
    parser.add_argument("--protocol", default="glyphs")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--losses", default="all", help="comma-separated; default: all twenty")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="of glyphs")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=RUNS / "compare")
    parser.add_argument(
        "--json", type=Path, help="where the rows go; default: comparison.json beside the runs"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    losses = list(THESIS_LOSSES) if arguments.losses == "all" else arguments.losses.split(",")
    if unknown := sorted(set(losses) - LOSSES.keys()):
        # Said before the first loss is trained, not after the last.
        logger.error("error: no loss %s; there are: %s", ", ".join(unknown), ", ".join(LOSSES))
        return 1
    try:
        rows = compare(
            losses,
            protocol=arguments.protocol,
            epochs=arguments.epochs,
            size=arguments.size,
            data=arguments.data,
            runs=arguments.runs,
        )
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    target = arguments.json or arguments.runs / "comparison.json"
    settings = {"protocol": arguments.protocol, "epochs": arguments.epochs, "score": "softmax"}
    if arguments.protocol == "glyphs":
        settings["size"] = arguments.size
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(settings | {"rows": rows}, indent=2) + "\n")
    print_table(
        rows,
        f"{arguments.protocol}, {arguments.epochs} epoch(s): CCR at FPR on unknowns, softmax score",
    )
    logger.info("written: %s", target)
    return 1 if any("diverged" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
