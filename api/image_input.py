"""Uploads: bounded in bytes, time and pixels, checked by their header, before anything else is done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from api.problems import Problem
from api.settings import Settings
from openset.image_headers import UnreadableImage, read_header


def declared_size(request: Request) -> int | None:
    """Content-Length in bytes; None where it is missing or no number. Chunked bodies have none."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else None


def size_to_expect(request: Request, limit: int) -> int:
    """Bytes that the body may bring, at most ``limit``: reading stops there."""
    declared = declared_size(request)
    return limit if declared is None else min(declared, limit)


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body, counted while it arrives: Content-Length may lie.

    Raises:
        Problem: encoded, too large, too slow or broken off.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported-type", "send the image without Content-Encoding")
    declared = declared_size(request)
    too_large = Problem("too-large", f"at most {limit} bytes are accepted", max_bytes=limit)
    if declared is not None and declared > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError as error:
        raise Problem("slow-upload", f"the body did not arrive within {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise Problem("incomplete-body", "the upload broke off") from error
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def read_images(
    request: Request, settings: Settings, *, field: str, most: int
) -> list[bytes]:
    """The images of a request: a raw body or multipart parts named ``field``.

    Raises:
        Problem: another type, no image, too many or too large.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        limit = settings.max_form_bytes(most)
        body = await read_body(request, limit, settings.read_timeout_s)
        images = await _from_form(request, body, field, most)
        for image in images:
            if len(image) > settings.max_image_bytes:
                limit_bytes = settings.max_image_bytes
                raise Problem(
                    "too-large",
                    f"at most {limit_bytes} bytes an image are accepted",
                    max_bytes=limit_bytes,
                )
        return images
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return [await read_body(request, settings.max_image_bytes, settings.read_timeout_s)]
    raise Problem(
        "unsupported-type",
        f"expected image/*, application/octet-stream or multipart/form-data with the field {field!r}, "
        f"got {media_type or 'no Content-Type'}",
    )


async def _from_form(request: Request, body: bytes, field: str, most: int) -> list[bytes]:
    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    receive: Callable[[], Awaitable[Any]] = replay
    copy = Request(request.scope, receive)
    try:
        async with copy.form(max_files=most, max_fields=8, max_part_size=65_536) as form:
            parts = [part for part in form.getlist(field) if isinstance(part, UploadFile)]
            images = [await part.read() for part in parts]
    except (HTTPException, MultiPartException, ValueError, KeyError) as error:
        detail = (
            getattr(error, "detail", None) or getattr(error, "message", None) or "malformed form"
        )
        raise Problem(
            "bad-request",
            f"the form could not be read ({detail}); at most {most} files are accepted",
        ) from error
    if not images:
        raise Problem("bad-request", f"expected a file in the form field {field!r}, got none")
    return images


def check_header(image: bytes, max_pixels: int) -> None:
    """Type and size of an image, from its header alone; the handler decodes it.

    Raises:
        Problem: empty, another format, broken header or too many pixels.
    """
    try:
        read_header(image, max_pixels=max_pixels)
    except UnreadableImage as error:
        raise Problem("unreadable-image", str(error)) from error
