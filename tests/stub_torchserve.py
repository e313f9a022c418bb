"""A stand-in for TorchServe on a Unix socket: answers as the handler would, or misbehaves as told. For unit tests only."""

from __future__ import annotations

import asyncio
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from api.archive import read_archive

Answer = Callable[[web.Request, bytes, dict[str, Any]], web.StreamResponse | None]


def small_archive(artifact: Path, file: Path) -> Path:
    """The part of a ``.mar`` that the gateway reads."""
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("weights.safetensors", "model_card.json", "calibration.npz"):
            archive.write(artifact / name, name)
    return file


@dataclass
class StubTorchServe:
    """Judges an image by its length: score = len(image) / 1000.

    Attributes:
        archive: whose identity it reports.
        behave: may change the document in place, or return another response.
        silent: whether it takes requests and never answers.
        requests: headers of everything it was asked.
    """

    archive: Path
    behave: Answer | None = None
    silent: bool = False
    path: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = read_archive(self.archive)
        self.card, self.sha256 = model.card, model.sha256
        self.path = self.path or next(iter(model.score_sets))

    async def start(self, socket: Path) -> web.AppRunner:
        """Listen."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/predictions/{name}", self._predict)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        return runner

    async def _predict(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.requests.append(headers)
        if self.silent:
            await never()
        factory = self.card.factory or {}
        tau = float(np.float32(headers.get("x-openset-tau", factory["tau"])))
        score = len(body) / 1000
        nearest = {
            "label": "3", "class_id": "3", "index": 3, "probability": 0.9, "cosine": 0.8, "angle_deg": 36.9,
        }  # fmt: skip
        document: dict[str, Any] = {
            "label": "3" if score >= tau else "unknown",
            "accepted": score >= tau,
            "score": score,
            "score_type": headers.get("x-openset-score", factory["score_type"]),
            "score_probability": 0.9,
            "tau": tau,
            "tau_probability": 0.5,
            "calibration": headers.get("x-openset-calibration", "factory"),
            "nearest": nearest,
            "top_k": [nearest] * int(headers.get("x-openset-top-k", "5")),
            "image": {"width": 28, "height": 28, "format": "PNG"},
            "model": {"name": self.card.name, "version": "1.0", "sha256": self.sha256},
            "path": self.path,
            "timing_ms": {"decode": 0.1, "compute": 0.2},
            "batch_size": 1,
        }
        if headers.get("x-openset-angles") == "all":
            document["angles"] = [
                {"label": name, "class_id": name, "cosine": 0.1, "angle_deg": 84.3}
                for name in self.card.class_names
            ]
        if self.behave is not None:
            other = self.behave(request, body, document)
            if other is not None:
                return other
        return web.Response(body=orjson.dumps(document), content_type="application/json")


def torchserve_error(status: int, kind: str, message: str) -> web.Response:
    """An error as TorchServe itself writes it."""
    content = {"code": status, "type": kind, "message": message}
    return web.Response(status=status, body=orjson.dumps(content), content_type="application/json")


async def never(seconds: float = 3600) -> None:
    """Wait longer than any deadline."""
    await asyncio.sleep(seconds)
