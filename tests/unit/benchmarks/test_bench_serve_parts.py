"""The parts of the serving benchmark against a fake server: which rows they make, and what they make of failures."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks import serve
from benchmarks.serving import models, parts
from benchmarks.serving.clients import Clients
from benchmarks.serving.load import Target
from benchmarks.serving.measures import Bench, in_batches
from benchmarks.serving.plan import Plan, plan_of
from benchmarks.serving.processes import Running
from benchmarks.serving.report import Report
from serving.torchserve import TorchServeFailed


class FakeServer:
    """Gateway and TorchServe in one; ``statuses`` are what it answers images with, in turn."""

    def __init__(self) -> None:
        self.statuses = [200]
        self.batch_statuses = [200] * 16
        self.asked = 0
        self.target = Target("")

    async def image(self, request: web.Request) -> web.Response:
        await request.read()
        self.asked += 1
        return web.Response(status=self.statuses[self.asked % len(self.statuses)])

    async def batch(self, request: web.Request) -> web.Response:
        content = await request.post()
        images = content.getall("images")
        assert len(images) == len(self.batch_statuses)
        return web.json_response(
            {"results": [{"status": status} for status in self.batch_statuses]}
        )

    async def calibrate(self, request: web.Request) -> web.Response:
        return web.json_response({})


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeServer]:
    """The stack and the stock server are this fake."""
    server = FakeServer()
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/predict", server.image)
    app.router.add_post("/predict/batch", server.batch)
    app.router.add_post("/calibrate", server.calibrate)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    target = Target(f"http://127.0.0.1:{runner.addresses[0][1]}")

    @contextlib.asynccontextmanager
    async def served(*_: Any, **__: Any) -> AsyncIterator[Running]:
        yield Running(target, target, os.getpid())

    monkeypatch.setattr(parts, "served_by_stack", served)
    monkeypatch.setattr(parts, "served_by_stock", served)
    monkeypatch.setattr(parts, "SCORES", 2000)
    monkeypatch.setattr(parts, "build_archive", lambda *_: Path("store/x.mar"))
    monkeypatch.setattr(models, "stock_archive", lambda *_: None)
    server.target = target
    yield server
    await runner.cleanup()


def quick_plan(**changes: Any) -> Plan:
    plan = plan_of(
        device="cpu", precisions=["float32", "bfloat16"], compiled=False, deadline_s=10.0, quick=True
    )  # fmt: skip
    short = {"seconds": 0.2, "load_seconds": 0.1, "tail_seconds": 0.2, "overload_seconds": 0.2, "connections": 2}  # fmt: skip
    return replace(plan, **(short | changes))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    report = Report(tmp_path / "bench.json")
    return Bench(report, quick_plan(), models.photographs(None, 3), Clients())


async def test_one_run_holds_both_precisions_against_both_baselines_under_names_of_their_own(
    fake: FakeServer, bench: Bench, tmp_path: Path
) -> None:
    await parts.compare(bench, tmp_path / "compare")
    for precision in bench.plan.precisions:
        await parts.load(bench, tmp_path / "load", precision)
    await parts.toy(replace(bench, images=models.characters(4)), tmp_path)
    parts.empty_rows(bench)
    assert bench.report.file is not None
    content = json.loads(bench.report.file.read_text())
    names = [row["name"] for row in content["rows"]]
    assert len(set(names)) == len(names)
    aims = {"float32": ">= 1.15", "bfloat16": ">= 2.2"}
    for precision, aim in aims.items():
        what = f"lenet_plus_plus, {precision}, cpu"
        rows = {row["name"]: row for row in content["rows"]}
        assert rows[f"images/s, {what}, against the stock handler"]["aim"] == aim
        assert rows[f"images/s, {what}, against the bare loop"]["aim"] == ">= 0.9"
        for row in ("p99 / p50", "   p99.9", "   generator's own lag, p99,"):
            assert rows[f"{row} at 70 % of capacity, open loop, {what}"]["value"] > 0
        assert len(content["latency against load"][what]) == 6
    assert len(content["load average before every round"]) == bench.plan.rounds


async def test_server_that_answers_nothing_with_200_misses_every_aim_and_ends_no_part(
    fake: FakeServer, bench: Bench, tmp_path: Path
) -> None:
    fake.statuses = [500]
    await parts.compare(bench, tmp_path / "compare")
    await parts.load(bench, tmp_path / "load", "float32")
    missed = {row.name: row.met for row in bench.report.rows if row.aim and "/calibrate" not in row.name}  # fmt: skip
    assert len(missed) >= 5
    assert not any(missed.values()), missed


async def test_failed_requests_count_as_endless_at_70_percent(
    fake: FakeServer, bench: Bench, tmp_path: Path
) -> None:
    fake.statuses = [200, 200, 503]
    await parts.load(replace(bench, plan=quick_plan(tail_seconds=0.5)), tmp_path, "float32")
    rows = {row.name.strip().partition(" at 70 %")[0]: row for row in bench.report.rows}
    assert (rows["p99 / p50"].value, rows["p99 / p50"].met) == (None, False)
    assert rows["p99 / p50"].baseline is not None
    failures = rows["not answered with 200"]
    assert failures.value is not None
    assert failures.value > 0
    assert failures.met is False


async def test_overload_without_a_refusal_says_nothing_about_refusals(
    fake: FakeServer, bench: Bench, tmp_path: Path
) -> None:
    await parts.load(bench, tmp_path, "float32")
    (row,) = [row for row in bench.report.rows if row.name.startswith("   refusals")]
    assert (row.value, row.met) == (None, None)


async def test_batch_with_one_bad_image_is_no_good_batch(fake: FakeServer, bench: Bench) -> None:
    assert await in_batches(bench, fake.target)(0.1) > 0
    fake.batch_statuses = [200] * 15 + [422]
    assert await in_batches(bench, fake.target)(0.1) == 0


def test_failing_part_is_named_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    async def broken(*_: Any) -> None:
        raise TorchServeFailed("no Java")

    async def load(bench: Bench, folder: Path, precision: str) -> None:
        measured.append(precision)

    async def toy(bench: Bench, folder: Path) -> None:
        measured.append("toy")

    monkeypatch.setattr(models, "photographs", lambda *_: [b"x"])
    monkeypatch.setattr(parts, "compare", broken)
    monkeypatch.setattr(parts, "load", load)
    monkeypatch.setattr(parts, "toy", toy)
    file = tmp_path / "bench.json"
    arguments = ["--quick", "--json", str(file), "--precision", "float32", "bfloat16"]
    assert serve.main(arguments) == 1
    assert measured == ["float32", "bfloat16", "toy"]
    assert json.loads(file.read_text())["failed"] == {"compare": "TorchServeFailed: no Java"}
    assert re.search("compare failed.*no Java", capsys.readouterr().err)
