"""``/calibrate`` and its store: agreement, history, restart, failure."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from api.current import Coalesced
from api.store import Store
from openset.calibration import OperatingPoint
from openset.metrics import ccr_at_tau, clopper_pearson
from openset.model_card import ModelCard
from tests.factories import image_bytes
from tests.stub_torchserve import StubTorchServe

PNG = {"content-type": "image/png"}


def make_point(tau: float = 1.5, path: str = "cpu-float32-eager-0") -> OperatingPoint:
    return OperatingPoint("softmax", tau, 0.01, 0.95, 1000, 4, 4, 0.005, 0.0091, 0.9, path)


async def predict(gateway: httpx.AsyncClient) -> dict[str, Any]:
    body: dict[str, Any] = (
        await gateway.post("/predict", content=image_bytes(), headers=PNG)
    ).json()
    return body


async def test_first_start_takes_the_factory_point_as_row_one(gateway: httpx.AsyncClient) -> None:
    body = await predict(gateway)
    assert body["calibration"] == {
        "id": 1, "fpr": 0.01, "confidence": 0.95, "source": "factory",
        "fpr_upper_bound": body["calibration"]["fpr_upper_bound"],
    }  # fmt: skip
    assert body["calibration"]["fpr_upper_bound"] <= 0.01


async def test_calibrate_moves_tau_and_says_what_it_costs(
    start_gateway: Any, database_url: str
) -> None:
    gateway = await start_gateway(database_url=database_url)
    before = await predict(gateway)
    reply = await gateway.post("/calibrate?fpr=1e-1&reason=less strict")
    body = reply.json()
    assert reply.status_code == 200, reply.text
    assert body["applied"] is True
    point = body["operating_point"]
    assert point["fpr"] == 0.1
    assert point["fpr_upper_bound"] <= 0.1
    assert {"n", "k", "expected_ccr", "expected_fpr"} <= point.keys()
    assert point["tau"] < before["tau"] == body["previous"]["tau"]
    after = await predict(gateway)
    assert (after["tau"], after["calibration"]["id"]) == (point["tau"], point["calibration_id"])


async def test_get_computes_and_changes_nothing(gateway: httpx.AsyncClient) -> None:
    body = (await gateway.get("/calibrate?fpr=0.1")).json()
    assert body["applied"] is False
    assert body["how_to_apply"].startswith("POST /calibrate?fpr=0.1")
    assert (await predict(gateway))["calibration"]["id"] == 1


async def test_recommended_call_sets_the_very_target_that_was_computed(
    gateway: httpx.AsyncClient,
) -> None:
    smallest = (await gateway.post("/calibrate?fpr=1e-6")).json()["smallest_attainable_fpr"]
    computed = (await gateway.get(f"/calibrate?fpr={smallest!r}&confidence=0.95")).json()
    method, _, url = computed["how_to_apply"].partition(" ")
    reply = await gateway.request(method, url)
    assert reply.status_code == 200, reply.text
    assert reply.json()["operating_point"]["fpr"] == smallest


@pytest.mark.parametrize("number", [0, 2**31, 2**70])
async def test_calibration_number_out_of_range_is_the_clients_error(
    start_gateway: Any, database_url: str, number: int
) -> None:
    gateway = await start_gateway(database_url=database_url)
    reply = await gateway.post(f"/calibrations/{number}/activate")
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid-parameter")


async def test_value_that_the_store_refuses_is_not_a_store_that_is_away(
    gateway: httpx.AsyncClient,
) -> None:
    await predict(gateway)

    def refuse(*_: Any, **__: Any) -> None:
        raise sa.exc.DataError("INSERT", None, ValueError("NUL"))

    gateway.app.state.service.store.add = refuse  # type: ignore[attr-defined]
    assert (await gateway.post("/calibrate?fpr=0.1")).status_code == 500


async def test_default_target_is_one_percent(gateway: httpx.AsyncClient) -> None:
    assert (await gateway.post("/calibrate")).json()["operating_point"]["fpr"] == 0.01


async def test_unattainable_target_names_the_smallest(gateway: httpx.AsyncClient) -> None:
    reply = await gateway.post("/calibrate?fpr=1e-6")
    body = reply.json()
    assert (reply.status_code, body["type"]) == (422, "/problems/not-certifiable")
    smallest = body["smallest_attainable_fpr"]
    assert "the smallest attainable rate is" in body["detail"]
    assert (await gateway.post(f"/calibrate?fpr={smallest!r}")).status_code == 200
    assert (await gateway.post(f"/calibrate?fpr={smallest * 0.99}")).status_code == 422


@pytest.mark.parametrize(
    "query",
    [
        "fpr=0", "fpr=1", "fpr=abc", "fpr=1e-320", "fpr=0.99999999999", "confidence=1", "confidence=1e-17",
        "confidence=0.99999999999", "score=energy", "source=mine", "reason=a%00b",
    ],
)  # fmt: skip
async def test_bad_targets_are_refused_and_change_nothing(
    gateway: httpx.AsyncClient, query: str
) -> None:
    assert (await gateway.post(f"/calibrate?{query}")).status_code == 422
    assert len((await gateway.get("/calibrations")).json()["calibrations"]) == 1


async def test_other_score_type(gateway: httpx.AsyncClient) -> None:
    await gateway.post("/calibrate?score=logit&fpr=0.05")
    assert (await predict(gateway))["score_type"] == "logit"


async def test_operating_point_survives_a_restart(start_gateway: Any, database_url: str) -> None:
    first = await start_gateway(database_url=database_url)
    tau = (await first.post("/calibrate?fpr=0.1")).json()["operating_point"]["tau"]
    second = await start_gateway(database_url=database_url)
    assert (await predict(second))["tau"] == tau


async def test_gateways_sharing_a_store_agree_as_soon_as_calibrate_has_answered(
    start_gateway: Any, database_url: str
) -> None:
    gateways = [await start_gateway(database_url=database_url) for _ in range(3)]
    for gateway in gateways:
        await predict(gateway)
    for fpr in (0.2, 0.05, 0.1):
        tau = (await gateways[0].post(f"/calibrate?fpr={fpr}")).json()["operating_point"]["tau"]
        answers = await asyncio.gather(
            *(predict(gateway) for gateway in gateways for _ in range(10))
        )
        assert {answer["tau"] for answer in answers} == {tau}


async def test_history_and_rollback(start_gateway: Any, database_url: str) -> None:
    gateway = await start_gateway(database_url=database_url)
    factory_tau = (await predict(gateway))["tau"]
    await gateway.post("/calibrate?fpr=0.1&reason=trial")
    rows = (await gateway.get("/calibrations")).json()["calibrations"]
    assert [row["operating_point"]["calibration_id"] for row in rows] == [2, 1]
    assert [row["current"] for row in rows] == [True, False]
    assert rows[0]["reason"] == "trial"
    back = (await gateway.post("/calibrations/1/activate")).json()
    assert back["operating_point"]["calibration_id"] == 1
    assert (await predict(gateway))["tau"] == factory_tau
    assert (await gateway.post("/calibrations/99/activate")).status_code == 404


async def test_store_away_is_503_and_never_a_stale_tau(
    start_gateway: Any, stub: StubTorchServe, database_url: str
) -> None:
    gateway = await start_gateway(database_url=database_url)
    await predict(gateway)
    asked = len(stub.requests)
    elsewhere = sa.create_engine(database_url)
    with elsewhere.begin() as connection:
        connection.execute(sa.text("ALTER TABLE activations RENAME TO gone"))
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/store-away")
    assert "retry-after" in reply.headers
    assert len(stub.requests) == asked
    with elsewhere.begin() as connection:
        connection.execute(sa.text("ALTER TABLE gone RENAME TO activations"))
    elsewhere.dispose()
    assert (await gateway.post("/predict", content=image_bytes(), headers=PNG)).status_code == 200


async def test_damaged_store_file_is_503_too(start_gateway: Any, tmp_path: Path) -> None:
    file = tmp_path / "damaged.db"
    gateway = await start_gateway(database_url=f"sqlite:///{file}")
    await predict(gateway)
    service = gateway.app.state.service
    service.store.close()  # what it has read is not asked again
    service._current.clear()
    for part in tmp_path.glob("damaged.db*"):
        part.write_bytes(b"no database" * 1000)
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/store-away")


async def test_hanging_store_is_503_too(start_gateway: Any) -> None:
    gateway = await start_gateway(store_timeout_s=0.2)
    await predict(gateway)
    release = threading.Event()
    store = gateway.app.state.service.store
    store.version = lambda: None  # as with PostgreSQL: every request asks
    gateway.app.state.service._current.clear()
    store.current = lambda path: release.wait(5)
    reply = await gateway.post("/predict", content=image_bytes(), headers=PNG)
    release.set()
    assert (reply.status_code, reply.json()["type"]) == (503, "/problems/store-away")


def with_card(archive: Path, file: Path, **changes: Any) -> Path:
    """A copy of the archive whose model card is another one."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "model_card.json":
                content = ModelCard.from_json(content).with_changes(**changes).to_json().encode()
            new.writestr(name, content)
    return file


