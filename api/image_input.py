"""Uploads: bounded in bytes, time and pixels, checked by their header, before anything else is done."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import PIL
from fastapi import Request
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from api.problems import Problem
from api.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_SIDE = 30_000


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body, counted while it arrives: Content-Length may lie.

    Raises:
        Problem: encoded, too large, too slow or broken off.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported-type", "send the image without Content-Encoding")
    declared = request.headers.get("content-length", "")
    too_large = Problem("too-large", f"at most {limit} bytes are accepted", max_bytes=limit)
    if declared.isdecimal() and int(declared) > limit:
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
    if not image:
        raise Problem("unreadable-image", "expected an image, got an empty body")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                width, height = opened.size
    except PIL.UnidentifiedImageError as error:
        raise Problem(
            "unreadable-image",
            f"expected an image of type {', '.join(FORMATS)}, got something else",
        ) from error
    except Image.DecompressionBombError as error:
        raise Problem(
            "unreadable-image",
            f"the image declares too many pixels, at most {max_pixels} are accepted",
        ) from error
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise Problem("unreadable-image", "the image header is broken") from error
    if width * height > max_pixels or max(width, height) > _MAX_SIDE or not width * height:
        raise Problem(
            "unreadable-image",
            f"the image is {width}x{height}; at most {max_pixels} pixels and {_MAX_SIDE} a side are accepted",
        )
