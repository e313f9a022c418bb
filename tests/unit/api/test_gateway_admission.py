"""What cannot be answered in time is refused at once; the rest keeps its latency."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from api.admission import Admission
from api.problems import Problem
from api.settings import Settings
from tests.factories import image_bytes
from tests.stub_torchserve import StubTorchServe

PNG = {"content-type": "image/png"}


def admission_of(*, most: int, deadline_s: float) -> Admission:
    return Admission(most=most, most_bytes=1_000, deadline_s=deadline_s)


def test_places_are_deadline_times_throughput() -> None:
    admission = admission_of(most=1000, deadline_s=10.0)
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
    admission = admission_of(most=1000, deadline_s=1.0)
    assert admission.seconds_an_answer is None
    admission.learn(position=1, seconds=2.0)
    assert admission.seconds_an_answer == 2.0
    for _ in range(20):
        admission.learn(position=8, seconds=0.08)
    assert admission.seconds_an_answer == pytest.approx(0.01)
    for _ in range(20):
        admission.learn(position=8, seconds=0.8)
    assert admission.seconds_an_answer == pytest.approx(0.1)


def test_one_slow_answer_does_not_close_the_gateway() -> None:
    admission = admission_of(most=1000, deadline_s=10.0)
    admission.learn(position=1, seconds=30.0)
    admission.learn(position=1, seconds=0.01)
    admission.taken = 100
    admission.check()  # the first answer alone was slow
    for _ in range(20):
        admission.learn(position=1, seconds=0.01)
    admission.learn(position=1, seconds=30.0)
    admission.check()


def test_batch_that_no_idle_gateway_would_take_is_told_how_many_fit() -> None:
    admission = admission_of(most=1000, deadline_s=10.0)
    admission.learn(position=1, seconds=1.0)
    with pytest.raises(Problem, match="at most 8 at a time") as refusal:
        admission.check(9)
    assert (refusal.value.status, refusal.value.retry_after_s) == (413, None)
    assert refusal.value.facts == {"max_images": 8}
    admission.check(8)
    admission.taken = 1
    with pytest.raises(Problem) as refusal:
        admission.check(8)
    assert (refusal.value.status, refusal.value.retry_after_s) == (503, 1)


def test_model_server_that_has_healed_is_asked_again_by_whoever_sends_batches_alone() -> None:
    now = 0.0
    admission = Admission(most=1000, most_bytes=1_000, deadline_s=10.0, clock=lambda: now)
    for position in range(1, 33):
        admission.learn(position, seconds=10.0)  # a batch of 32 that met a worker that hung
    with pytest.raises(Problem) as refusal:
        admission.check(32)
    assert refusal.value.status == 413
    admission.taken = 1
    now = 31.0
    with pytest.raises(Problem):  # a pace is doubted by an idle gateway alone
        admission.check(32)
    admission.taken = 0
    admission.check(32)
    for position in (1, 2):  # two answers at the new pace are enough
        admission.learn(position, seconds=0.03 * position)
    admission.check(32)


def test_bytes_are_a_budget_beside_the_places_and_come_back_after_a_failure() -> None:
    admission = admission_of(most=1000, deadline_s=10.0)

    def failing() -> None:
        with admission.upload(600):
            with admission.upload(400):
                assert admission.bytes_taken == 1_000
            with admission.upload(401):
                pytest.fail("beyond the budget")

    with pytest.raises(Problem, match="uploads of 600 bytes") as refusal:
        failing()
    assert (refusal.value.slug, refusal.value.retry_after_s) == ("overloaded", 1)
    assert admission.bytes_taken == 0


def test_idle_gateway_admits_however_slow_the_model_was() -> None:
    admission = admission_of(most=10, deadline_s=1.0)
    admission.learn(position=1, seconds=60.0)
    with admission.places():
        assert admission.taken == 1
        with pytest.raises(Problem):
            admission.check()
    assert admission.taken == 0


def test_places_of_a_batch_are_its_images_and_come_back_after_a_failure() -> None:
    admission = admission_of(most=10, deadline_s=1.0)

    def failing() -> None:
        with admission.places(8):
            admission.check(2)
            admission.check(3)

    with pytest.raises(Problem, match="at most 10 are accepted"):
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


async def test_canary_and_answers_teach_the_pace(gateway: httpx.AsyncClient) -> None:
    admission = gateway.app.state.service.admission  # type: ignore[attr-defined]
    await gateway.get("/readyz")
    assert admission.seconds_an_answer > 0
    learnt: list[tuple[int, float]] = []
    admission.learn = lambda position, seconds: learnt.append((position, seconds))
    await gateway.post("/predict", content=image_bytes(), headers=PNG)
    ((position, seconds),) = learnt
    assert position == 1
    assert seconds > 0
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
    assert (reply.status_code, reply.json()["type"]) == (413, "/problems/too-large")
    assert reply.json()["max_images"] == 8
    assert "retry-after" not in reply.headers
    assert len(stub.requests) == asked
    assert (await gateway.post("/predict/batch", files=files[:2])).status_code == 200


async def held_bytes(gateway: httpx.AsyncClient, **request: Any) -> int:
    """Bytes that one request takes of the budget while the model server works on it."""
    admission = gateway.app.state.service.admission  # type: ignore[attr-defined]
    released = held(gateway, pace_s=0.001)
    asked = asyncio.create_task(gateway.post(**request))
    while not admission.at_model:
        await asyncio.sleep(0.005)
    taken: int = admission.bytes_taken
    released.set()
    assert (await asked).status_code == 200
    assert admission.bytes_taken == 0
    return taken


async def test_upload_takes_its_declared_size_or_the_limit_of_the_budget(
    start_gateway: Any,
) -> None:
    gateway = await start_gateway(max_image_bytes=10_000, max_batch_bytes=100_000)
    await gateway.get("/readyz")
    image = image_bytes()

    async def pieces() -> Any:
        yield image

    assert await held_bytes(gateway, url="/predict", content=image, headers=PNG) == len(image)
    limit = gateway.app.state.service.settings.max_form_bytes(1)
    assert await held_bytes(gateway, url="/predict", content=pieces(), headers=PNG) == limit
    files = [("images", ("a.png", image)), ("images", ("b.png", image))]
    assert 2 * len(image) < await held_bytes(gateway, url="/predict/batch", files=files) < 10_000


async def test_uploads_beyond_the_budget_are_refused_before_they_are_read(
    start_gateway: Any,
) -> None:
    gateway = await start_gateway(
        max_image_bytes=10_000, max_batch_bytes=100_000, max_bytes_in_flight=100_000
    )
    await gateway.get("/readyz")
    admission = gateway.app.state.service.admission
    admission.bytes_taken = 99_990
    for url, content in (("/predict", {"content": image_bytes(), "headers": PNG}),
                         ("/predict/batch", {"files": [("images", ("a.png", image_bytes()))]})):  # fmt: skip
        reply = await gateway.post(url, **content)
        assert (reply.status_code, reply.json()["type"]) == (503, "/problems/overloaded")
        assert reply.headers["retry-after"] == "1"
    admission.bytes_taken = 0
    assert (await gateway.post("/predict", content=image_bytes(), headers=PNG)).status_code == 200


async def test_slow_uploads_keep_nobody_waiting_at_the_model(gateway: Any) -> None:
    service = gateway.app.state.service
    assert (await gateway.get("/readyz")).status_code == 200
    begun, rest = asyncio.Event(), asyncio.Event()

    async def slowly() -> Any:
        begun.set()
        yield image_bytes()[:10]
        await rest.wait()
        yield image_bytes()[10:]

    slow = asyncio.create_task(gateway.post("/predict", content=slowly(), headers=PNG))
    await begun.wait()
    assert service.admission.taken == 0
    rest.set()
    assert (await slow).status_code == 200


@pytest.mark.parametrize("limit", [{"max_image_bytes": 20_000_000}, {"max_pixels": 80_000_000}])
def test_limit_above_what_the_model_server_takes_is_refused_at_the_start(
    archive: Any, tmp_path: Any, limit: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="less than or equal to"):
        Settings(archive=archive, inference_socket=tmp_path / "s", **limit)


def test_budget_that_the_largest_request_exceeds_is_refused_at_the_start(
    archive: Any, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="less than the largest request"):
        Settings(archive=archive, inference_socket=tmp_path / "s", max_bytes_in_flight=1_000_000)


async def test_body_larger_than_a_batch_may_be_is_refused(start_gateway: Any) -> None:
    gateway = await start_gateway(max_image_bytes=10_000, max_batch_bytes=100_000)
    files = [("images", ("a.png", b"x" * 120_000))]
    assert (await gateway.post("/predict/batch", files=files)).status_code == 413


async def test_canary_teaches_the_pace_only_while_nothing_is_known(
    gateway: httpx.AsyncClient,
) -> None:
    admission = gateway.app.state.service.admission  # type: ignore[attr-defined]
    admission.learn(position=1, seconds=3.0)
    await gateway.get("/readyz")
    assert admission.seconds_an_answer == 3.0


async def test_deadline_that_passed_teaches_the_pace(start_gateway: Any) -> None:
    gateway = await start_gateway(deadline_s=0.3)
    admission = gateway.app.state.service.admission
    await gateway.get("/readyz")
    held(gateway, pace_s=0.001)
    for _ in range(2):
        reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
        assert reply.status_code == 504
    assert admission.seconds_an_answer == 0.3
    assert (admission.taken, admission.at_model) == (0, 0)
