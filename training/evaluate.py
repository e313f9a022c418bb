"""Evaluate a run on its test part: ``python -m training.evaluate --run runs/X``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from training.choices import DIGITS, RULES

logger = logging.getLogger(__name__)

_OF_FRESH_SCORES = ("which", "device", "precision", "rule", "scores")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<name>")
    parser.add_argument("--which", choices=("last", "best"), help="default: last")
    parser.add_argument("--device", help="default: cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="of CCR@FPR; default: inclusive, for runs as published strict",
    )
    parser.add_argument(
        "--scores", help="comma-separated or all; default: softmax, logit and the artifact's"
    )
    parser.add_argument(
        "--digits",
        choices=DIGITS,
        help="of toy and toy_vis: test with the digits of this source; default: as trained",
    )
    parser.add_argument(
        "--from-scores", action="store_true", help="only redraw from the stored scores"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    fresh = [name for name in _OF_FRESH_SCORES if getattr(arguments, name) is not None]
    if arguments.from_scores and fresh:
        parser.error(
            f"--from-scores redraws what is stored, which {', '.join(f'--{name}' for name in fresh)} would not change; "
            "leave out the one or the other"
        )
    # Torch takes seconds: what stands on the command line was read before.
    from openset.fitted_scores import parse_scores
    from openset.image_headers import UnreadableImage
    from training.data import MissingClasses
    from training.evaluation import REPORT, evaluate, results_folder, write_report
    from training.report import print_report
    from training.runs import Run
    from training.worth import doubt_of_report

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        scores = None if arguments.scores is None else parse_scores(arguments.scores)
        run = Run(arguments.run)
        report = (
            write_report(run, digits=arguments.digits)
            if arguments.from_scores
            else evaluate(
                run,
                which=arguments.which or "last",
                device=arguments.device or "cpu",
                precision=arguments.precision or "float32",
                rule=arguments.rule,
                scores=scores,
                digits=arguments.digits,
            )
        )
    except (FileNotFoundError, MissingClasses, UnreadableImage, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    print_report(report)
    folder = results_folder(run, arguments.digits)
    # With other digits than its own a model may well be at a loss: that is what is asked.
    worthless = doubt_of_report(run.folder, report) if folder == run.folder else None
    if worthless is not None:
        logger.warning("warning: %s", worthless)
    logger.info("written: %s, %s", folder / REPORT, folder / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
