"""The current calibration, asked for at every request and never stale, yet one query serves many requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

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


class Unchanged(Generic[T]):
    """Keeps a value for as long as the store itself says, at every question, that nothing was committed since.

    Args:
        version: a number that changes with every commit, or None where the store cannot tell cheaply.
        read: reads the value anew.
    """

    def __init__(self, version: Callable[[], int | None], read: Coalesced[T]) -> None:
        self._version = version
        self._read = read
        self._known: tuple[int | None, T] | None = None

    def is_current(self) -> bool:
        """Whether ``value`` is what a read would find now."""
        return self._known is not None and self._known[0] == self._version() is not None

    @property
    def value(self) -> T:
        """The value of the last read."""
        assert self._known is not None
        return self._known[1]

    async def renewed(self) -> T:
        """The value as of now or later, read from the store."""
        version = (
            self._version()
        )  # before the read: a commit in between makes the next question read again
        value = await self._read.get()
        self._known = (version, value)
        return value


class SingleFlight(Generic[T]):
    """Asks one question at a time; whoever wants the answer while it is under way shares it, also where it is an error.

    Args:
        ask: the question.
    """

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._ask = ask
        self._running: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """The answer; a client that leaves takes it from nobody else."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._ask())
            self._running.add_done_callback(_looked_at)
        return await asyncio.shield(self._running)

    def cancel(self) -> None:
        """Give the question up."""
        if self._running is not None:
            self._running.cancel()


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Those who asked may all have left; an error that nobody fetched would be logged as a fault of ours."""
    if not task.cancelled():
        task.exception()
