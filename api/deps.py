"""What routes ask for: the service, a permission, the request's id.

All are coroutines: FastAPI runs plain functions in a thread, which costs more than they do.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request

from api.problems import Problem, request_id_of
from api.service import Service
from api.settings import Scope


async def get_service(request: Request) -> Service:
    """The service of the app."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def get_request_id(request: Request) -> str:
    """The id of the request."""
    return request_id_of(request)


RequestId = Annotated[str, Depends(get_request_id)]


def permit(request: Request, service: Service, scope: Scope) -> None:
    """Let only keys with ``scope`` pass; without configured keys everyone may.

    Raises:
        Problem: no known key, or one that may not.
    """
    keys = service.settings.api_keys
    if not keys:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(token.encode()).hexdigest() if scheme.lower() == "bearer" else ""
    matching = [key for key in keys if hmac.compare_digest(key.sha256, digest)]
    if not matching:
        raise Problem(
            "missing-key", "expected the header Authorization: Bearer <key> with a known key"
        )
    if not any(scope in key.scopes for key in matching):
        raise Problem("key-not-allowed", f"this key may not {scope}")


def requires(scope: Scope) -> Callable[..., Awaitable[None]]:
    """``permit`` as a dependency."""

    async def check(request: Request, service: ServiceDep) -> None:
        permit(request, service, scope)

    return check


async def nothing_unknown(request: Request) -> None:
    """Refuse what the route does not know: a misspelt target must not become the default one.

    Raises:
        Problem: a query parameter without a meaning, or a body.
    """
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    if unknown := sorted(set(request.query_params) - known):
        raise Problem(
            "invalid-parameter",
            f"no parameter {', '.join(unknown)[:200]!r}; there are: {', '.join(sorted(known)) or 'none'}",
        )
    length = request.headers.get("content-length", "0")
    if length != "0" or "transfer-encoding" in request.headers:
        raise Problem(
            "invalid-parameter",
            "expected everything in the query, got a body; e.g. POST /calibrate?fpr=1e-2",
        )
