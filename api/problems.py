"""Every error the gateway can answer: RFC 9457 problem details with a stable type."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

PREFIX = "/problems/"
MEDIA_TYPE = "application/problem+json"

# slug -> (status, title). The slug is the contract; the text may improve.
PROBLEMS: dict[str, tuple[int, str]] = {
    "bad-request": (400, "Bad request"),
    "incomplete-body": (400, "Incomplete body"),
    "missing-key": (401, "API key missing or unknown"),
    "key-not-allowed": (403, "API key lacks the scope"),
    "own-target-refused": (403, "No target of a request's own"),
    "foreign-origin": (403, "Page of another site"),
    "not-found": (404, "Not found"),
    "method-not-allowed": (405, "Method not allowed"),
    "slow-upload": (408, "Upload too slow"),
    "too-large": (413, "Upload too large"),
    "unsupported-type": (415, "Unsupported type"),
    "unreadable-image": (422, "Unreadable image"),
    "invalid-parameter": (422, "Invalid parameter"),
    "not-certifiable": (422, "False-positive rate not attainable"),
    "wrong-path": (409, "Calibration of another path"),
    "internal-error": (500, "Internal error"),
    "overloaded": (503, "Overloaded"),
    "not-ready": (503, "Not ready"),
    "not-calibrated": (503, "No calibration for the serving path"),
    "store-away": (503, "Calibration store unavailable"),
    "backend-failed": (503, "Model server failed"),
    "operating-point-mismatch": (503, "Operating point mismatch"),
    "deadline": (504, "Deadline exceeded"),
}


class Problem(Exception):
    """An error with its answer.

    Args:
        slug: entry of ``PROBLEMS``.
        detail: what was expected, what came, what to do.
        retry_after_s: for the ``Retry-After`` header.
        facts: further members of the answer.
    """

    def __init__(
        self, slug: str, detail: str, *, retry_after_s: int | None = None, **facts: Any
    ) -> None:
        super().__init__(detail)
        self.slug = slug
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.facts = facts
        self.status, self.title = PROBLEMS[slug]

    def document(self, request_id: str) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "type": PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": f"urn:request:{request_id}",
            **self.facts,
        }


def problem_response(
    problem: Problem, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The HTTP answer to a problem; ``headers`` are further ones that its status asks for."""
    headers = dict(headers or {})
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(problem.retry_after_s)
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return Response(
        orjson.dumps(problem.document(request_id)),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )


def request_id_of(request: Request) -> str:
    """The id that the request-id middleware gave this request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def install(app: FastAPI) -> None:
    """Answer every exception of the app with a problem document."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return problem_response(error, request_id_of(request))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        texts = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}, got {item.get('input')!r}"
            for item in error.errors()
        ]
        return problem_response(
            Problem("invalid-parameter", "; ".join(texts)[:500]), request_id_of(request)
        )

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        slug = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code)
        if slug is None:
            slug = (
                "bad-request"
                if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR
                else "internal-error"
            )
        problem = Problem(slug, f"{error.detail}; see /docs")
        return problem_response(problem, request_id_of(request), error.headers)  # Allow of a 405

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
