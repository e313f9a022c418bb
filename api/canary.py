"""The gateway's own test image."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image


@cache
def canary_image() -> bytes:
    """A small grey PNG; any model can be asked about it."""
    stream = io.BytesIO()
    Image.new("L", (32, 32), 64).save(stream, "PNG")
    return stream.getvalue()
