"""Serve one archive with TorchServe alone, supervised, in the foreground: ``python -m serving.serve --model NAME``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serving.archive import MODEL_STORE
from serving.configuration import ServingSettings, device_defaults
from serving.freshness import advice, why_archive_is_stale
from serving.supervisor import Supervisor
from serving.torchserve import TorchServeFailed

logger = logging.getLogger(__name__)

_STARTUP_S = 300
_COMPILED_STARTUP_S = 3600


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that ``serve`` and ``stack`` share."""
    parser.add_argument("--model", required=True, help="name of the archive, without .mar")
    parser.add_argument("--model-store", type=Path, default=MODEL_STORE)
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="folder of the sockets; default: a new one under the temp folder",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile in the worker (needs a compiler)"
    )
    parser.add_argument(
        "--compile-cache",
        type=Path,
        help="folder of compiled code; default: ~/.cache/openset-serve",
    )
    parser.add_argument(
        "--workers", type=int, help="default: 2; 1 on a single core, and on a CPU with --compiled"
    )
    parser.add_argument("--batch-size", type=int, help="default: 4, on a GPU 32")
    parser.add_argument(
        "--max-batch-delay-ms",
        type=int,
        default=1,
        help="how long a first request waits for company",
    )
    parser.add_argument("--java-heap", default="1g")


@contextlib.contextmanager
def run_folder(given: Path | None) -> Iterator[Path]:
    """The folder of the sockets and the unpacked model; one of our own making goes at the end."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="openset-", ignore_cleanup_errors=True) as made:
            yield Path(made)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given


def settings_from(arguments: argparse.Namespace, run_dir: Path) -> ServingSettings:
    """Serving settings from parsed arguments."""
    defaults = device_defaults(arguments.device, compiled=arguments.compiled)
    workers, batch_size = arguments.workers, arguments.batch_size
    return ServingSettings(
        model=arguments.model,
        model_store=arguments.model_store,
        run_dir=run_dir,
        workers=defaults["workers"] if workers is None else workers,
        batch_size=defaults["batch_size"] if batch_size is None else batch_size,
        max_batch_delay_ms=arguments.max_batch_delay_ms,
        device=arguments.device,
        precision=arguments.precision,
        compiled=arguments.compiled,
        startup_timeout_s=_COMPILED_STARTUP_S if arguments.compiled else _STARTUP_S,
        **({"compile_cache": arguments.compile_cache} if arguments.compile_cache else {}),
        java_heap=arguments.java_heap,
    )


def tell_if_stale(settings: ServingSettings) -> None:
    """Warn where the run holds something newer than the archive; it is served all the same."""
    archive = settings.archive
    stale = advice(archive, lambda: why_archive_is_stale(archive))
    if stale is not None:
        logger.warning("warning: %s", stale)


def why(error: Exception) -> str:
    """What stopped the start, in a line; of a permission also who lacks it."""
    if isinstance(error, PermissionError):
        return (
            f"{error}; this runs as user {os.geteuid()}, who must be allowed to read the archive and its folder "
            "(chmod a+rX) and to write to the run folder"
        )
    return str(error) or repr(error)


def stop_event() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    return event


async def serve(settings: ServingSettings) -> int:
    """Run until a signal or a failure; 0 after a signal, 1 after a failure."""
    stopping = stop_event()
    supervisor = Supervisor(settings)
    watching: asyncio.Task[None] | None = None
    waiting = asyncio.create_task(stopping.wait())
    try:
        starting = asyncio.create_task(supervisor.start())
        await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return 0
        logger.info(
            "serving %s on %s (path %s)",
            settings.model,
            settings.inference_socket,
            starting.result()["path"],
        )
        watching = asyncio.create_task(supervisor.watch())
        await asyncio.wait([watching, waiting], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        return 0
    except (OSError, TorchServeFailed) as error:
        logger.error("error: %s", why(error))
        return 1
    finally:
        for task in (watching, waiting):
            if task is not None:
                task.cancel()
        await supervisor.stop()


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m serving.serve", description=__doc__)
    add_serving_arguments(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with run_folder(arguments.run_dir) as run_dir:
        try:
            settings = settings_from(arguments, run_dir)
        except (OSError, ValueError) as error:
            logger.error("error: %s", why(error))
            return 1
        tell_if_stale(settings)
        return asyncio.run(serve(settings))


if __name__ == "__main__":
    sys.exit(main())
