"""``python -m api.client predict FOLDER --out results.parquet``: classify a folder or a stream of files.

The same command continues after an interruption. Exit code 0: every file has an answer (an unreadable image has one
too, its problem), or --finish was given; 1: some have none yet, or the gateway refuses.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tqdm import tqdm

from api.client.bulk import Count, Gateway, GatewayRefuses, files_under, lines_of, predict_all
from api.client.results import WRITERS, CannotResume, Journal, text_of


async def _each(paths: list[str]) -> AsyncIterator[str]:
    for path in paths:
        yield path


async def predict(arguments: argparse.Namespace) -> int:
    """Run ``predict``."""
    out: Path = arguments.out
    gateway = Gateway(
        arguments.url.rstrip("/"),
        os.environ.get("OPENSET_API_KEY"),
        patience_s=arguments.patience,
    )
    query = {"top_k": "1"} | ({} if arguments.fpr is None else {"fpr": repr(arguments.fpr)})
    identity = {
        "model_sha256": await gateway.model_sha256(), "fpr": arguments.fpr,
        "source": None if arguments.source == "-" else text_of(os.path.abspath(arguments.source)),
    }  # fmt: skip
    total: int | None = None
    if arguments.source == "-":
        paths = lines_of(sys.stdin)
    else:
        try:
            found = files_under(Path(arguments.source))
        except OSError as error:
            print(
                f"error: {error.filename} cannot be listed ({error.strerror}); nothing was asked",
                file=sys.stderr,
            )
            return 1
        total, paths = len(found), _each(found)
    journal = Journal(out, identity)
    try:
        # None: no bar where nobody watches.
        with tqdm(total=total, desc="predict", unit="image", disable=None) as bar:

            def show(now: Count) -> None:
                facts = {"accepted": now.accepted, "unknown": now.unknown, "refused": now.refused}
                bar.set_postfix(facts, refresh=False)
                bar.update()

            count = await predict_all(
                gateway,
                paths,
                journal,
                concurrency=arguments.concurrency,
                query=query,
                progress=show,
            )
    except (asyncio.CancelledError, KeyboardInterrupt):
        print(
            f"interrupted; {len(journal.done)} answers are kept in {journal.file}, the same command continues",
            file=sys.stderr,
        )
        return 130
    finally:
        journal.close()
    said = (
        f"{count.asked} asked, {count.skipped} known from before: {count.accepted} accepted, {count.unknown} unknown, "
        f"{count.refused} refused, {count.unanswered} without an answer"
    )
    if count.unanswered and not arguments.finish:
        print(
            f"{said}\nerror: give the same command again to ask about those, or with --finish to have the result without them",
            file=sys.stderr,
        )
        return 1
    if len(used := journal.calibrations()) > 1:
        print(
            f"warning: the threshold was changed meanwhile; the column calibration_id says which row was decided by which "
            f"of {', '.join(map(str, used))}",
            file=sys.stderr,
        )
    print(f"{said}\nwritten: {out} ({journal.finish(count.without_answer)} rows)", file=sys.stderr)
    return 0


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.out.suffix not in WRITERS:
        parser.error(f"--out must end in {' or '.join(WRITERS)}, got {arguments.out}")
    if arguments.out.suffix == ".parquet" and importlib.util.find_spec("arro3") is None:
        parser.error('Parquet needs arro3: pip install "openset-serve[client]", or write .csv')
    if arguments.source != "-" and not Path(arguments.source).is_dir():
        parser.error(f"{arguments.source} is not a folder; give one, or - for paths on the input")
    if arguments.concurrency < 1:
        parser.error(f"--concurrency must be at least 1, got {arguments.concurrency}")
    if arguments.fpr is not None and not 0 < arguments.fpr < 1:
        parser.error(f"--fpr must lie between 0 and 1, got {arguments.fpr}")


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m api.client")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "predict",
        help="classify a folder or a stream of files",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source",
        metavar="FOLDER",
        help="searched for images in all depths; - reads paths, one a line",
    )
    command.add_argument("--out", type=Path, required=True, help="results.parquet or results.csv")
    command.add_argument("--url", default="http://127.0.0.1:8000", help="of the gateway")
    command.add_argument("--fpr", type=float, help="own target; default: the current calibration")
    command.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    command.add_argument(
        "--patience", type=float, default=120.0, metavar="S", help="for one overloaded image"
    )
    command.add_argument(
        "--finish", action="store_true",
        help="write the result although some files have no answer; their rows say why in the column detail",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    _check(command, arguments)
    try:
        return asyncio.run(predict(arguments))
    except (GatewayRefuses, CannotResume) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
