"""The load generator: what it counts, and that a stall is charged to everyone who would have come meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmarks.serving.clients import Clients
from benchmarks.serving.load import NO_ANSWER, Outcome, Target, closed_loop, open_loop
from benchmarks.serving.report import Report

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[Target]]]:
    """``await serve(handler)`` -> target of a server on loopback."""
    runners = []

    async def start(handler: Handler) -> Target:
        app = web.Application()
        app.router.add_post("/predict", handler)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return Target(f"http://127.0.0.1:{port}")

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_open_loop_charges_a_stall_to_everyone_who_was_due_meanwhile(serve: Any) -> None:
    arrived, released = 0, asyncio.Event()

    async def stalling(request: web.Request) -> web.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 40:
            released.set()
        await released.wait()
        return web.Response()

    outcome = await open_loop(await serve(stalling), [b"x"], rate=100, seconds=0.5)
    assert len(outcome.statuses) == 50
    # Whoever was due before the release waited for it at least; the first was due 39 places before it.
    order = np.argsort(outcome.due)
    due, seconds = outcome.due[order], outcome.seconds[order]
    assert (due[:40] + seconds[:40] >= due[39]).all()
    assert seconds[0] >= 0.39


async def test_closed_loop_sends_nothing_while_its_connection_waits(serve: Any) -> None:
    first = True

    async def stalling(request: web.Request) -> web.Response:
        nonlocal first
        if first:
            first = False
            await asyncio.sleep(0.3)
        return web.Response()

    outcome = await closed_loop(await serve(stalling), [b"x"], connections=1, seconds=0.5)
    assert outcome.seconds[0] >= 0.3
    assert int((outcome.due < outcome.seconds[0]).sum()) == 1


async def test_closed_loop_keeps_to_its_connections_and_sends_every_body(serve: Any) -> None:
    now, most = 0, 0
    seen: set[bytes] = set()

    async def counting(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        seen.add(await request.read())
        await asyncio.sleep(0.01)
        now -= 1
        return web.Response()

    outcome = await closed_loop(await serve(counting), [b"a", b"b", b"c"], connections=4, seconds=0.5)  # fmt: skip
    assert most == 4
    assert seen == {b"a", b"b", b"c"}
    assert outcome.rate == pytest.approx(len(outcome.statuses) / outcome.duration_s)


async def test_refusals_and_silence_are_counted_apart(serve: Any) -> None:
    number = 0

    async def mixed(request: web.Request) -> web.StreamResponse:
        nonlocal number
        number += 1
        if number % 3 == 1:
            await asyncio.sleep(30)
        return web.Response(status=503 if number % 3 == 2 else 200)

    outcome = await open_loop(await serve(mixed), [b"x"], rate=30, seconds=0.3, timeout_s=1.0)
    assert outcome.statuses.tolist().count(NO_ANSWER) == 3
    assert int(outcome.refused.sum()) == 3
    assert int(outcome.good.sum()) == 3


def test_goodput_counts_good_answers_within_the_deadline() -> None:
    outcome = Outcome(
        due=np.zeros(4),
        seconds=np.array([0.1, 0.2, 5.0, 0.1]),
        statuses=np.array([200, 200, 200, 503]),
        duration_s=2.0,
    )
    assert outcome.rate == 1.5
    assert outcome.goodput(1.0) == 1.0
    assert outcome.latency(0.5) == 0.2
    assert outcome.latency(0.5, of=outcome.refused) == 0.1
    assert outcome.summary(1.0)["statuses"] == {"200": 3, "503": 1}


def test_ratio_is_met_or_missed(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.ratio("a", 2.0, "1/s", 1.0, "plain", at_least=1.15)
    report.ratio("b", 1.0, "1/s", 1.0, "plain", at_least=1.15)
    report.add("c", None, "1/s", aim=">= 2", command="make bench DEVICE=cuda")
    assert [row.met for row in report.rows] == [True, False, None]
    said = capsys.readouterr().out
    assert "MISSED" in said
    assert "make bench DEVICE=cuda" in said


def test_ratio_without_a_baseline_is_missed_and_no_error() -> None:
    report = Report()
    report.ratio("a", 2.0, "1/s", 0.0, "dead", at_least=1.15)
    assert (report.rows[0].ratio, report.rows[0].met) == (None, False)


def test_quantile_of_all_counts_failures_as_endless() -> None:
    outcome = Outcome(
        due=np.zeros(100),
        seconds=np.linspace(0.1, 0.2, 100),
        statuses=np.array([200] * 98 + [503] * 2),
        duration_s=1.0,
    )
    assert outcome.latency_of_all(0.5) == pytest.approx(0.15, abs=0.002)
    assert outcome.latency_of_all(0.99) == np.inf
    assert outcome.latency(0.99) is not None


async def test_lag_of_the_generator_is_told_apart(serve: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        time.sleep(0.05)  # the generator shares this event loop and is held up with it
        return web.Response()

    outcome = await open_loop(await serve(handler), [b"x"], rate=100, seconds=0.3)
    lag = outcome.lag_ms(1)
    assert lag is not None
    assert lag > 40
    assert (outcome.seconds >= outcome.lag).all()


async def test_several_processes_send_one_load_together(serve: Any) -> None:
    seen: list[float] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(asyncio.get_running_loop().time())
        return web.Response()

    target = await serve(handler)
    with Clients(2) as clients:
        loaded = await clients.open(target, [b"x"], rate=40, seconds=0.5)
        closed = await clients.closed(target, [b"x"], connections=3, seconds=0.3)
    assert len(loaded.statuses) == 20
    np.testing.assert_allclose(np.sort(loaded.due), np.arange(20) / 40)
    assert loaded.good.all()
    assert closed.good.all()
    assert len(seen) == 20 + len(closed.statuses)