async def test_stored_score_that_a_new_archive_lacks_is_not_ready_and_can_be_replaced(
    start_gateway: Any, archive: Path, tmp_path: Path
) -> None:
    first = await start_gateway()
    await predict(first)
    assert (await first.post("/calibrate?score=logit&fpr=0.1")).status_code == 200
    newer = await start_gateway(archive=with_card(archive, tmp_path / "n.mar", scores=["softmax"]))
    ready = await newer.get("/readyz")
    assert (ready.status_code, ready.json()["type"]) == (503, "/problems/not-calibrated")
    assert "POST /calibrate?score=softmax" in ready.json()["detail"]
    reply = await newer.post("/predict", content=image_bytes(), headers=PNG)
    assert reply.json()["type"] == "/problems/not-calibrated"
    assert (await newer.post("/calibrations/2/activate")).status_code == 422
    assert (await newer.post("/calibrate?score=logit")).status_code == 422
    assert (await newer.post("/calibrate?score=softmax")).status_code == 200
    assert (await newer.get("/readyz")).status_code == 200
    assert (await predict(newer))["score_type"] == "softmax"


async def test_reason_for_not_being_ready_is_logged_once_until_it_changes(
    start_gateway: Any, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever runs a container sees its log, not what its health check was answered."""
    factory = {"path": "cuda-float32-eager-0", "fpr": 1e-6, "confidence": 0.95}
    gateway = await start_gateway(archive=with_card(archive, tmp_path / "n.mar", factory=factory))

    def reasons() -> list[str]:
        said = [record.getMessage() for record in caplog.records]
        return [text for text in said if text.startswith("not ready")]

    async def refused() -> str:
        replies = [await gateway.get("/readyz") for _ in range(3)]
        [detail] = {reply.json()["detail"] for reply in replies}
        return f"not ready (not-calibrated): {detail}"

    without_point = await refused()
    service = gateway.app.state.service
    taken = service.model.score_sets.pop(service.path)
    without_scores = await refused()
    assert reasons() == [without_point, without_scores]
    service.model.score_sets[service.path] = taken
    assert (await gateway.post("/calibrate?fpr=0.1")).status_code == 200
    assert (await gateway.get("/readyz")).status_code == 200
    service.model.score_sets.pop(service.path)
    assert reasons() == [without_point, without_scores]
    assert await refused() == without_scores
    assert reasons() == [without_point, without_scores, without_scores]


async def test_factory_point_that_cannot_be_taken_over_is_said_and_can_be_replaced(
    start_gateway: Any, archive: Path, tmp_path: Path
) -> None:
    factory = {"path": "cuda-float32-eager-0", "fpr": 1e-6, "confidence": 0.95}
    gateway = await start_gateway(archive=with_card(archive, tmp_path / "n.mar", factory=factory))
    ready = await gateway.get("/readyz")
    assert (ready.status_code, ready.json()["type"]) == (503, "/problems/not-calibrated")
    assert "1e-06 cannot be promised" in ready.json()["detail"]
    assert "POST /calibrate" in ready.json()["detail"]
    assert (await gateway.post("/calibrate?fpr=0.1")).json()["previous"] is None
    assert (await gateway.get("/readyz")).status_code == 200


async def test_new_factory_point_that_is_not_applied_is_logged(
    start_gateway: Any, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "api.service"):
        first = await start_gateway()
        await predict(first)
        await first.post("/calibrate?fpr=0.2")
        await predict(await start_gateway())
        assert "is not applied" not in caplog.text
        path = first.app.state.service.path
        point = first.app.state.service.model.operating_point(path, "softmax", 0.1, 0.95)
        newer = with_card(archive, tmp_path / "n.mar", factory=point.to_dict())
        await predict(await start_gateway(archive=newer))
    assert "factory point (fpr 0.1" in caplog.text
    assert "POST /calibrate?fpr=0.1&confidence=0.95&score=softmax" in caplog.text


async def test_unchanged_store_is_not_read_again_and_a_changed_one_is(
    gateway: httpx.AsyncClient, tmp_path: Path
) -> None:
    await predict(gateway)
    store = gateway.app.state.service.store  # type: ignore[attr-defined]
    working, reads = store.current, 0

    def counted(path: str) -> Any:
        nonlocal reads
        reads += 1
        return working(path)

    store.current = counted
    for _ in range(5):
        await predict(gateway)
    assert reads == 0
    other = Store(str(store.engine.url))  # as another process would
    path = gateway.app.state.service.path  # type: ignore[attr-defined]
    other.add(make_point(3.0, path), model_sha256="0" * 64, source="factory", reason="")
    assert (await predict(gateway))["tau"] == 3.0
    assert reads == 1
    other.close()


async def test_curve_has_the_rates_and_the_band_of_the_calibration_scores(
    gateway: httpx.AsyncClient,
) -> None:
    curve = (await gateway.get("/calibration/curve?points=20")).json()
    model = gateway.app.state.service.model  # type: ignore[attr-defined]
    score_set = model.score_sets[curve["path"]]
    scores = score_set.of_type(curve["score_type"])
    negatives = score_set.negative_scores(curve["score_type"])
    assert len(curve["points"]) > 10
    for point in curve["points"]:
        accepted = int((negatives >= np.float32(point["tau"])).sum())
        assert point["fpr"] == accepted / len(negatives)
        band = clopper_pearson(accepted, len(negatives))
        assert (point["fpr_low"], point["fpr_high"]) == pytest.approx(band)
        assert point["ccr"] == pytest.approx(
            ccr_at_tau(
                scores, score_set.predictions, score_set.labels, tau=np.float32(point["tau"])
            )
        )


@pytest.mark.parametrize(
    ("query", "sent"),
    [("?FPR=0.1", {}), ("", {"data": {"fpr": "0.1"}}), ("", {"json": {"fpr": 0.1}})],
)
async def test_misplaced_target_is_refused_and_changes_nothing(
    gateway: httpx.AsyncClient, query: str, sent: dict[str, Any]
) -> None:
    before = (await gateway.get("/calibrations")).json()["calibrations"]
    reply = await gateway.post(f"/calibrate{query}", **sent)
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid-parameter")
    assert "fpr" in reply.json()["detail"]
    assert (await gateway.get("/calibrations")).json()["calibrations"] == before


async def test_keys_and_scopes(start_gateway: Any) -> None:
    keys = [
        {"sha256": hashlib.sha256(b"reader").hexdigest(), "scopes": ["predict"]},
        {"sha256": hashlib.sha256(b"operator").hexdigest(), "scopes": ["predict", "calibrate"]},
    ]
    gateway = await start_gateway(api_keys=keys)

    async def status(key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return (await gateway.post("/calibrate", headers=headers)).status_code

    assert [await status(key) for key in (None, "wrong", "reader", "operator")] == [
        401,
        401,
        403,
        200,
    ]
    assert (await gateway.get("/livez")).status_code == 200


def test_store_keeps_every_row(database_url: str) -> None:
    store = Store(database_url)
    store.create_tables()
    store.create_tables()
    first = store.add(make_point(1.0), model_sha256="0" * 64, source="factory", reason="")
    second = store.add(make_point(2.0), model_sha256="0" * 64, source="factory", reason="")
    assert store.current("cpu-float32-eager-0") == second
    store.activate(first, reason="rollback")
    assert store.current("cpu-float32-eager-0") == first
    assert store.current("cuda-float32-eager-0") is None
    assert [row.id for row, _ in store.history("cpu-float32-eager-0", 10)] == [second.id, first.id]
    store.close()


def test_question_that_was_given_up_never_commits_later(database_url: str) -> None:
    """A calibration that was answered with 503 must not override a later one when the database comes back."""
    store = Store(database_url, timeout_s=0.5)
    store.create_tables()
    asked: list[BaseException | None] = []

    def ask() -> None:
        try:
            store.add(make_point(3.0, "locked"), model_sha256="0" * 64, source="factory", reason="")
            asked.append(None)
        except (sa.exc.OperationalError, TimeoutError) as error:
            asked.append(error)

    lock = {
        "sqlite": ["BEGIN IMMEDIATE"],
        "postgresql": ["SET statement_timeout = 0", "LOCK TABLE activations IN ACCESS EXCLUSIVE MODE"],
    }  # fmt: skip
    by_hand = {"isolation_level": "AUTOCOMMIT"} if store.engine.dialect.name == "sqlite" else {}
    elsewhere = sa.create_engine(database_url, **by_hand)
    with elsewhere.connect() as holder:
        for statement in lock[store.engine.dialect.name]:
            holder.execute(sa.text(statement))
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(1.9)  # SQLite would wait two seconds by itself
        ended = list(asked)
    thread.join(30)
    elsewhere.dispose()
    assert [type(error) for error in ended] == [sa.exc.OperationalError]
    assert store.current("locked") is None
    store.close()


def test_write_that_took_longer_than_anyone_waits_is_rolled_back(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(database_url, timeout_s=3.0)
    store.create_tables()
    now = iter([0.0, 2.9])
    monkeypatch.setattr("api.store.time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(TimeoutError):
        store.add(make_point(3.0, "late"), model_sha256="0" * 64, source="factory", reason="")
    assert store.current("late") is None
    store.close()


def test_many_starters_make_one_factory_row(database_url: str) -> None:
    stores = [Store(database_url) for _ in range(6)]
    stores[0].create_tables()
    threads = [
        threading.Thread(
            target=store.ensure_factory, args=(make_point(),), kwargs={"model_sha256": "0" * 64}
        )
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with stores[0].engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM calibrations")).scalar() == 1
        assert connection.execute(sa.text("SELECT count(*) FROM activations")).scalar() == 1
    for store in stores:
        store.close()


def test_acknowledged_calibration_survives_in_the_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    store = Store(url)
    store.create_tables()
    added = store.add(make_point(0.1 + 0.2), model_sha256="0" * 64, source="factory", reason="r")
    store.close()
    again = Store(url)
    assert again.current("cpu-float32-eager-0") == added
    again.close()


async def test_coalesced_read_is_never_older_than_its_question() -> None:
    value, reads = 0, 0

    def read() -> int:
        nonlocal reads
        reads += 1
        seen = value
        time.sleep(0.02)
        return seen

    coalesced = Coalesced(read, 5.0)
    for number in range(1, 6):
        early = [asyncio.create_task(coalesced.get()) for _ in range(20)]
        await asyncio.sleep(0.005)  # a read of the old value is under way
        value = number
        late = [asyncio.create_task(coalesced.get()) for _ in range(20)]
        assert set(await asyncio.gather(*late)) == {number}
        await asyncio.gather(*early)
    assert reads <= 15


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("localhost", {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ("localhost", {"sec-fetch-site": "same-site"}, 403),
        ("localhost", {"origin": "https://evil.example"}, 403),
        ("localhost", {"origin": "http://["}, 403),
        ("localhost:8000", {"origin": "http://localhost:8000"}, 200),
        ("127.0.0.1:8000", {"origin": "http://127.0.0.1:8000"}, 200),
        ("[::1]:8000", {"origin": "http://[::1]:8000"}, 200),
        ("192.0.2.7", {"sec-fetch-site": "same-origin", "origin": "http://192.0.2.7"}, 200),
        ("localhost", {"sec-fetch-site": "none"}, 200),
        ("gateway.lab", {"origin": "http://gateway.lab"}, 200),
        ("evil.example", {}, 200),  # no browser
        # A name of the page's own that now points here: DNS rebinding.
        ("evil.example:8000", {"origin": "http://evil.example:8000"}, 403),
        ("evil.example", {"sec-fetch-site": "same-origin", "origin": "http://evil.example"}, 403),
        ("127.0.0.1.evil.example", {"origin": "http://127.0.0.1.evil.example"}, 403),
    ],
)
async def test_page_of_another_site_cannot_set_tau(
    start_gateway: Any, host: str, headers: dict[str, str], status: int
) -> None:
    gateway = await start_gateway(allowed_hosts=("Gateway.lab",))
    before = (await gateway.get("/calibrations")).json()["calibrations"]
    reply = await gateway.post("/calibrate?fpr=0.1", headers={"host": host, **headers})
    assert reply.status_code == status
    after = (await gateway.get("/calibrations")).json()["calibrations"]
    assert len(after) - len(before) == (status == 200)
    if status == 403:
        assert reply.json()["type"] == "/problems/foreign-origin"


async def test_any_name_will_do_where_a_key_is_needed(start_gateway: Any) -> None:
    key = {"sha256": hashlib.sha256(b"operator").hexdigest(), "scopes": ["predict", "calibrate"]}
    gateway = await start_gateway(api_keys=[key])
    headers = {"host": "lab", "origin": "http://lab", "authorization": "Bearer operator"}
    assert (await gateway.post("/calibrate?fpr=0.1", headers=headers)).status_code == 200
