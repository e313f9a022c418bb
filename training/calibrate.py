"""Add the calibration scores of one more serving path: ``python -m training.calibrate --run runs/X --device cuda``.

A threshold belongs to the computation that made its scores. The same samples are scored by the same artifact on another
device or in another precision, and stored beside the others.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.calibrate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, runs/<name>")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    # Torch takes seconds: what stands on the command line was read before.
    from openset.image_headers import UnreadableImage
    from training.data import MissingClasses
    from training.path_calibration import calibrate
    from training.runs import Run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run = Run(arguments.run)
        path = calibrate(
            run, device=arguments.device, precision=arguments.precision, compiled=arguments.compiled
        )
    except (FileNotFoundError, MissingClasses, UnreadableImage, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info(
        "calibrated path %s in %s (next: make archive RUN=%s)", path, run.artifact, run.folder
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
