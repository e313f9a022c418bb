"""The one class that talks to TorchServe; another server would need another such class and nothing else."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any, Literal

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yarl import URL

from api.problems import Problem
from api.settings import Settings

logger = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 1_048_576
_RETRY_AFTER_S = 1

Finite = Annotated[float, Field(allow_inf_nan=False)]


class ClassScore(BaseModel):
    """One class of an answer; probability, cosine and angle are null where the model computed no finite value."""

    model_config = ConfigDict(frozen=True)

    label: str
    class_id: str
    index: int
    probability: Finite | None
    cosine: Finite | None
    angle_deg: Finite | None


class ClassAngle(BaseModel):
    """Angle between the image's feature and a class center."""

    model_config = ConfigDict(frozen=True)

    label: str
    class_id: str
    cosine: Finite | None
    angle_deg: Finite | None


class ImageFacts(BaseModel):
    """The upload as it came."""

    model_config = ConfigDict(frozen=True)

    width: int
    height: int
    format: str


class ModelIdentity(BaseModel):
    """Which weights answered."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    sha256: str


class HandlerAnswer(BaseModel):
    """What the handler says of one image; anything else is refused."""

    model_config = ConfigDict(frozen=True)

    label: str
    accepted: bool
    score: Finite | None
    score_type: str
    score_probability: Finite | None
    tau: Finite
    tau_probability: Finite | None
    calibration: str
    nearest: ClassScore
    top_k: list[ClassScore]
    angles: list[ClassAngle] | None = None
    image: ImageFacts
    model: ModelIdentity
    path: str
    timing_ms: dict[str, Finite]
    batch_size: int
    non_finite: Literal[True] | None = None


class Backend:
    """Client of TorchServe's inference socket.

    Args:
        settings: of the gateway.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = URL(f"http://torchserve/predictions/{settings.model_name}")
        self._deadline_s = settings.deadline_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(settings.inference_socket.resolve()), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            # TorchServe sets no cookies and reads none of these headers; both cost time at every request.
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "accept", "accept-encoding"),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def predict(self, image: bytes, headers: dict[str, str]) -> HandlerAnswer:
        """Let the model judge one image.

        Args:
            image: as it was uploaded.
            headers: the allow-list of ours, lower case; nothing of the client's passes through.

        Raises:
            Problem: everything that can go wrong, mapped.
        """
        sent = {"content-type": "application/octet-stream", **headers}
        try:
            async with asyncio.timeout(self._deadline_s):
                status, body = await self._post(image, sent)
                if status in (500, 507) and _is_worker_loss(body):
                    # Co-batched with a crash: once more. A request that kills two workers is poison.
                    logger.warning("a worker died under a request; repeating it once")
                    status, body = await self._post(image, sent)
        except TimeoutError as error:
            raise Problem(
                "deadline",
                f"the model did not answer within {self._deadline_s:g} s; try again later",
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise Problem(
                "not-ready", "the model server is not running or still starting; try again later",
                retry_after_s=_RETRY_AFTER_S,
            ) from error  # fmt: skip
        except (aiohttp.ClientError, OSError) as error:
            raise Problem(
                "backend-failed",
                "the connection to the model server broke; try again",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        if status == 200:
            return _parse(body)
        raise _mapped(status, body)

    async def _post(self, image: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        async with self._session.post(self._url, data=image, headers=headers) as response:
            body = await response.content.read(_MAX_ANSWER_BYTES + 1)
            while len(body) <= _MAX_ANSWER_BYTES and not response.content.at_eof():
                body += await response.content.read(_MAX_ANSWER_BYTES + 1 - len(body))
            if len(body) > _MAX_ANSWER_BYTES:
                raise Problem("backend-failed", "the model server's answer was too large")
            return response.status, body


def _document(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_worker_loss(body: bytes) -> bool:
    return str(_document(body).get("message", "")).startswith(("Worker died", "Worker scaled down"))


def _parse(body: bytes) -> HandlerAnswer:
    try:
        return HandlerAnswer.model_validate_json(body)
    except ValidationError as error:
        logger.error(
            "the model server's answer is not what the handler writes: %s", error.errors()[:3]
        )
        raise Problem(
            "backend-failed", "the model server's answer could not be understood"
        ) from error


def _mapped(status: int, body: bytes) -> Problem:
    """The problem that stands for an answer of TorchServe or of the handler."""
    content = _document(body)
    kind, message = str(content.get("type", "")), str(content.get("message", ""))
    if kind == "/problems/unreadable-image":
        return Problem("unreadable-image", str(content.get("detail", ""))[:300])
    if kind == "/problems/bad-operating-point":
        logger.error("the handler refused our operating point: %s", content.get("detail"))
        return Problem("operating-point-mismatch", "the model server refused the operating point")
    if status == 503 and kind == "ServiceUnavailableException":
        return Problem(
            "overloaded", "the model's queue is full; slow down", retry_after_s=_RETRY_AFTER_S
        )
    if status == 404:
        return Problem("not-ready", "the model is not loaded yet", retry_after_s=_RETRY_AFTER_S)
    if status == 413:
        return Problem("too-large", "the model server refused the size of the image")
    if status == 507 or message.startswith(("Worker died", "Worker scaled down")):
        return Problem(
            "backend-failed", "the model server ran out of resources", retry_after_s=_RETRY_AFTER_S
        )
    logger.error("unexpected answer of the model server: status %d, %s", status, body[:500])
    return Problem("internal-error", "the model could not process the image")
