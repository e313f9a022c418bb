"""What is measured of a running server, one function a claim."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np

from benchmarks.serving import bare
from benchmarks.serving.load import QUANTILES, Outcome, Target, closed_loop, open_loop
from benchmarks.serving.processes import Running
from benchmarks.serving.report import Report, say
from openset.classifier import OpenSetClassifier

CONNECTIONS = 16
LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.5)
TOY_CONNECTIONS = (4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """How long everything takes, in seconds, and with what.

    Attributes:
        seconds: of one closed loop.
        rounds: of measurements that alternate with their baseline.
        load_seconds: of one point of the load curve.
        tail_seconds: at 70 %.
        overload_seconds: at 300 %.
        deadline_s: the gateway's, and that of goodput.
    """

    device: str
    precision: str
    compiled: bool
    network: str
    batch_size: int
    workers: int
    seconds: float
    rounds: int
    load_seconds: float
    tail_seconds: float
    overload_seconds: float
    deadline_s: float


async def throughput(target: Target, images: Sequence[bytes], plan: Plan) -> Outcome:
    """Closed loop at full load, after a warm-up."""
    await closed_loop(target, images, connections=CONNECTIONS, seconds=min(2.0, plan.seconds))
    return await closed_loop(target, images, connections=CONNECTIONS, seconds=plan.seconds)


async def compared_rates(
    targets: dict[str, Target],
    in_process: dict[str, Callable[[float], float]],
    images: Sequence[bytes],
    plan: Plan,
) -> dict[str, list[float]]:
    """Images a second of each, in turn, round after round: whatever disturbs this machine disturbs all alike.

    Args:
        targets: servers, by name; all run meanwhile, the others idle.
        in_process: by name, what measures a rate in this process in so many seconds.
        images: sent in turn.
        plan: rounds and seconds.
    """
    seconds = plan.seconds / 2
    rates: dict[str, list[float]] = {name: [] for name in (*targets, *in_process)}
    for target in targets.values():
        await closed_loop(target, images, connections=CONNECTIONS, seconds=min(2.0, seconds))
    for number in range(plan.rounds):
        say(f"images/s of {', '.join(rates)}: round {number + 1} of {plan.rounds}")
        for name, target in targets.items():
            outcome = await closed_loop(target, images, connections=CONNECTIONS, seconds=seconds)
            rates[name].append(outcome.rate)
        for name, measure in in_process.items():
            rates[name].append(measure(seconds))
    return rates


async def batch_rate(target: Target, images: Sequence[bytes], plan: Plan) -> float:
    """Images a second through ``POST /predict/batch``, 16 in a request, 2 requests at a time."""
    size, done = 16, 0
    async with target.session(60.0) as session:
        started = time.perf_counter()

        async def one_client() -> None:
            nonlocal done
            while time.perf_counter() - started < plan.seconds:
                form = aiohttp.FormData()
                for number in range(size):
                    form.add_field("images", images[(done + number) % len(images)], filename="a.jpg")  # fmt: skip
                async with session.post("/predict/batch", data=form) as response:
                    body = await response.json(content_type=None)
                    done += sum(item["status"] == 200 for item in body.get("results", []))
                    refused = response.status != 200
                if refused:
                    await asyncio.sleep(0.1)

        await asyncio.gather(one_client(), one_client())
        return done / (time.perf_counter() - started)


async def added_latency(
    report: Report, running: Running, classifier: OpenSetClassifier, images: Sequence[bytes], plan: Plan, what: str
) -> None:  # fmt: skip
    """Median through gateway and TorchServe minus that of the bare call, alternating."""
    through: list[float] = []
    alone: list[float] = []
    for _ in range(plan.rounds):
        outcome = await closed_loop(
            running.gateway, images, connections=1, seconds=plan.seconds / plan.rounds
        )
        through += outcome.seconds[outcome.good].tolist()
        alone += bare.call_seconds(classifier, images, seconds=plan.seconds / plan.rounds)
    value, baseline = bare.median_ms(through), bare.median_ms(alone)
    report.add(
        f"added p50 latency, 1 connection, {what}", round(value - baseline, 3), "ms",
        baseline=round(baseline, 3), against="ms, bare call", ratio=None, aim="<= 6 ms", met=value - baseline <= 6,
    )  # fmt: skip


async def load_curve(
    report: Report, target: Target, images: Sequence[bytes], capacity: float, plan: Plan
) -> None:
    """Open loops at growing load."""
    curve = []
    for load in LOADS:
        say(f"open loop at {load:.0%} of capacity")
        outcome = await open_loop(
            target, images, rate=load * capacity, seconds=plan.load_seconds, timeout_s=30
        )
        curve.append(
            {
                "load": load,
                "offered": round(load * capacity, 3),
                **outcome.summary(plan.deadline_s),
            }
        )
    report.details["latency against load"] = curve


async def tail(
    report: Report, target: Target, images: Sequence[bytes], capacity: float, plan: Plan, what: str
) -> None:  # fmt: skip
    """p99 / p50 at 70 % of capacity."""
    say("open loop at 70 % of capacity")
    outcome = await open_loop(target, images, rate=0.7 * capacity, seconds=plan.tail_seconds)
    quantiles = {
        name: (outcome.latency(quantile) or 0) * 1e3 for name, quantile in QUANTILES.items()
    }
    report.details[f"at 70 %, {what}"] = outcome.summary(plan.deadline_s)
    ratio = quantiles["p99"] / quantiles["p50"] if quantiles["p50"] else float("inf")
    report.add(
        f"p99 / p50 at 70 % of capacity, open loop, {what}", round(quantiles["p99"], 3), "ms",
        baseline=round(quantiles["p50"], 3), against="ms, p50", ratio=round(ratio, 3), aim="<= 2.5", met=ratio <= 2.5,
    )  # fmt: skip


async def overload(
    report: Report, running: Running, images: Sequence[bytes], capacity: float, plan: Plan, what: str
) -> None:  # fmt: skip
    """Three times the capacity: goodput, refusals, silence, memory."""
    say(f"open loop at 300 % of capacity for {plan.overload_seconds:g} s")
    memory: list[int] = []

    async def watch() -> None:
        memory.append(running.memory_bytes())

    cpu = running.cpu_seconds()
    outcome = await open_loop(
        running.gateway, images, rate=3 * capacity, seconds=plan.overload_seconds, every_second=watch
    )  # fmt: skip
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
    report.ratio(
        f"goodput at 300 % of capacity, {what}", goodput, "images/s", capacity, "capacity", at_least=0.9
    )  # fmt: skip
    report.add(
        "   refusals, median", None if refusal is None else round(refusal * 1e3, 3), "ms",
        aim="< 50 ms", met=refusal is not None and refusal < 0.05,
    )  # fmt: skip
    report.add("   answered neither 200 nor 503", silent, "requests", aim="0", met=silent == 0)
    report.add(
        "   memory, last quarter against first", round(last / 2**20, 1), "MB", baseline=round(first / 2**20, 1),
        against="MB", ratio=round(float(last / first), 3), aim="<= 1.05", met=bool(last <= 1.05 * first),
    )  # fmt: skip


async def calibrate_time(report: Report, target: Target, plan: Plan, scores: int) -> None:
    """Median of ``POST /calibrate`` with a target that was not asked for before."""
    taken = []
    async with target.session(60.0) as session:
        for number in range(20 * plan.rounds):
            started = time.perf_counter()
            url = f"/calibrate?fpr={0.01 + number * 1e-4:.4f}"
            async with session.post(url) as response:
                response.raise_for_status()
                await response.read()
            taken.append(time.perf_counter() - started)
        async with session.post("/calibrate?fpr=0.01") as response:
            response.raise_for_status()
    value = bare.median_ms(taken)
    report.add(
        f"POST /calibrate with {scores} calibration scores, median", round(value, 3), "ms", aim="<= 20 ms",
        met=value <= 20,
    )  # fmt: skip


async def gateway_share(report: Report, running: Running, images: Sequence[bytes], plan: Plan) -> None:  # fmt: skip
    """Requests a second through the gateway against TorchServe's own socket, alternating, toy model."""
    for connections in TOY_CONNECTIONS:
        rates: dict[str, list[float]] = {"gateway": [], "torchserve": []}
        for _ in range(plan.rounds):
            for name, of in rates.items():
                target = getattr(running, name)
                of.append(
                    (
                        await closed_loop(
                            target,
                            images,
                            connections=connections,
                            seconds=plan.seconds / plan.rounds,
                        )
                    ).rate
                )
        report.ratio(
            f"requests/s, toy model, {connections} connections", float(np.median(rates["gateway"])), "1/s",
            float(np.median(rates["torchserve"])), "TorchServe alone", at_least=0.85,
        )  # fmt: skip
