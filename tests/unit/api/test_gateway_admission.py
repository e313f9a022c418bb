"""What cannot be answered in time is refused at once; the rest keeps its latency."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from api.admission import Admission
from api.problems import Problem
from tests.factories import image_bytes
from tests.stub_torchserve import StubTorchServe

PNG = {"content-type": "image/png"}


def test_places_are_deadline_times_throughput() -> None:
    admission = Admission(most=1000, deadline_s=10.0)
    for _ in range(100):
        admission.learn(position=4, seconds=0.4)  # ten answers a second, whoever waits
    admission.taken = 79  # the eightieth would be answered after 8 s of the 10 s
    admission.check()
    admission.taken = 80
    with pytest.raises(Problem, match=r"would take 8\.1 s") as refusal:
        admission.check()
    assert (refusal.value.slug, refusal.value.retry_after_s) == ("overloaded", 1)
    admission.taken = 200
    with pytest.raises(Problem) as refusal:
        admission.check()
    assert refusal.value.retry_after_s == 13  # (201 - 80) / 10


def test_pace_follows_the_answers() -> None:
    admission = Admission(most=1000, deadline_s=1.0)
    assert admission.seconds_an_answer is None
    admission.learn(position=1, seconds=2.0)
    assert admission.seconds_an_answer == 2.0
    for _ in range(200):
        admission.learn(position=8, seconds=0.08)
    assert admission.seconds_an_answer == pytest.approx(0.01)


def test_idle_gateway_admits_however_slow_the_model_was() -> None:
    admission = Admission(most=10, deadline_s=1.0)
    admission.learn(position=1, seconds=60.0)
    with admission.places():
        assert admission.taken == 1
        with pytest.raises(Problem):
            admission.check()
    assert admission.taken == 0


def test_places_of_a_batch_are_its_images_and_come_back_after_a_failure() -> None:
    admission = Admission(most=10, deadline_s=1.0)

    def failing() -> None:
        with admission.places(8):
            admission.check(2)
            admission.check(3)

    with pytest.raises(Problem, match="at most 10"):
        failing()
    assert admission.taken == 0


def held(gateway: httpx.AsyncClient, *, pace_s: float) -> asyncio.Event:
    """A model server that answers nobody before the event, and a gateway that has learnt this pace from it."""
    service = gateway.app.state.service  # type: ignore[attr-defined]
    working, released = service.backend._post, asyncio.Event()

    async def post(image: bytes, headers: dict[str, str]) -> Any:
        await released.wait()
        return await working(image, headers)

    service.backend._post = post
    service.admission.seconds_an_answer = pace_s
    return released


async def test_burst_is_served_up_to_the_deadline_and_refused_beyond_at_once(
    start_gateway: Any,
) -> None:
    gateway = await start_gateway(deadline_s=100.0, max_in_flight=1000)
    await gateway.get("/readyz")
    released = held(gateway, pace_s=5.0)
    answered: list[int] = []

    async def one() -> httpx.Response:
        reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
        answered.append(reply.status_code)
        return reply

    asked = [asyncio.create_task(one()) for _ in range(50)]
    while len(answered) < 34:  # 0.8 x 100 s / 5 s = 16 may wait
        await asyncio.sleep(0.01)
    assert set(answered) == {503}
    released.set()
    replies = await asyncio.gather(*asked)
    assert Counter(answered) == {503: 34, 200: 16}
    refusal = next(reply for reply in replies if reply.status_code == 503)
    assert refusal.json()["type"] == "/problems/overloaded"
    assert refusal.headers["retry-after"] == "5"  # one place too late
    assert (await one()).status_code == 200


async def test_canary_and_answers_teach_the_pace(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    admission = gateway.app.state.service.admission  # type: ignore[attr-defined]
    await gateway.get("/readyz")
    first = admission.seconds_an_answer
    assert first > 0
    await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert admission.seconds_an_answer != first
    assert (admission.taken, admission.at_model) == (0, 0)


async def test_batch_that_would_be_late_is_refused_whole(
    start_gateway: Any, stub: StubTorchServe
) -> None:
    gateway = await start_gateway(deadline_s=100.0)
    await gateway.get("/readyz")
    held(gateway, pace_s=10.0).set()
    asked = len(stub.requests)
    files = [("images", (f"{number}.png", image_bytes())) for number in range(20)]
    reply = await gateway.post("/predict/batch", files=files)
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/overloaded")
    assert len(stub.requests) == asked
    assert (await gateway.post("/predict/batch", files=files[:2])).status_code == 200


async def test_batch_takes_places_by_its_size_while_it_is_read(start_gateway: Any) -> None:
    gateway = await start_gateway(max_image_bytes=10_000, max_batch_bytes=100_000)
    settings = gateway.app.state.service.settings
    assert [settings.places_to_read(size) for size in ("", "100", "35000", "99999999")] == [
        10,
        1,
        4,
        10,
    ]
    files = [("images", ("a.png", b"x" * 120_000))]
    assert (await gateway.post("/predict/batch", files=files)).status_code == 413


async def test_deadline_that_passed_teaches_the_pace(start_gateway: Any) -> None:
    gateway = await start_gateway(deadline_s=0.3)
    admission = gateway.app.state.service.admission
    await gateway.get("/readyz")
    held(gateway, pace_s=0.001)
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert reply.status_code == 504
    assert admission.seconds_an_answer == pytest.approx(0.001 + 0.1 * (0.3 - 0.001))
    assert (admission.taken, admission.at_model) == (0, 0)
