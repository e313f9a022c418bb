"""Keeps one TorchServe instance answering: ready means a real prediction, dead workers are healed or the process exits."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import time
from typing import Any

import aiohttp
from PIL import Image

from serving.configuration import ServingSettings
from serving.torchserve import (
    STATUS,
    ManagementClient,
    NoPlaceInQueue,
    TorchServe,
    TorchServeFailed,
)

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 5.0
_FAILURES_BEFORE_HEALING = 3
_DEATHS_BEFORE_GIVING_UP = 3


# A call over a socket of TorchServe's can fail in these ways.
_CALL_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, TorchServeFailed, ValueError)


def _workers_ready(described: dict[str, Any]) -> bool:
    workers = described["workers"]
    return bool(workers) and all(worker["status"] == "READY" for worker in workers)


def canary_image() -> bytes:
    """A small grey PNG; any model can be asked about it."""
    stream = io.BytesIO()
    Image.new("L", (32, 32), 64).save(stream, "PNG")
    return stream.getvalue()


class Supervisor:
    """Starts, watches, heals and stops one instance.

    Args:
        settings: how to serve.
        watch_seconds: time between two canary predictions.
    """

    def __init__(self, settings: ServingSettings, *, watch_seconds: float = _WATCH_SECONDS) -> None:
        self.settings = settings
        self.watch_seconds = watch_seconds
        self.server = TorchServe(settings)
        self.client = ManagementClient(settings)
        self.canary = canary_image()
        self.healed = 0

    async def start(self) -> dict[str, Any]:
        """Start TorchServe and return the first prediction.

        Raises:
            TorchServeFailed: Java died, the worker died again and again, the model was not ready in time, or a setting was
                not taken over.
        """
        await self.server.start()
        self._write_status("starting")
        deadline = time.monotonic() + self.settings.startup_timeout_s + 120
        seen: set[int] = set()
        while True:
            if not self.server.alive:
                raise TorchServeFailed(
                    "TorchServe exited during the start; its messages stand above"
                )
            if time.monotonic() > deadline:
                raise TorchServeFailed(
                    "the model was not ready in time; the worker's messages stand above"
                )
            try:
                described = await self.client.describe()
            except _CALL_FAILURES:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            if _workers_ready(described):
                break
            running = {worker.get("pid", -1) for worker in described["workers"]} - {-1}
            seen |= running
            # TorchServe itself would go on trying, ever more seldom.
            if len(seen - running) >= _DEATHS_BEFORE_GIVING_UP:
                raise TorchServeFailed(
                    f"the worker died {_DEATHS_BEFORE_GIVING_UP} times during the start; its messages stand above"
                )
            await asyncio.sleep(_POLL_SECONDS)
        self._check_settings(described)
        try:
            answer = await self._canary_prediction()
        except _CALL_FAILURES as error:
            raise TorchServeFailed(
                f"the first prediction failed ({error!r}); the worker's messages stand above"
            ) from error
        self._write_status("ready", path=answer.get("path"))
        return answer

    async def _canary_prediction(self) -> dict[str, Any]:
        """Wait as long as a healthy model may take: the canary stands behind all whom the gateway has admitted."""
        timeout_s = self.settings.deadline_s + self.settings.response_timeout_s
        return await self.client.predict(self.canary, timeout_s)

    def _check_settings(self, described: dict[str, Any]) -> None:
        wrong = {
            key: (described.get(key), expected)
            for key, expected in self.settings.read_back().items()
            if key in described and described[key] != expected
        }
        if wrong:
            raise TorchServeFailed(
                "TorchServe did not take over: "
                + ", ".join(
                    f"{key} is {got}, expected {expected}" for key, (got, expected) in wrong.items()
                )
            )

    async def watch(self) -> None:
        """Watch until cancelled.

        Raises:
            TorchServeFailed: Java died, or healing did not help.
        """
        failures = 0
        while True:
            await asyncio.sleep(self.watch_seconds)
            if not self.server.alive:
                raise TorchServeFailed("TorchServe died")
            try:
                await self._canary_prediction()
                failures = 0
            except _CALL_FAILURES as error:
                if isinstance(error, NoPlaceInQueue) and await self._busy():
                    failures = 0
                    continue
                failures += 1
                logger.warning("canary prediction %d failed: %r", failures, error)
            if failures >= _FAILURES_BEFORE_HEALING:
                await self._heal()
                failures = 0

    async def _busy(self) -> bool:
        """Whether a full queue is only a load: all workers are well, and TorchServe itself replaces one that hangs."""
        try:
            return _workers_ready(await self.client.describe())
        except _CALL_FAILURES:
            return False

    async def _heal(self) -> None:
        """Restart all workers: TorchServe itself gives a dead model up for ever."""
        self._write_status("healing")
        logger.warning("restarting the workers")
        try:
            await self.client.scale(0)
            await self.client.scale(self.settings.workers)
            await self._canary_prediction()
        except NoPlaceInQueue:  # what had queued up is worked on; the watch goes on
            logger.warning("the workers are back and the queue is full")
        except _CALL_FAILURES as error:
            raise TorchServeFailed(f"the workers could not be healed: {error!r}") from error
        self.healed += 1
        self._write_status("ready")

    async def stop(self) -> None:
        """Stop TorchServe."""
        started = self.server.process is not None
        await self.server.stop()
        if started:  # else the folder may be another instance's
            self._write_status("stopped")

    def _write_status(self, state: str, **facts: Any) -> None:
        """For people, and for the container's health check."""
        file = self.settings.run_dir / STATUS
        partial = file.with_suffix(".partial")
        content = {
            "state": state,
            "model": self.settings.model,
            "healed": self.healed,
            "pid": os.getpid(),
            **facts,
        }
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, file)
