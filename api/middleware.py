"""Around every request: an id, one JSON log line, metrics, no frames. Plain ASGI."""

from __future__ import annotations

import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import Metrics
from api.problems import Problem, problem_response

logger = logging.getLogger("api.access")

# A page of another site that framed ours could have its visitor click on "Set" without knowing.
_NO_FRAMES = (b"content-security-policy", b"frame-ancestors 'none'")

_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Gives every request an id and accounts for its answer.

    Args:
        app: the application inside.
        metrics: counters.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = sent_id if _GOOD_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                    _NO_FRAMES,  # a second policy beside a page's own: both hold
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unhandled error", extra={"request_id": request_id})
            if not status:
                problem = Problem(
                    "internal-error",
                    "the gateway failed on this request; it was logged under its id",
                )
                await problem_response(problem, request_id)(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            logger.info(
                "%s %s %d", scope["method"], scope["path"], status,
                extra={"request_id": request_id, "status": status, "ms": round(seconds * 1e3, 2)},
            )  # fmt: skip


class JsonFormatter(logging.Formatter):
    """One JSON object a line; user text cannot break the line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("request_id", "status", "ms"):
            if hasattr(record, name):
                content[name] = getattr(record, name)
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str).decode()


def configure_logging(level: str) -> None:
    """Send everything as JSON to standard error; called by the composition root only."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = name != "uvicorn.access"
