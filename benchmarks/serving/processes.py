"""Serving stacks as processes of their own, and what they use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks.serving.load import Target
from benchmarks.serving.plan import Plan
from benchmarks.serving.report import say
from serving.configuration import LOG4J2, ServingSettings
from serving.torchserve import ManagementClient, TorchServe, TorchServeFailed, die_with_parent

ROOT = Path(__file__).parents[2]
_START_SECONDS = 3600.0
_RELOAD_SECONDS = 1
# What the command line of each part of a stack holds.
_PARTS = {
    "org.pytorch.serve.ModelServer": "Java",
    "model_service_worker": "workers",
    "uvicorn": "gateway",
}


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        gateway: target of the gateway; for the stock server its own socket.
        torchserve: target of TorchServe's inference socket.
        pid: of the process whose descendants are the server.
    """

    gateway: Target
    torchserve: Target
    pid: int

    def processes(self) -> list[psutil.Process]:
        """The server's processes."""
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]

    def memory_bytes(self) -> int:
        """Resident memory of all of them."""
        return sum(_value(lambda p=p: p.memory_info().rss) for p in self.processes())

    def cpu_seconds_by_part(self) -> dict[str, float]:
        """Processor time so far of the gateway, of TorchServe's Java and of its workers."""
        seconds = dict.fromkeys(_PARTS.values(), 0.0)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                for mark, part in _PARTS.items():
                    if mark in command:
                        seconds[part] += sum(process.cpu_times()[:2])
        return seconds

    def cpu_seconds(self) -> float:
        """Processor time of all of them so far."""
        return sum(_value(lambda p=p: sum(p.cpu_times()[:2])) for p in self.processes())


def _value(read: Callable[[], float]) -> float:
    try:
        return read()
    except psutil.NoSuchProcess:
        return 0


def gpu_memory_bytes() -> int | None:
    """Memory in use on the first GPU, of all processes; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.strip()) * 2**20 if done.returncode == 0 else None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def _run_folder(name: str) -> Iterator[Path]:
    """A short folder for sockets and ``log``; goes at the end, but after a failure its log is kept and named."""
    folder = Path(tempfile.mkdtemp(prefix="osb-"))
    try:
        yield folder
    except Exception:  # raised again below; the log is kept for it
        log = folder / "log"
        if log.exists():
            kept = Path(tempfile.gettempdir()) / f"{folder.name}-{name}.log"
            shutil.copyfile(log, kept)
            say(f"the server's own messages are kept in {kept}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def served_by_stack(
    store: Path, model: str, arguments: list[str], environment: dict[str, str]
) -> AsyncIterator[Running]:
    """``python -m serving.stack``: TorchServe with our handler, and the gateway.

    Raises:
        TorchServeFailed: it did not start, or ended before it was told to; holds what it said.
    """
    with _run_folder(model) as run_dir:
        port, log = _free_port(), run_dir / "log"
        command = [
            sys.executable, "-m", "serving.stack", "--model", model, "--model-store", str(store), "--run-dir", str(run_dir),
            "--port", str(port), *arguments,
        ]  # fmt: skip
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=stream, env={**os.environ, **environment},
                preexec_fn=die_with_parent,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + _START_SECONDS
            while "ready: " not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TorchServeFailed(f"the stack did not start:\n{log.read_text()[-3000:]}")
                await asyncio.sleep(0.1)
            socket_file = run_dir / "ts" / "inference.sock"
            yield Running(
                Target(f"http://127.0.0.1:{port}"),
                Target("http://torchserve", f"/predictions/{model}", socket_file),
                process.pid,
            )
            if process.poll() is not None:
                raise TorchServeFailed(
                    f"the stack ended while it was measured:\n{log.read_text()[-3000:]}"
                )
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)


# The stock worker logs every batch; ours does not. Once it is ready its level falls to that of ours.
_RELOADED = LOG4J2.replace('status="ERROR"', f'status="ERROR" monitorInterval="{_RELOAD_SECONDS}"')
_QUIET = _RELOADED.replace('name="MODEL_LOG" level="info"', 'name="MODEL_LOG" level="warn"')


@contextlib.asynccontextmanager
async def served_by_stock(
    store: Path, canary: bytes, *, batch_size: int, workers: int, plan: Plan
) -> AsyncIterator[Running]:
    """TorchServe with its stock handler: same Java, sockets, placing of threads and, once ready, logging as ours.

    Raises:
        TorchServeFailed: it did not start; holds what it said.
    """
    with (
        _run_folder(f"stock-{batch_size}-{workers}") as run_dir,
        (run_dir / "log").open("wb") as output,
    ):
        settings = ServingSettings(
            model="stock",
            model_store=store,
            run_dir=run_dir,
            batch_size=batch_size,
            workers=workers,
            device=plan.device,
            response_timeout_s=120,
        )
        server, client = (
            TorchServe(settings, output=output, logging=_RELOADED),
            ManagementClient(settings),
        )
        try:
            await server.start()
            deadline = time.monotonic() + _START_SECONDS
            while True:
                if not server.alive or time.monotonic() > deadline:
                    said = (run_dir / "log").read_text(errors="replace")[-3000:]
                    raise TorchServeFailed(f"the stock server did not start:\n{said}")
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, TorchServeFailed):  # fmt: skip
                    await client.predict(canary, 30.0)
                    break
                await asyncio.sleep(0.3)
            quiet = run_dir / "conf" / "quiet.xml"
            quiet.write_text(_QUIET)
            os.replace(quiet, run_dir / "conf" / "log4j2.xml")
            assert server.process is not None
            target = Target("http://torchserve", "/predictions/stock", settings.inference_socket)
            yield Running(target, target, server.process.pid)
        finally:
            await server.stop()
