"""``/predict``: what goes in, what comes out, what is refused."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from aiohttp import web

from api import image_input
from api.archive import read_archive
from api.current import SingleFlight
from openset.calibration import SortedScores
from tests.factories import image_bytes
from tests.hostile_images import HOSTILE
from tests.stub_torchserve import StubTorchServe, torchserve_error

PNG = {"content-type": "image/png"}


def padded(size: int) -> bytes:
    """A sound PNG of exactly ``size`` bytes: the stub scores by length."""
    data = image_bytes()
    return data + b"\0" * (size - len(data))


async def test_raw_body_and_multipart_give_the_same_answer(gateway: httpx.AsyncClient) -> None:
    image = image_bytes()
    raw = (await gateway.post("/predict", content=image, headers=PNG)).json()
    form = (await gateway.post("/predict", files={"image": ("../x\r\n.png", image)})).json()
    for body in (raw, form):
        del body["timing_ms"], body["request_id"]
    assert raw == form
    assert raw["calibration"]["id"] == 1


async def test_label_above_tau_and_unknown_below(gateway: httpx.AsyncClient) -> None:
    tau = (await gateway.get("/calibrate")).json()["previous"]["tau"]
    above = (
        await gateway.post("/predict", content=padded(int(tau * 1000) + 50), headers=PNG)
    ).json()
    below = (
        await gateway.post("/predict", content=padded(int(tau * 1000) - 50), headers=PNG)
    ).json()
    assert (above["label"], above["accepted"]) == ("3", True)
    assert (below["label"], below["accepted"]) == ("unknown", False)
    assert above["p_value"] < below["p_value"]


async def test_tau_travels_as_the_very_float32(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    body = (await gateway.post("/predict", content=image_bytes(), headers=PNG)).json()
    sent = stub.requests[-1]
    assert np.float32(sent["x-openset-tau"]) == np.float32(body["tau"])
    assert sent["x-openset-calibration"] == "1"
    assert sent["content-type"] == "application/octet-stream"


async def test_nothing_of_the_clients_headers_reaches_the_model_server(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    await gateway.post(
        "/predict",
        content=image_bytes(),
        headers={**PNG, "x-openset-tau": "-99", "explain": "1", "cookie": "a=b"},
    )
    sent = stub.requests[-1]
    assert sent["x-openset-tau"] != "-99"
    assert not {"explain", "cookie"} & sent.keys()


async def test_own_target_applies_to_this_request_only(
    gateway: httpx.AsyncClient, archive: Any
) -> None:
    before = (await gateway.post("/predict", content=image_bytes(), headers=PNG)).json()
    own = (await gateway.post("/predict?fpr=0.2", content=image_bytes(), headers=PNG)).json()
    after = (await gateway.post("/predict", content=image_bytes(), headers=PNG)).json()
    assert own["calibration"]["id"] is None
    assert own["calibration"]["fpr"] == 0.2
    sources = [answer["calibration"]["source"] for answer in (before, own, after)]
    assert sources == ["factory", "request", "factory"]
    model = read_archive(archive)
    expected = model.operating_point(next(iter(model.score_sets)), "softmax", 0.2, 0.95)
    assert own["tau"] == expected.tau < before["tau"] == after["tau"]


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
async def test_own_target_is_refused_where_the_operator_says_so(
    start_gateway: Any, stub: StubTorchServe, path: str
) -> None:
    gateway = await start_gateway(request_fpr="refuse")
    image = {"images" if path.endswith("batch") else "image": image_bytes()}
    refused = await gateway.post(f"{path}?fpr=0.2", files=image)
    assert refused.status_code == 403
    assert refused.json()["type"] == "/problems/own-target-refused"
    assert "OPENSET_REQUEST_FPR" in refused.json()["detail"]
    assert not stub.requests
    assert (await gateway.post(f"{path}?top_k=1", files=image)).status_code == 200


async def test_top_k_and_angles(gateway: httpx.AsyncClient) -> None:
    body = (
        await gateway.post("/predict?top_k=2&angles=all", content=image_bytes(), headers=PNG)
    ).json()
    assert len(body["top_k"]) == 2
    assert len(body["angles"]) == 10


async def test_request_id_is_kept_if_harmless_and_replaced_if_not(
    gateway: httpx.AsyncClient,
) -> None:
    kept = await gateway.post(
        "/predict", content=image_bytes(), headers={**PNG, "x-request-id": "abc-1"}
    )
    assert kept.headers["x-request-id"] == kept.json()["request_id"] == "abc-1"
    replaced = await gateway.get("/livez", headers={"x-request-id": "a b{}"})
    assert len(replaced.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("content", "headers", "status", "slug"),
    [
        (b"", PNG, 422, "unreadable-image"),
        (b"\xff", PNG, 422, "unreadable-image"),
        (b"<svg/>", {"content-type": "image/svg+xml"}, 422, "unreadable-image"),
        (b"GIF89a" + b"\0" * 99, PNG, 422, "unreadable-image"),
        (b"{}", {"content-type": "application/json"}, 415, "unsupported-type"),
        (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported-type"),
        (b"abc", {}, 415, "unsupported-type"),
        (b"abc", {**PNG, "content-encoding": "gzip"}, 415, "unsupported-type"),
        (b"x" * 2_000_001, PNG, 413, "too-large"),
        (b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}, 400, "bad-request"),
        (b"abc", {"content-type": "multipart/form-data"}, 400, "bad-request"),
    ],
)
async def test_bad_input_is_a_problem_and_never_reaches_the_model(
    start_gateway: Any,
    stub: StubTorchServe,
    content: bytes,
    headers: dict[str, str],
    status: int,
    slug: str,
) -> None:
    gateway = await start_gateway(max_image_bytes=2_000_000)
    await gateway.get("/readyz")
    asked = len(stub.requests)
    reply = await gateway.post("/predict", content=content, headers=headers)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json()
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == status
    assert "Traceback" not in reply.text
    assert len(stub.requests) == asked


async def test_chunked_upload_without_length_stops_at_the_limit(start_gateway: Any) -> None:
    gateway = await start_gateway(max_image_bytes=100_000)
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b"x" * 10_000

    reply = await gateway.post("/predict", content=endless(), headers=PNG)
    assert reply.status_code == 413
    assert sent == 110_000  # the first piece beyond the limit, and no more


async def test_slow_upload_is_cut(start_gateway: Any) -> None:
    gateway = await start_gateway(read_timeout_s=0.2)

    async def slow() -> Any:
        yield b"x"
        await asyncio.sleep(30)

    reply = await gateway.post("/predict", content=slow(), headers=PNG)
    assert reply.status_code == 408


@pytest.mark.parametrize(
    "query", ["fpr=0", "fpr=1", "fpr=x", "fpr=1e-320", "top_k=0", "angles=some", "topk=1"]
)
async def test_bad_parameters_are_named(gateway: httpx.AsyncClient, query: str) -> None:
    reply = await gateway.post(f"/predict?{query}", content=image_bytes(), headers=PNG)
    assert reply.status_code == 422
    assert query.split("=")[0] in reply.json()["detail"]


async def test_another_model_name_is_refused(gateway: httpx.AsyncClient) -> None:
    assert (
        await gateway.post("/predict?model=other", content=image_bytes(), headers=PNG)
    ).status_code == 404


BACKEND_FAILURES = [
    (
        lambda: torchserve_error(503, "ServiceUnavailableException", "Model has no worker"),
        503,
        "overloaded",
    ),
    (
        lambda: torchserve_error(503, "InternalServerException", "Prediction failed"),
        500,
        "internal-error",
    ),
    (
        lambda: torchserve_error(507, "InternalServerException", "Out of resources"),
        503,
        "backend-failed",
    ),
    (
        lambda: torchserve_error(500, "InternalServerException", "Worker died."),
        503,
        "backend-failed",
    ),
    (lambda: torchserve_error(404, "ModelNotFoundException", "Model not found"), 503, "not-ready"),
    (lambda: web.Response(body=b"garbage"), 503, "backend-failed"),
    (lambda: web.Response(body=b"x" * 1_100_000), 503, "backend-failed"),
    (lambda: web.Response(body=b"{}"), 503, "backend-failed"),
]


@pytest.mark.parametrize(("answer", "status", "slug"), BACKEND_FAILURES)
async def test_every_answer_of_the_model_server_is_mapped(
    gateway: httpx.AsyncClient, stub: StubTorchServe, answer: Any, status: int, slug: str
) -> None:
    await gateway.get("/readyz")
    stub.behave = lambda request, body, document: answer()
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (status, f"/problems/{slug}")
    if status == 503 and slug in ("overloaded", "not-ready"):
        assert int(reply.headers["retry-after"]) >= 1


async def test_lost_worker_is_repeated_once(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    await gateway.get("/readyz")
    asked = len(stub.requests)

    def die_once(*_: Any) -> web.Response | None:
        first = len(stub.requests) == asked + 1
        return torchserve_error(500, "InternalServerException", "Worker died.") if first else None

    stub.behave = die_once
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert reply.status_code == 200
    assert len(stub.requests) == asked + 2


async def test_silent_model_server_becomes_504(start_gateway: Any, stub: StubTorchServe) -> None:
    gateway = await start_gateway(deadline_s=0.3)
    await gateway.get("/readyz")
    asked = len(stub.requests)
    stub.silent = True
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (504, "/problems/deadline")
    assert len(stub.requests) == asked + 1


async def test_all_who_wait_for_the_path_share_one_question_and_its_failure(
    start_gateway: Any, stub: StubTorchServe
) -> None:
    gateway = await start_gateway(deadline_s=1.0)
    stub.silent = True
    started = time.monotonic()
    replies = await asyncio.gather(
        *(gateway.post("/predict", content=image_bytes(), headers=PNG) for _ in range(8)),
        *(gateway.get("/readyz") for _ in range(8)),
    )
    assert {reply.status_code for reply in replies} == {504}
    assert len(stub.requests) == 1
    assert time.monotonic() - started < 4  # and not sixteen deadlines
    stub.silent = False
    assert (await gateway.get("/readyz")).status_code == 200


async def test_readiness_asked_by_many_at_once_is_one_prediction(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    await gateway.get("/readyz")
    asked = len(stub.requests)
    replies = await asyncio.gather(*(gateway.get("/readyz") for _ in range(20)))
    assert {reply.status_code for reply in replies} == {200}
    assert len(stub.requests) == asked + 1


async def test_client_that_leaves_takes_the_answer_from_nobody() -> None:
    release = asyncio.Event()

    async def ask() -> int:
        await release.wait()
        return 7

    flight = SingleFlight(ask)
    leaving, staying = asyncio.create_task(flight.get()), asyncio.create_task(flight.get())
    await asyncio.sleep(0)
    leaving.cancel()
    release.set()
    assert await staying == 7


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_header_is_refused_at_once_and_never_reaches_the_model(
    gateway: httpx.AsyncClient, stub: StubTorchServe, name: str
) -> None:
    await gateway.get("/readyz")
    asked = len(stub.requests)
    reply = await gateway.post("/predict", content=HOSTILE[name], headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/unreadable-image")
    assert len(stub.requests) == asked


def test_the_gateway_opens_no_image_with_a_decoder() -> None:
    assert "PIL" not in Path(image_input.__file__).read_text()


async def test_canary_brings_a_threshold_of_its_own(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    """The factory's may belong to another path; the handler would refuse it."""
    await gateway.get("/readyz")
    assert stub.requests[0]["x-openset-score"] == "softmax"
    assert float(stub.requests[0]["x-openset-tau"]) == 0.0


