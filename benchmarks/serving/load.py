"""Load on an HTTP address: closed loop (a fixed number of connections) and open loop (a fixed arrival rate).

In the open loop a request's latency counts from the moment it was *due*, whatever became of those before it: a server
that stalls is charged for everyone who would have come meanwhile (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from numpy.typing import NDArray

NO_ANSWER = 0
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Attributes:
        url: of the server, e.g. "http://127.0.0.1:8000"; with a socket only its path prefix counts.
        path: of the call, with its query.
        socket: Unix socket to connect to instead of the host in ``url``.
        headers: of every request.
        images: in a request; more than one make it a batch, which is good when every image of it is.
    """

    url: str
    path: str = "/predict"
    socket: Path | None = None
    headers: dict[str, str] = field(
        default_factory=lambda: {"content-type": "application/octet-stream"}
    )
    images: int = 1

    def session(self, timeout_s: float) -> aiohttp.ClientSession:
        """A client without a limit of connections; must be made inside a running loop."""
        connector = (
            aiohttp.TCPConnector(limit=0)
            if self.socket is None
            else aiohttp.UnixConnector(str(self.socket.resolve()), limit=0)
        )
        return aiohttp.ClientSession(
            self.url, connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s)
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of one load.

    Attributes:
        due: when each request was due, seconds after the start, (N,).
        seconds: from due to the whole answer, (N,).
        statuses: HTTP status of each, or ``NO_ANSWER``, (N,).
        duration_s: of the load.
        lag: seconds from due until the generator really sent it, (N,): its own part of ``seconds``; of an open loop.
    """

    due: NDArray[np.float64]
    seconds: NDArray[np.float64]
    statuses: NDArray[np.int64]
    duration_s: float
    lag: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which requests were answered with 200, (N,)."""
        good: NDArray[np.bool_] = self.statuses == 200
        return good

    @property
    def rate(self) -> float:
        """Answers with 200 a second."""
        return float(self.good.sum()) / self.duration_s

    def goodput(self, deadline_s: float) -> float:
        """Answers with 200 within the deadline, a second."""
        return float((self.good & (self.seconds <= deadline_s)).sum()) / self.duration_s

    def latency(self, quantile: float, *, of: NDArray[np.bool_] | None = None) -> float | None:
        """Quantile of the latency in seconds, of the good answers or of a mask; None without any."""
        values = self.seconds[self.good if of is None else of]
        return float(np.quantile(values, quantile)) if len(values) else None

    def latency_of_all(self, quantile: float) -> float:
        """Quantile of the latency of all requests in seconds, where what is not answered with 200 takes for ever."""
        seconds = np.sort(np.where(self.good, self.seconds, np.inf))
        return (
            float(seconds[math.ceil(quantile * (len(seconds) - 1))]) if len(seconds) else math.inf
        )

    def lag_ms(self, quantile: float) -> float | None:
        """Quantile of the generator's own lag in milliseconds; None for a closed loop."""
        return round(float(np.quantile(self.lag, quantile)) * 1e3, 3) if len(self.lag) else None

    @property
    def refused(self) -> NDArray[np.bool_]:
        """Which requests were refused with 503, (N,)."""
        refused: NDArray[np.bool_] = self.statuses == 503
        return refused

    def summary(self, deadline_s: float) -> dict[str, object]:
        """Plain values for JSON; milliseconds and requests a second."""
        return {
            "requests": len(self.statuses),
            "seconds": round(self.duration_s, 3),
            "rate": round(self.rate, 3),
            "goodput": round(self.goodput(deadline_s), 3),
            "statuses": {str(key): count for key, count in Counter(self.statuses.tolist()).items()},
            **{
                f"{name}_ms": None if (value := self.latency(q)) is None else round(value * 1e3, 3)
                for name, q in QUANTILES.items()
            },
            **(
                {"generator_lag_p99_ms": self.lag_ms(0.99), "generator_lag_max_ms": self.lag_ms(1)}
                if len(self.lag)
                else {}
            ),
        }


