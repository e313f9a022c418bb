"""Export a run as an artifact with a certified factory threshold: ``python -m training.export --run runs/X``.

The validation data are split three ways, stratified by class: a fifth chooses the score type (a half with
``--which best``: the half that also chose the checkpoint), a further slice is kept out for checking the promise, the
rest calibrates. What selects or checks never calibrates.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

from openset.decision import DEFAULT_CONFIDENCE, DEFAULT_FPR

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<name>")
    parser.add_argument("--fpr", type=float, default=DEFAULT_FPR, help="target false-positive rate")
    parser.add_argument("--confidence", type=float, default=DEFAULT_CONFIDENCE)
    parser.add_argument("--which", choices=("last", "best"), default="last")
    parser.add_argument("--name", help="model name; default: the run's")
    parser.add_argument(
        "--scores",
        help="what the artifact can be thresholded by, comma-separated or all; default: the run's, or softmax,logit",
    )
    parser.add_argument(
        "--verify-share",
        type=float,
        default=0.2,
        help="validation share kept for checking the promise",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    # Torch takes seconds: what stands on the command line was read before.
    from openset.calibration import NotCertifiable
    from openset.fitted_scores import parse_scores
    from openset.image_headers import UnreadableImage
    from training.artifact_export import export
    from training.data import MissingClasses
    from training.runs import Run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        scores = None if arguments.scores is None else parse_scores(arguments.scores)
        run = Run(arguments.run)
        export(
            run,
            fpr=arguments.fpr,
            confidence=arguments.confidence,
            which=arguments.which,
            name=arguments.name,
            scores=scores,
            verify_share=arguments.verify_share,
            device=arguments.device,
            precision=arguments.precision,
        )
    except NotCertifiable as error:
        # Rounded up, so that the rate named here is attainable.
        suggestion = math.ceil(error.smallest_attainable_fpr * 1e4) / 1e4
        advice = f". Choose --fpr {suggestion:g} (FPR={suggestion:g}) or larger" * (suggestion < 1)
        logger.error("error: %s%s", error, advice)
        return 1
    except (FileNotFoundError, MissingClasses, UnreadableImage, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info("exported: %s (next: make archive RUN=%s)", run.artifact, run.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
