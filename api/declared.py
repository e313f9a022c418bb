"""Which problems a route answers with, for the OpenAPI description."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from api.problems import MEDIA_TYPE, PREFIX, PROBLEMS

ANY = ("internal-error",)
KEYS = ("missing-key", "key-not-allowed")
# Whoever needs the served path may be the first who asks the model server for it.
PATH = (
    "not-ready",
    "backend-failed",
    "operating-point-mismatch",
    "overloaded",
    "store-away",
    "deadline",
)
# An operating point of the served path is chosen or looked up.
POINT = (*PATH, "not-calibrated", "invalid-parameter", "not-certifiable")
UPLOAD = (
    "bad-request", "incomplete-body", "slow-upload", "too-large", "unsupported-type", "unreadable-image",
)  # fmt: skip

_REFERENCE = {"$ref": "#/components/schemas/ProblemDocument"}


class ProblemDocument(BaseModel):
    """Every error: RFC 9457 problem details. Some types have further members, e.g. smallest_attainable_fpr."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="what happened, stable", examples=[PREFIX + "unreadable-image"])
    title: str
    status: int
    detail: str = Field(description="what was expected, what came, what to do")
    instance: str = Field(description="urn:request:<request id>")


def problems_of_route(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: its problems by status, as problem documents.

    Args:
        slugs: entries of ``PROBLEMS``; ``ANY`` is added.

    Raises:
        KeyError: no such problem.
    """
    by_status: defaultdict[int, list[str]] = defaultdict(list)
    for slug in dict.fromkeys((*slugs, *ANY)):
        by_status[PROBLEMS[slug][0]].append(slug)
    return {status: _answer(by_status[status]) for status in sorted(by_status)}


def _answer(slugs: list[str]) -> dict[str, Any]:
    types = [PREFIX + slug for slug in slugs]
    answer: dict[str, Any] = {
        "description": "; ".join(f"`{slug}`: {PROBLEMS[slug][1]}" for slug in slugs),
        "content": {
            MEDIA_TYPE: {"schema": {"allOf": [_REFERENCE], "properties": {"type": {"enum": types}}}}
        },
    }
    if "overloaded" in slugs:
        answer["headers"] = {
            "Retry-After": {
                "description": "seconds, where asking again helps",
                "schema": {"type": "integer"},
            }
        }
    return answer


def install(app: FastAPI) -> None:
    """Put problems' schema and the key into the app's OpenAPI description, and take FastAPI's own errors, never sent, out."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        schemas: dict[str, Any] = document["components"]["schemas"]
        schemas[ProblemDocument.__name__] = ProblemDocument.model_json_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for operations in document["paths"].values():
            for operation in operations.values():
                if str(PROBLEMS["missing-key"][0]) in operation["responses"]:
                    # Either: a gateway without keys asks for none.
                    operation["security"] = [{}, {"key": []}]
        return document

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way to extend it