async def test_own_targets_sort_the_calibration_scores_once(
    gateway: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorts: list[str] = []
    working = SortedScores.of

    def counted(score_set: Any, score_type: str) -> SortedScores:
        sorts.append(score_type)
        return working(score_set, score_type)

    monkeypatch.setattr(SortedScores, "of", counted)
    for fpr in (0.02, 0.03, 0.04):
        reply = await gateway.post(f"/predict?fpr={fpr}", content=image_bytes(), headers=PNG)
        assert reply.json()["calibration"]["fpr"] == fpr
    assert sorts == ["softmax"]


@pytest.mark.parametrize("change", [{"tau": -5.0}, {"calibration": "7"}, {"score_type": "logit"}])
async def test_operating_point_that_was_not_applied_is_refused_and_counted(
    gateway: httpx.AsyncClient, stub: StubTorchServe, change: dict[str, Any]
) -> None:
    await gateway.get("/readyz")
    stub.behave = lambda request, body, document: document.update(change)
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/operating-point-mismatch")
    assert "openset_operating_point_mismatches_total 1.0" in (await gateway.get("/metrics")).text


async def test_other_weights_than_the_archives_are_refused(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    stub.sha256 = "0" * 64
    assert (await gateway.get("/readyz")).json()["type"] == "/problems/operating-point-mismatch"


async def test_uncalibrated_path_is_not_ready_and_names_the_command(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    stub.path = "cuda-bfloat16-eager-0123456789abcdef"
    reply = await gateway.get("/readyz")
    assert reply.status_code == 503
    assert "make calibrate RUN=<run> DEVICE=cuda PRECISION=bfloat16" in reply.json()["detail"]
    assert (await gateway.post("/predict", content=image_bytes(), headers=PNG)).status_code == 503


async def test_path_that_changes_under_way_is_refused_then_learnt(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    await gateway.get("/readyz")
    good = stub.path
    stub.path = "cuda-bfloat16-eager-0123456789abcdef"
    first = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert first.json()["type"] == "/problems/operating-point-mismatch"
    second = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert second.json()["type"] == "/problems/not-calibrated"
    stub.path = good
    gateway.app.state.service.path = None  # type: ignore[attr-defined]
    assert (await gateway.post("/predict", content=image_bytes(), headers=PNG)).status_code == 200


async def test_non_finite_score_is_unknown_and_counted(
    gateway: httpx.AsyncClient, stub: StubTorchServe
) -> None:
    await gateway.get("/readyz")
    stub.behave = lambda request, body, document: document.update(
        score=None, score_probability=None, accepted=False, label="unknown", non_finite=True
    )
    body = (await gateway.post("/predict", content=image_bytes(), headers=PNG)).json()
    assert (body["label"], body["score"], body["p_value"]) == ("unknown", None, None)
    assert (
        'openset_outcomes_total{outcome="non_finite"} 1.0' in (await gateway.get("/metrics")).text
    )


async def test_too_many_requests_in_flight_are_refused_at_once(
    start_gateway: Any, stub: StubTorchServe
) -> None:
    gateway = await start_gateway(max_in_flight=2)
    await gateway.get("/readyz")
    gateway.app.state.service.admission.taken = 2
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/overloaded")
    assert reply.headers["retry-after"] == "1"
    gateway.app.state.service.admission.taken = 0
    assert (await gateway.post("/predict", content=image_bytes(), headers=PNG)).status_code == 200
    assert gateway.app.state.service.admission.taken == 0


async def test_batch_answers_each_image_in_order(gateway: httpx.AsyncClient) -> None:
    files = [
        ("images", ("a.png", image_bytes())),
        ("images", ("b.txt", b"text")),
        ("images", ("c.png", padded(9000))),
    ]
    body = (await gateway.post("/predict/batch", files=files)).json()
    assert [item["status"] for item in body["results"]] == [200, 422, 200]
    assert body["results"][1]["problem"]["type"] == "/problems/unreadable-image"
    assert body["results"][2]["result"]["score"] == 9.0


async def test_batch_of_too_many_images_is_refused(start_gateway: Any) -> None:
    gateway = await start_gateway(max_batch_images=2)
    files = [("images", (f"{number}.png", image_bytes())) for number in range(3)]
    assert (await gateway.post("/predict/batch", files=files)).status_code == 400


@pytest.mark.parametrize("path", ["/", "/docs", "/livez", "/nowhere"])
async def test_no_page_of_another_site_may_frame_ours(
    gateway: httpx.AsyncClient, path: str
) -> None:
    policies = (await gateway.get(path)).headers.get_list("content-security-policy")
    assert "frame-ancestors 'none'" in policies


async def test_refusals_carry_the_headers_that_their_status_asks_for(start_gateway: Any) -> None:
    gateway = await start_gateway(api_keys=[{"sha256": "0" * 64}])
    reply = await gateway.post("/predict", content=b"x")
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    reply = await gateway.delete("/predict")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
