"""Tables and figures of the grid from its rows and stored scores, without training: ``python -m training.grid_report``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from training.choices import GRID_RUNS, RESULTS, published_protocol
from training.protocols import PUBLISHED

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.grid_report", description=__doc__)
    parser.add_argument(
        "--protocol",
        type=published_protocol,
        help="default: every protocol that has rows or a published table",
    )
    parser.add_argument("--runs", type=Path, default=GRID_RUNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--merge", type=Path, action="append", default=[], metavar="FILE",
        help="add the rows of another machine's <protocol>.json first; may be repeated",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    # Torch takes seconds: what stands on the command line was read before.
    from training.grid.merging import merge
    from training.grid.pages import write

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    chosen = PUBLISHED if arguments.protocol is None else (arguments.protocol,)
    try:
        for file in arguments.merge:
            merge(file, arguments.results)
        written = [write(name, runs=arguments.runs, results=arguments.results) for name in chosen]
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    if not any(written):
        logger.error(
            "error: no rows in %s, no finished run in %s and no published table; make reproduce PROTOCOL=... makes rows",
            arguments.results, arguments.runs,
        )  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
