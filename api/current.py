"""The current calibration, asked for at every request and never cached, yet one query serves many requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Coalesced(Generic[T]):
    """Runs a blocking read in a thread; whoever asks while one runs shares the *next* one.

    An answer therefore always comes from a read that began after the question: nobody sees a state older than his
    question, on any process.

    Args:
        read: the blocking read.
        timeout_s: after which the question fails with TimeoutError.
    """

    def __init__(self, read: Callable[[], T], timeout_s: float) -> None:
        self._read = read
        self._timeout_s = timeout_s
        self._next: asyncio.Future[T] | None = None
        self._running: asyncio.Task[None] | None = None

    async def get(self) -> T:
        """The value as of now or later."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            if self._running is None or self._running.done():
                self._running = asyncio.create_task(self._run())
        async with asyncio.timeout(self._timeout_s):
            return await asyncio.shield(self._next)

    async def _run(self) -> None:
        while self._next is not None:
            waiting, self._next = self._next, None
            try:
                result = await asyncio.to_thread(self._read)
            except Exception as error:  # handed to everyone who waits
                waiting.set_exception(error)
                waiting.exception()  # read once here: those who asked may have timed out
            else:
                waiting.set_result(result)
