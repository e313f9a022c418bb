"""Refuses what a page of another site makes a browser send: without keys, anyone's page could set tau."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import Request

from api.problems import Problem


def own_origin(request: Request) -> None:
    """A dependency of routes that change something; programs, which send neither header, pass.

    Raises:
        Problem: the request comes from a page of another origin.
    """
    site = request.headers.get("sec-fetch-site")
    if site is None:  # no browser, or one of before 2023
        origin = request.headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    else:
        foreign = site not in ("same-origin", "none")
    if foreign:
        raise Problem(
            "foreign-origin",
            "the operating point is not changed for a page of another site; call the gateway directly or from its own page",
        )
