"""What routes ask for: the service, a permission, a place among the requests in flight."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import Depends, Request

from api.problems import Problem, request_id_of
from api.service import Service
from api.settings import Scope


def get_service(request: Request) -> Service:
    """The service of the app."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
RequestId = Annotated[str, Depends(request_id_of)]


def requires(scope: Scope) -> Callable[..., None]:
    """A dependency that lets only keys with ``scope`` pass; without configured keys everyone may."""

    def check(request: Request, service: ServiceDep) -> None:
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

    return check


async def admitted(service: ServiceDep) -> AsyncIterator[None]:
    """A place among the requests in flight; refused at once when all are taken."""
    limit = service.settings.max_in_flight
    if service.in_flight >= limit:
        raise Problem(
            "overloaded", f"{limit} requests are being worked on; slow down", retry_after_s=1
        )
    service.in_flight += 1
    service.metrics.in_flight.inc()
    try:
        yield
    finally:
        service.in_flight -= 1
        service.metrics.in_flight.dec()
