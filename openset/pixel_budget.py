"""Bounds the memory that a worker's decoding threads take together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """Images that are decoded side by side have at most so many pixels together; a larger one is decoded alone.

    A count of threads bounds nothing: a WebP of 2 KB may have forty million pixels, and Pillow takes 16 bytes for each.

    Args:
        pixels: of all images that are being decoded.
    """

    def __init__(self, pixels: int) -> None:
        self._pixels = pixels
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until an image of this size fits, and count it inside the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self._pixels)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()