def outcome_of(records: Sequence[tuple[float, ...]], duration_s: float) -> Outcome:
    """From (due, seconds, status), and in an open loop the lag, of each request."""
    due, seconds, statuses, *lag = zip(*records, strict=True) if records else ((), (), ())
    return Outcome(
        np.array(due, float),
        np.array(seconds, float),
        np.array(statuses, int),
        duration_s,
        np.array(lag[0] if lag else (), float),
    )


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Several generators' shares of one load."""
    return Outcome(
        *(
            np.concatenate([getattr(outcome, name) for outcome in outcomes])
            for name in ("due", "seconds", "statuses")
        ),
        max(outcome.duration_s for outcome in outcomes),
        np.concatenate([outcome.lag for outcome in outcomes]),
    )


async def _post(session: aiohttp.ClientSession, target: Target, body: bytes) -> tuple[int, float]:
    """Status, and after how many seconds the server wants to be asked again."""
    try:
        async with session.post(target.path, data=body, headers=target.headers) as response:
            answer = await response.read()
            later = response.headers.get("retry-after", "")
            status = response.status
            if status == 200 and target.images > 1:
                status = _status_of_batch(answer)
            return status, float(later) if later.isdecimal() else 0.0
    except (aiohttp.ClientError, OSError, TimeoutError):
        return NO_ANSWER, 0.0


def _status_of_batch(answer: bytes) -> int:
    """200 if every image of the batch has it, else the first other."""
    statuses = [item["status"] for item in json.loads(answer)["results"]]
    return next((int(status) for status in statuses if status != 200), 200)


async def closed_loop(
    target: Target,
    bodies: Sequence[bytes],
    *,
    connections: int,
    seconds: float,
    timeout_s: float = 60.0,
) -> Outcome:
    """Each connection sends its next request when the last is answered; what is in flight at the end is waited for.

    A connection that is refused waits as long as it is told to: without that a closed loop hammers. The rate counts the
    time until the last answer, so that no work is counted for free.
    """
    records: list[tuple[float, ...]] = []
    following = itertools.cycle(bodies)
    async with target.session(timeout_s) as session:
        started = time.perf_counter()

        async def one_client() -> None:
            while (sent := time.perf_counter()) - started < seconds:
                status, later_s = await _post(session, target, next(following))
                records.append((sent - started, time.perf_counter() - sent, status))
                if later_s:
                    await asyncio.sleep(later_s)

        await asyncio.gather(*(one_client() for _ in range(connections)))
        return outcome_of(records, time.perf_counter() - started)


async def open_loop(
    target: Target,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    timeout_s: float = 60.0,
    share: tuple[int, int] = (0, 1),
) -> Outcome:
    """Send ``rate`` requests a second, evenly spaced, whether or not earlier ones were answered.

    Args:
        target: where to.
        bodies: sent in turn.
        rate: requests a second, > 0.
        seconds: how long requests are due; their answers are waited for.
        timeout_s: a request without an answer after this counts as ``NO_ANSWER``.
        share: (i, n): this generator sends every n-th request from the i-th on; n of them make the whole load.
    """
    records: list[tuple[float, ...]] = []
    first, step = share
    async with target.session(timeout_s) as session, asyncio.TaskGroup() as tasks:
        started = time.perf_counter()

        async def one(due: float, body: bytes) -> None:
            lag = time.perf_counter() - started - due
            status, _ = await _post(session, target, body)
            records.append((due, time.perf_counter() - started - due, status, lag))

        for number in range(first, max(1, round(rate * seconds)), step):
            due = number / rate
            if (early := started + due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            tasks.create_task(one(due, bodies[number % len(bodies)]))
    # What is still queued when the last request was due belongs to the time it takes.
    return outcome_of(records, max(seconds, time.perf_counter() - started))
