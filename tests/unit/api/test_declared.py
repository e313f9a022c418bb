"""The OpenAPI description declares the problems; that none is missing is checked at every answer of every gateway test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.app import create_app
from api.declared import problems_of_route
from api.problems import PROBLEMS
from api.settings import Settings
from tests.unit.api.conftest import declared_statuses

# Answers to a path or a method that is none of the operations.
OF_NO_OPERATION = {"method-not-allowed"}


@pytest.fixture(scope="module")
def document(archive: Path) -> dict[str, Any]:
    return create_app(Settings(archive=archive, inference_socket=Path("nowhere"))).openapi()


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for path in document["paths"].values() for one in path.values()]


def test_every_error_is_a_problem_document_of_named_types(document: dict[str, Any]) -> None:
    required = document["components"]["schemas"]["ProblemDocument"]["required"]
    assert required == ["type", "title", "status", "detail", "instance"]
    for operation in operations(document):
        errors = {code: one for code, one in operation["responses"].items() if code != "200"}
        assert "500" in errors
        for code, answer in errors.items():
            assert list(answer["content"]) == ["application/problem+json"]
            schema = answer["content"]["application/problem+json"]["schema"]
            assert schema["allOf"] == [{"$ref": "#/components/schemas/ProblemDocument"}]
            slugs = [
                name.removeprefix("/problems/") for name in schema["properties"]["type"]["enum"]
            ]
            assert slugs
            assert {PROBLEMS[slug][0] for slug in slugs} == {int(code)}


def test_every_problem_is_declared_somewhere(document: dict[str, Any]) -> None:
    text = str(document["paths"])
    assert {slug for slug in PROBLEMS if f"/problems/{slug}'" not in text} == OF_NO_OPERATION


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/predict", "200 400 401 403 404 408 413 415 422 500 503 504"),
        ("POST", "/calibrate", "200 401 403 422 500 503 504"),
        ("POST", "/calibrations/7/activate", "200 401 403 404 409 422 500 503 504"),
        ("GET", "/livez", "200 500"),
        ("GET", "/nowhere", None),
    ],
)
def test_statuses_of_an_operation(
    document: dict[str, Any], method: str, path: str, expected: str | None
) -> None:
    statuses = declared_statuses(document, method, path)
    assert statuses == (None if expected is None else set(expected.split()))


def test_problem_that_does_not_exist_cannot_be_declared() -> None:
    with pytest.raises(KeyError):
        problems_of_route("not-a-problem")


def test_operations_that_may_want_a_key_take_one(document: dict[str, Any]) -> None:
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    taking = {
        (method, path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "security" in operation
    }
    assert {("post", "/predict"), ("post", "/calibrate"), ("get", "/model")} <= taking
    assert not taking & {("get", "/livez"), ("get", "/readyz")}
