"""Refuses what a page of another site makes a browser send: without keys, anyone's page could set tau."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request

from api.deps import ServiceDep
from api.problems import Problem


async def own_origin(request: Request, service: ServiceDep) -> None:
    """A dependency of routes that change something; programs, which send neither header, pass.

    A page may also point its own name at this machine (DNS rebinding); then its origin equals the host. So without keys a
    browser must have asked an address, which no page can rebind, or a name that is known.

    Raises:
        Problem: the request comes from a page of another origin, or under a name that is not known.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None and origin is None:  # no browser: one sends an Origin with every POST
        return
    host = request.headers.get("host", "")
    # Sec-Fetch-Site lacks in browsers of before 2023, and on pages that came neither over HTTPS nor from localhost.
    same = _host_of(origin or "") == host if site is None else site in ("same-origin", "none")
    if not same:
        raise Problem(
            "foreign-origin",
            "the operating point is not changed for a page of another site; call the gateway directly or from its own page",
        )
    settings = service.settings
    if not settings.api_keys and not _is_known(host, settings.allowed_hosts):
        raise Problem(
            "foreign-origin",
            f"without keys the operating point is not changed under the name {host[:100]!r}; open the page by its address, "
            "or add the name to OPENSET_ALLOWED_HOSTS",
        )


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # no address at all, "http://["
        return None


def _is_known(host: str, allowed: tuple[str, ...]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name in (entry.lower() for entry in allowed):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
