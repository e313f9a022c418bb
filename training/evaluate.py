"""Evaluate a run on its test part: ``python -m training.evaluate --run runs/X``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from openset.artifact import BrokenArtifact, read_card
from openset.preprocessing import UnreadableImage
from training import figures
from training.data import MissingClasses
from training.report import build_report, print_report
from training.runs import Run, write_atomically
from training.scoring import Scored, score_split

logger = logging.getLogger(__name__)

REPORT = "report.json"
SCORES_FILE = "scores.npz"


def evaluate(
    run: Run,
    *,
    which: str = "last",
    device: str = "cpu",
    precision: str = "float32",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Score the test part, write ``scores.npz``, ``report.json`` and the figures, and return the report.

    Args:
        run: a trained run.
        which: "last" (default) or "best" checkpoint.
        device: to compute on.
        precision: of the backbone.
        show_progress: draw a bar.
    """
    data = run.protocol_data(("test",))
    classifier = run.classifier(data, which=which, device=device, precision=precision)
    scored = score_split(
        classifier,
        data.test,
        data.preprocessing,
        workers=run.config.workers,
        description="test",
        show_progress=show_progress,
    )
    scored.save(run.folder / SCORES_FILE)
    context = {
        "which": which,
        "device": device,
        "precision": precision,
        "notes": data.notes,
        "counts": data.counts,
    }
    write_atomically(run.folder / "evaluation.json", json.dumps(context, indent=2) + "\n")
    return write_report(run)


def write_report(run: Run) -> dict[str, Any]:
    """Make report and figures from the stored scores, without the model."""
    scored = Scored.load(run.folder / SCORES_FILE)
    context = json.loads((run.folder / "evaluation.json").read_text())
    try:
        factory = read_card(run.artifact).factory
    except BrokenArtifact:
        factory = None
    report = build_report(
        scored,
        config=dataclasses.asdict(run.config)
        | {key: context[key] for key in ("which", "device", "precision")},
        notes=context["notes"],
        counts=context["counts"],
        factory=factory,
    )
    write_atomically(run.folder / REPORT, json.dumps(report, indent=2) + "\n")
    figures.draw_all(scored, run.config, run.folder / "figures")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<name>")
    parser.add_argument("--which", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--from-scores", action="store_true", help="only redraw from the stored scores"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run = Run(arguments.run)
        report = (
            write_report(run)
            if arguments.from_scores
            else evaluate(
                run, which=arguments.which, device=arguments.device, precision=arguments.precision
            )
        )
    except (FileNotFoundError, MissingClasses, UnreadableImage, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    print_report(report)
    logger.info("written: %s, %s", run.folder / REPORT, run.folder / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
