"""What is measured of a running server, one function a claim."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.serving import bare
from benchmarks.serving.clients import Clients
from benchmarks.serving.load import QUANTILES, Outcome, Target
from benchmarks.serving.plan import Plan
from benchmarks.serving.processes import Running
from benchmarks.serving.report import Report, say
from openset.classifier import OpenSetClassifier

LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.5)
TOY_CONNECTIONS = (4, 8, 16)
BATCH_IMAGES = 16
_WARM_UP_SECONDS = 2.0

Measure = Callable[[float], Awaitable[float]]  # seconds it may take -> images a second


@dataclass(frozen=True)
class Bench:
    """What every measurement needs.

    Attributes:
        report: takes the rows.
        plan: times and options.
        images: files, sent in turn.
        clients: send them.
    """

    report: Report
    plan: Plan
    images: Sequence[bytes]
    clients: Clients

    async def closed(self, target: Target, seconds: float, connections: int | None = None) -> Outcome:  # fmt: skip
        """A closed loop with the plan's connections, or so many."""
        return await self.clients.closed(
            target,
            self.images,
            connections=connections or self.plan.connections,
            seconds=seconds,
        )

    async def throughput(self, target: Target) -> Outcome:
        """Closed loop at full load, after a warm-up."""
        await self.closed(target, min(_WARM_UP_SECONDS, self.plan.seconds))
        return await self.closed(target, self.plan.seconds)


def served(bench: Bench, target: Target) -> Measure:
    """Images a second of a server at full load."""

    async def measure(seconds: float) -> float:
        return (await bench.closed(target, seconds)).rate

    return measure


