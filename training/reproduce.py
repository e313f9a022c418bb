"""Train, evaluate and record the thesis' grid of losses and seeds: ``python -m training.reproduce --protocol toy``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from training.choices import (
    DIGITS,
    GRID_RUNS,
    PRECISIONS,
    RESULTS,
    published_protocol,
    seed_count_or_list,
)
from training.grid.processes import PART, cores_of, end_with_parent, helpers, wait_for
from training.presets import PRESETS
from training.protocols import PUBLISHED
from training.recommendations import RECOMMENDED
from training.train import parse_option

if TYPE_CHECKING:
    from training.grid.plan import Cell
    from training.grid.runner import Outcome

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.reproduce", description=__doc__)
    parser.add_argument(
        "--protocol", required=True, type=published_protocol, help=", ".join(PUBLISHED)
    )
    parser.add_argument(
        "--seeds",
        type=seed_count_or_list,
        default="3",
        help="how many, 1, 2, ... (default 3), or which: 2-3, or 1,3",
    )
    parser.add_argument(
        "--losses",
        help=f"comma-separated, {RECOMMENDED} among them; default: all twenty, as ranked",
    )
    parser.add_argument("--data", type=Path, help="root of the data set")
    parser.add_argument("--epochs", type=int, help="default: the protocol's")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help=f"default: thesis; for {RECOMMENDED} its own"
    )
    parser.add_argument(
        "--digits",
        help=f"source of the toy protocol's digits, comma-separated; default: {','.join(DIGITS)}",
    )
    parser.add_argument("--image-size", type=int, help="side of the model's input (p1-p3)")
    parser.add_argument(
        "--option", "-o", type=parse_option, action="append", default=[], metavar="KEY=VALUE",
        help="any option of make train; the thesis preset has as_published=true unless told otherwise",
    )  # fmt: skip
    parser.add_argument("--budget-minutes", type=float, help="stop after this time, keep all")
    parser.add_argument(
        "--stack",
        type=int,
        help="cells that are trained side by side; default: 8 with CUDA, else 1",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="that share the cells and the cores, or the GPU (best under MPS); default: 1",
    )
    parser.add_argument(PART, type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--no-graphs", action="store_true", help="stacked cells without CUDA graphs"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--runs", type=Path, default=GRID_RUNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--again",
        action="store_true",
        help="also what already has its rows, but not what the present commit evaluated in these runs",
    )
    parser.add_argument("--list", action="store_true", help="only list the cells, in order")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 also where the budget ended it, 1 on an error or a diverged or failed cell."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    who = f"process {arguments.part}: " if arguments.part else ""
    logging.basicConfig(level=logging.INFO, format=f"{who}%(message)s", stream=sys.stderr)
    if arguments.part:
        end_with_parent()
    try:
        return _run(arguments, argv)
    except KeyboardInterrupt:
        if not arguments.part:
            logger.error("interrupted; %s", _next(arguments))
        return 130


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    # Torch takes seconds: what stands on the command line was read before.
    from training.data import MissingClasses
    from training.grid import pages
    from training.grid.plan import plan
    from training.stacked import ask_for_queues

    ask_for_queues(arguments.processes)
    options = dict(arguments.option)
    for key in ("image_size", "precision"):
        if getattr(arguments, key) is not None:
            options[key] = getattr(arguments, key)
    try:
        cells = plan(
            arguments.protocol,
            seeds=arguments.seeds,
            losses=arguments.losses.split(",") if arguments.losses else None,
            digits=arguments.digits.split(",") if arguments.digits else None,
            preset=arguments.preset,
            epochs=arguments.epochs,
            options=options,
            device=arguments.device,
        )
        if arguments.list:
            print("\n".join(cell.name for cell in cells))
            return 0
        if arguments.processes < 1:
            raise ValueError(f"processes must be at least 1, got {arguments.processes}")
        if arguments.processes > 1 and arguments.again:
            raise ValueError(
                "--again is for one process: several could not tell what is done again"
            )
        if arguments.part or arguments.processes == 1:
            outcome, worst = _work(cells, arguments), 0
        else:
            outcome, worst = _share(cells, arguments, argv)
        if arguments.part:
            return 1 if outcome.diverged or outcome.failed else 0
        pages.write(arguments.protocol, runs=arguments.runs, results=arguments.results)
    except (ValueError, MissingClasses, OSError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info(
        "%d trained, %d were there%s, %d diverged, %d failed, %d left%s",
        len(outcome.trained),
        len(outcome.found), " or came from the other processes" if arguments.processes > 1 else "",
        len(outcome.diverged), len(outcome.failed), len(outcome.left),
        f"; {_next(arguments)}" if outcome.left else "",
    )  # fmt: skip
    return 1 if outcome.diverged or outcome.failed else worst


def _next(arguments: argparse.Namespace) -> str:
    """What the same command would do next, for people."""
    if arguments.again:
        from training.provenance import exact_commit

        if exact_commit() is None:
            return (
                "the same command begins at the first cell: which cells this code has evaluated can be told "
                "only in a git working copy without changes"
            )
    return "the same command goes on where it stopped"


def _work(cells: list[Cell], arguments: argparse.Namespace) -> Outcome:
    from training.grid.runner import reproduce

    return reproduce(
        cells,
        data=arguments.data,
        runs=arguments.runs,
        results=arguments.results,
        device=arguments.device,
        workers=arguments.workers,
        again=arguments.again,
        budget_minutes=arguments.budget_minutes,
        stack=arguments.stack,
        processes=arguments.processes,
        graphs=not arguments.no_graphs,
        show_progress=not arguments.quiet and not arguments.part,
    )


def _share(
    cells: list[Cell], arguments: argparse.Namespace, argv: list[str]
) -> tuple[Outcome, int]:
    """Work through the cells with other processes; what became of them, and the highest exit code of the others."""
    import torch

    from training.grid.runner import update

    device = cells[0].config(data=arguments.data, device=arguments.device).device
    # Where a GPU trains, the cores are for whoever decodes.
    shares = cores_of(arguments.processes) if device == "cpu" else None
    with helpers(argv, min(arguments.processes, len(cells)), shares) as others:
        # The threads were counted before this process had its share.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        outcome = _work(cells, arguments)
        worst = wait_for(others)
    update(outcome, cells, data=arguments.data, results=arguments.results, device=arguments.device)
    return outcome, worst


if __name__ == "__main__":
    sys.exit(main())
