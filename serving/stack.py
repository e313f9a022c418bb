"""TorchServe and the gateway on this machine: ``python -m serving.stack --model NAME --port 8000``.

Start: TorchServe first, until a real prediction; then the gateway, until it is ready. Stop: the gateway first, which
finishes what it has; then TorchServe, which does not drain. If either dies the other is stopped and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import aiohttp

from serving.configuration import ServingSettings, device_defaults
from serving.serve import (
    add_serving_arguments,
    run_folder,
    settings_from,
    stop_event,
    tell_if_stale,
    why,
)
from serving.supervisor import Supervisor
from serving.torchserve import TorchServeFailed, die_with_parent

logger = logging.getLogger(__name__)

_READY_SECONDS = 60.0
_DRAIN_SECONDS = 35.0


def require_free_port(host: str, port: int) -> None:
    """Another program on the port would answer in the gateway's place.

    Raises:
        TorchServeFailed: the port is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TorchServeFailed(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what runs there (a stack that KEEP=1 left?) "
                "or choose another port: PORT="
            ) from error


def _reachable(host: str) -> str:
    """Host of a URL, for the address or name that is listened on."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:  # all addresses: one to listen on, not one to call
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"


class Gateway:
    """The gateway's process.

    Args:
        settings: of the model server it speaks to.
        host: address to listen on.
        port: port to listen on.
        processes: uvicorn workers.
        database_url: of the calibration store.
    """

    def __init__(
        self, settings: ServingSettings, *, host: str, port: int, processes: int, database_url: str
    ) -> None:
        self.settings, self.host, self.port = settings, host, port
        self.processes, self.database_url = processes, database_url
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        return f"http://{_reachable(self.host)}:{self.port}"

    async def start(self) -> None:
        """Start and wait until it reports ready.

        Raises:
            TorchServeFailed: it exited or was not ready in time; names what it said.
        """
        environment = {
            **os.environ,
            "OPENSET_ARCHIVE": str(self.settings.archive.resolve()),
            "OPENSET_INFERENCE_SOCKET": str(self.settings.inference_socket.resolve()),
            "OPENSET_DATABASE_URL": self.database_url,
        }
        if self.processes > 1:
            folder = tempfile.mkdtemp(prefix="metrics-", dir=self.settings.run_dir)
            environment["PROMETHEUS_MULTIPROC_DIR"] = folder
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "uvicorn", "--factory", "api.app:from_environment",
            "--host", self.host, "--port", str(self.port), "--workers", str(self.processes),
            "--http", "api.bounded_head:BoundedHead", "--no-access-log", "--timeout-keep-alive", "5",
            "--timeout-graceful-shutdown", "30",
            env=environment, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        deadline = asyncio.get_running_loop().time() + _READY_SECONDS
        said = "nothing"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
            while asyncio.get_running_loop().time() < deadline:
                if self.process.returncode is not None:
                    raise TorchServeFailed(
                        "the gateway exited during the start; its messages stand above"
                    )
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(f"{self.url}/readyz") as response:
                        if response.status == 200:
                            return
                        said = await response.text()
                await asyncio.sleep(0.2)
        raise TorchServeFailed(
            f"the gateway was not ready within {_READY_SECONDS:g} s; it said: {said}"
        )

    async def wait(self) -> None:
        """Return when the process has ended."""
        assert self.process is not None
        await self.process.wait()

    async def stop(self) -> None:
        """Let it finish what it has, then end it and its workers, also where it is dead and they are not."""
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), _DRAIN_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # usually nobody is left
        await self.process.wait()


async def run_stack(settings: ServingSettings, gateway: Gateway) -> int:
    """Run both until a signal or a failure; 0 after a signal, 1 after a failure."""
    stopping = asyncio.create_task(stop_event().wait())
    supervisor = Supervisor(settings)
    tasks: list[asyncio.Task[None]] = []

    async def live() -> None:
        require_free_port(gateway.host, gateway.port)
        logger.info("starting TorchServe with %s ...", settings.archive)
        answer = await supervisor.start()
        logger.info("TorchServe answers (path %s); starting the gateway ...", answer["path"])
        await gateway.start()
        logger.info("ready: %s (page), %s/docs (API); stop with Ctrl-C", gateway.url, gateway.url)
        watching = asyncio.create_task(supervisor.watch())
        ending = asyncio.create_task(gateway.wait())
        tasks.extend([watching, ending])
        await asyncio.wait([watching, ending], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        raise TorchServeFailed("the gateway ended")

    living = asyncio.create_task(live())
    try:
        await asyncio.wait([living, stopping], return_when=asyncio.FIRST_COMPLETED)
        if living.done():
            living.result()
        return 0
    except (OSError, TorchServeFailed) as error:
        logger.error("error: %s", why(error))
        return 1
    finally:
        for task in (living, stopping, *tasks):
            task.cancel()
        await gateway.stop()
        await supervisor.stop()


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.stack", description=(__doc__ or "").partition("\n")[0]
    )
    add_serving_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gateway-processes", type=int, help="default: 1, on a GPU 4")
    parser.add_argument(
        "--database-url",
        help="default: OPENSET_DATABASE_URL, else a SQLite file beside the archive, <model>.calibrations.db",
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with run_folder(arguments.run_dir) as run_dir:
        try:
            settings = settings_from(arguments, run_dir)
        except (OSError, ValueError) as error:
            logger.error("error: %s", why(error))
            return 1
        tell_if_stale(settings)
        database = Path(arguments.model_store) / f"{arguments.model}.calibrations.db"
        gateway = Gateway(
            settings,
            host=arguments.host,
            port=arguments.port,
            processes=arguments.gateway_processes
            or device_defaults(arguments.device)["gateway_processes"],
            database_url=arguments.database_url
            or os.environ.get("OPENSET_DATABASE_URL")
            or f"sqlite:///{database.resolve()}",
        )
        return asyncio.run(run_stack(settings, gateway))


if __name__ == "__main__":
    sys.exit(main())
