"""Who sends the load: this process, or several that share it, since one Python process cannot feed a GPU."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import Pool
from types import TracebackType
from typing import Any

from benchmarks.serving.load import Outcome, Target, closed_loop, open_loop, together
from serving.torchserve import die_with_parent

_HEAD_START_S = 0.5  # until every process has its share of the load


class Clients:
    """Generators of closed and open loops.

    Args:
        processes: 1 sends from this process.
    """

    def __init__(self, processes: int = 1) -> None:
        if processes < 1:
            raise ValueError(f"client processes must be at least 1, got {processes}")
        self.processes = processes
        self._pool: Pool | None = None

    def __enter__(self) -> Clients:
        """Start the processes."""
        if self.processes > 1:
            self._pool = multiprocessing.get_context("spawn").Pool(
                self.processes, initializer=die_with_parent
            )
            while len(set(self._pool.map(_who, range(4 * self.processes), 1))) < self.processes:
                pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        """End the processes, whatever they are doing."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()

    async def closed(
        self, target: Target, bodies: Sequence[bytes], *, connections: int, seconds: float
    ) -> Outcome:
        """``closed_loop`` with the connections spread over the processes."""
        if self._pool is None:
            return await closed_loop(target, bodies, connections=connections, seconds=seconds)
        shares = [len(range(i, connections, self.processes)) for i in range(self.processes)]
        return await self._spread(
            closed_loop,
            target,
            bodies,
            [{"connections": share, "seconds": seconds} for share in shares if share],
        )

    async def open(
        self,
        target: Target,
        bodies: Sequence[bytes],
        *,
        rate: float,
        seconds: float,
        timeout_s: float = 60.0,
    ) -> Outcome:
        """``open_loop`` with the requests dealt out in turn."""
        options = {"rate": rate, "seconds": seconds, "timeout_s": timeout_s}
        if self._pool is None:
            return await open_loop(target, bodies, **options)
        return await self._spread(
            open_loop,
            target,
            bodies,
            [{**options, "share": (i, self.processes)} for i in range(self.processes)],
        )

    async def _spread(
        self, loop: Callable[..., Any], target: Target, bodies: Sequence[bytes], shares: list[dict[str, Any]]
    ) -> Outcome:  # fmt: skip
        assert self._pool is not None
        events = asyncio.get_running_loop()
        future: asyncio.Future[list[Outcome]] = events.create_future()

        def done(result: Any) -> None:
            if future.done():  # cancelled meanwhile
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        def hand_over(result: Any) -> None:
            events.call_soon_threadsafe(done, result)

        # The clock is the system's monotonic one, the same in every process.
        start = time.perf_counter() + _HEAD_START_S
        work = [(loop, target, bodies, options, start) for options in shares]
        self._pool.starmap_async(_share, work, 1, callback=hand_over, error_callback=hand_over)
        return together(await future)


def _who(number: int) -> int:
    time.sleep(0.05)  # so that nobody takes all
    return os.getpid()


def _share(
    loop: Callable[..., Any], target: Target, bodies: Sequence[bytes], options: dict[str, Any], start: float
) -> Outcome:  # fmt: skip
    time.sleep(max(0.0, start - time.perf_counter()))
    outcome: Outcome = asyncio.run(loop(target, bodies, **options))
    return outcome