def in_batches(bench: Bench, target: Target) -> Measure:
    """Images a second through ``POST /predict/batch`` with as many images in flight as there are connections."""
    form = [
        _form([bench.images[(first + i) % len(bench.images)] for i in range(BATCH_IMAGES)])
        for first in range(0, max(len(bench.images), BATCH_IMAGES), BATCH_IMAGES)
    ]
    headers = {**target.headers, "content-type": "multipart/form-data; boundary=image"}
    batches = replace(target, path="/predict/batch", headers=headers, images=BATCH_IMAGES)
    requests = max(2, bench.plan.connections // BATCH_IMAGES)

    async def measure(seconds: float) -> float:
        outcome = await bench.clients.closed(batches, form, connections=requests, seconds=seconds)
        return outcome.rate * BATCH_IMAGES

    return measure


def _form(images: Sequence[bytes]) -> bytes:
    head = (
        b"--image\r\n"
        b'content-disposition: form-data; name="images"; filename="a.jpg"\r\n'
        b"content-type: image/jpeg\r\n\r\n"
    )
    return b"".join(head + image + b"\r\n" for image in images) + b"--image--\r\n"


def in_process(rate: Callable[[float], float]) -> Measure:
    """What is measured in this process; nothing else happens in it meanwhile."""

    async def measure(seconds: float) -> float:
        return rate(seconds)

    return measure


async def compared_rates(bench: Bench, measures: dict[str, Measure]) -> dict[str, list[float]]:
    """Images a second of each, in turn, round after round: whatever disturbs this machine disturbs all alike.

    Args:
        bench: rounds and seconds; takes the load average before every round.
        measures: by name; all their servers run meanwhile, the others idle.
    """
    seconds = bench.plan.seconds / 2
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        await measure(min(_WARM_UP_SECONDS, seconds) / 2)
    averages = bench.report.details.setdefault("load average before every round", [])
    for number in range(bench.plan.rounds):
        averages.append(round(os.getloadavg()[0], 2))
        say(f"images/s of {', '.join(rates)}: round {number + 1} of {bench.plan.rounds}")
        for name, measure in measures.items():
            rates[name].append(await measure(seconds))
    return rates


async def added_latency(
    bench: Bench, running: Running, classifier: OpenSetClassifier, what: str
) -> None:
    """Median through gateway and TorchServe minus that of the bare call, alternating."""
    seconds = bench.plan.seconds / 2 / bench.plan.rounds
    through: list[float] = []
    alone: list[float] = []
    for _ in range(bench.plan.rounds):
        outcome = await bench.closed(running.gateway, seconds, connections=1)
        through += outcome.seconds[outcome.good].tolist()
        alone += bare.call_seconds(classifier, bench.images, seconds=seconds)
    added = bare.median_ms(through) - bare.median_ms(alone) if through and alone else None
    bench.report.add(
        f"added p50 latency, 1 connection, {what}", None if added is None else round(added, 3), "ms",
        baseline=round(bare.median_ms(alone), 3) if alone else None, against="ms, bare call", aim="<= 6 ms",
        met=added is not None and added <= 6,
    )  # fmt: skip


async def load_curve(bench: Bench, target: Target, capacity: float, what: str) -> None:
    """Open loops at growing load."""
    if capacity <= 0:
        return
    curve = []
    for load in LOADS:
        say(f"open loop at {load:.0%} of capacity")
        outcome = await bench.clients.open(
            target, bench.images, rate=load * capacity, seconds=bench.plan.load_seconds, timeout_s=30
        )  # fmt: skip
        summary = outcome.summary(bench.plan.deadline_s)
        curve.append({"load": load, "offered": round(load * capacity, 3), **summary})
    bench.report.details.setdefault("latency against load", {})[what] = curve


def _finite_ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None


async def tail(bench: Bench, target: Target, capacity: float, what: str) -> None:
    """p99 / p50 and p99.9 at 70 % of capacity, where a request without a good answer takes for ever."""
    name, report = f"at 70 % of capacity, open loop, {what}", bench.report
    if capacity <= 0:
        report.add(
            f"p99 / p50 {name}", None, "ms", against="no answer at full load", aim="<= 2.5", met=False
        )  # fmt: skip
        return
    say("open loop at 70 % of capacity")
    outcome = await bench.clients.open(
        target, bench.images, rate=0.7 * capacity, seconds=bench.plan.tail_seconds
    )
    report.details[f"at 70 %, {what}"] = outcome.summary(bench.plan.deadline_s)
    p50, p99, p999 = (outcome.latency_of_all(QUANTILES[key]) for key in ("p50", "p99", "p99.9"))
    ratio = p99 / p50 if math.isfinite(p99) else None
    report.add(
        f"p99 / p50 {name}", _finite_ms(p99), "ms", baseline=_finite_ms(p50), against="ms, p50",
        ratio=None if ratio is None else round(ratio, 3), aim="<= 2.5", met=ratio is not None and ratio <= 2.5,
    )  # fmt: skip
    requests = f"of {len(outcome.statuses)} requests"
    report.add(f"   p99.9 {name}", _finite_ms(p999), "ms", against=requests)
    failures = int((~outcome.good).sum())
    report.add(
        f"   not answered with 200 {name}", failures, "requests", against=requests, aim="0", met=failures == 0
    )  # fmt: skip
    report.add(
        f"   generator's own lag, p99, {name}", outcome.lag_ms(0.99), "ms", against="part of the latencies"
    )  # fmt: skip


@contextlib.asynccontextmanager
async def _memory_watched(running: Running) -> AsyncIterator[list[int]]:
    """Bytes in use, once a second, looked up beside the event loop that sends."""
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(running.memory_bytes))
            await asyncio.sleep(1.0)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def overload(bench: Bench, running: Running, capacity: float, what: str) -> None:
    """Three times the capacity: goodput, refusals, silence, memory."""
    plan, report = bench.plan, bench.report
    name = f"at 300 % of capacity, {what}"
    if capacity <= 0:
        report.add(f"goodput {name}", None, "images/s", against="no answer at full load", aim=">= 0.9", met=False)  # fmt: skip
        return
    say(f"open loop at 300 % of capacity for {plan.overload_seconds:g} s")
    cpu = running.cpu_seconds()
    async with _memory_watched(running) as memory:
        outcome = await bench.clients.open(
            running.gateway, bench.images, rate=3 * capacity, seconds=plan.overload_seconds
        )
    cpu = running.cpu_seconds() - cpu
    goodput = outcome.goodput(plan.deadline_s)
    refusal = outcome.latency(0.5, of=outcome.refused)
    silent = int((~outcome.good & ~outcome.refused).sum())
    quarter = max(1, len(memory) // 4)
    first, last = np.median(memory[:quarter] or [1]), np.median(memory[-quarter:] or [1])
    report.details[f"at 300 %, {what}"] = {
        **outcome.summary(plan.deadline_s),
        "deadline_s": plan.deadline_s,
        "cpu_seconds_of_the_server": round(cpu, 2),
        "memory_mb": [round(value / 2**20) for value in memory],
    }
    report.ratio(f"goodput {name}", goodput, "images/s", capacity, "capacity", at_least=0.9)
    # Without a refusal there is nothing to say about how fast they are.
    report.add(
        f"   refusals, median, {name}", None if refusal is None else round(refusal * 1e3, 3), "ms",
        against=f"of {int(outcome.refused.sum())} refusals", aim="< 50 ms", met=None if refusal is None else refusal < 0.05,
    )  # fmt: skip
    report.add(
        f"   answered neither 200 nor 503, {name}", silent, "requests", aim="0", met=silent == 0
    )
    report.add(
        f"   memory, last quarter against first, {name}", round(last / 2**20, 1), "MB", baseline=round(first / 2**20, 1),
        against="MB", ratio=round(float(last / first), 3), aim="<= 1.05", met=bool(last <= 1.05 * first),
    )  # fmt: skip


async def calibrate_time(bench: Bench, target: Target, scores: int, what: str) -> None:
    """Median of ``POST /calibrate`` with a target that was not asked for before."""
    taken = []
    async with target.session(60.0) as session:
        for number in range(20 * bench.plan.rounds):
            started = time.perf_counter()
            url = f"/calibrate?fpr={0.01 + number * 1e-4:.4f}"
            async with session.post(url) as response:
                response.raise_for_status()
                await response.read()
            taken.append(time.perf_counter() - started)
        async with session.post("/calibrate?fpr=0.01") as response:
            response.raise_for_status()
    value = bare.median_ms(taken)
    bench.report.add(
        f"POST /calibrate with {scores} calibration scores, median, {what}", round(value, 3), "ms", aim="<= 20 ms",
        met=value <= 20,
    )  # fmt: skip


async def gateway_share(bench: Bench, running: Running) -> None:
    """Requests a second through the gateway against TorchServe's own socket, alternating, toy model.

    Beside them what a request costs: processor time of each part of the stack.
    """
    seconds = bench.plan.seconds / 2 / bench.plan.rounds
    for connections in TOY_CONNECTIONS:
        rates: dict[str, list[float]] = {"gateway": [], "torchserve": []}
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in rates}
        for _ in range(bench.plan.rounds):
            for name, of in rates.items():
                before = running.cpu_seconds_by_part()
                outcome = await bench.closed(getattr(running, name), seconds, connections)
                after = running.cpu_seconds_by_part()
                of.append(outcome.rate)
                a_request = 1e3 / max(1, len(outcome.seconds))
                costs[name].append(
                    {part: a_request * (after[part] - before[part]) for part in after}
                )
        bench.report.details[f"processor ms a request, toy model, {connections} connections"] = {
            name: {part: round(float(np.median([cost[part] for cost in of])), 3) for part in of[0]}
            for name, of in costs.items()
        }
        bench.report.ratio(
            f"requests/s, toy model, {connections} connections", float(np.median(rates["gateway"])), "1/s",
            float(np.median(rates["torchserve"])), "TorchServe alone", at_least=0.85,
        )  # fmt: skip
