"""The bulk client, the batch endpoint and overload on the real stack."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.load import Target, closed_loop, open_loop
from serving.archive import build_archive
from tests.e2e.test_stack import ROOT, Stack
from tests.factories import grey_image, image_bytes, tiny_artifact


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    artifact = tiny_artifact(tmp_path_factory.mktemp("artifact"))
    store = build_archive(artifact, "tiny", tmp_path_factory.mktemp("store")).parent
    running = Stack(store)
    yield running
    running.stop()


@pytest.fixture
def narrow_stack(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A stack with few places: how many the deadline leaves depends on the machine."""
    monkeypatch.setenv("OPENSET_MAX_IN_FLIGHT", "64")
    running = Stack(stack.store)
    yield running
    running.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images in two depths, one broken, and something else."""
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    for number in range(20):
        file = images / ("deeper" if number % 2 else ".") / f"{number:02}.png"
        file.write_bytes(image_bytes(grey_image(number)))
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "notes.txt").write_text("not asked about")
    return images


def client(stack: Stack, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "api.client", "predict", *arguments, "--url", str(stack.client.base_url), "--concurrency", "4",
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


def answers_so_far(stack: Stack) -> float:
    lines = stack.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("openset_outcomes_total"))  # fmt: skip


def test_folder_becomes_a_table_that_says_what_predict_says(stack: Stack, folder: Path) -> None:
    out = folder.parent / "results.csv"
    running = client(stack, str(folder), "--out", str(out))
    _, said = running.communicate()
    assert running.returncode == 0, said
    assert "1 refused" in said
    with out.open(newline="") as stream:
        rows = {row["path"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 21
    assert list(rows) == sorted(rows)
    assert rows[str(folder / "broken.jpg")]["problem"] == "/problems/unreadable-image"
    for number in (0, 1):
        image = image_bytes(grey_image(number))
        answer = stack.client.post("/predict", files={"image": image}).json()
        path = folder / ("deeper" if number % 2 else ".") / f"{number:02}.png"
        row = rows[str(path)]
        assert (row["label"], row["accepted"]) == (answer["label"], str(answer["accepted"]).lower())
        assert float(row["score"]) == pytest.approx(answer["score"], abs=1e-4)
        assert float(row["tau"]) == answer["tau"]


def test_killed_client_continues_without_asking_twice(stack: Stack, folder: Path) -> None:
    out = folder.parent / "results.parquet"
    journal = out.with_name(out.name + ".journal")
    before = answers_so_far(stack)
    first = client(stack, "-", "--out", str(out), stdin=subprocess.PIPE)
    assert first.stdin is not None
    sent = sorted(str(path) for path in folder.rglob("*.png"))[:7]
    first.stdin.write("".join(f"{path}\n" for path in sent))
    first.stdin.flush()
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not out.exists()
    second = client(stack, str(folder), "--out", str(out))
    _, said = second.communicate()
    assert second.returncode == 0, said
    assert "14 asked, 7 known from before" in said
    assert answers_so_far(stack) - before == 20
    from arro3.io import read_parquet

    table = read_parquet(out).read_all()
    assert table["status"].to_pylist().count(200) == 20
    assert not journal.exists()


def test_batch_answers_every_image_in_order_as_predict_does(stack: Stack) -> None:
    images = [image_bytes(grey_image(number)) for number in range(12)]
    images[5] = b"broken"
    files = [("images", (f"{number}.png", image)) for number, image in enumerate(images)]
    results = stack.client.post("/predict/batch", files=files).json()["results"]
    assert [item["status"] for item in results] == [422 if n == 5 else 200 for n in range(12)]
    for number in (0, 11):
        alone = stack.client.post("/predict", files={"image": images[number]}).json()
        assert results[number]["result"]["score"] == pytest.approx(alone["score"], abs=1e-4)


def test_overload_is_refused_with_a_time_to_come_back_and_the_rest_is_answered(
    narrow_stack: Stack,
) -> None:
    target = Target(str(narrow_stack.client.base_url))
    bodies = [image_bytes(grey_image(number)) for number in range(16)]

    async def run() -> tuple[Any, list[httpx.Response]]:
        capacity = (await closed_loop(target, bodies, connections=8, seconds=1.5)).rate
        # A burst beyond all places; asked beside the load, by a client that shows the headers.
        async with httpx.AsyncClient(base_url=target.url, timeout=60, trust_env=False) as beside:
            burst = asyncio.gather(
                *(
                    beside.post("/predict", content=bodies[0], headers=target.headers)
                    for _ in range(200)
                )
            )
            loaded = await open_loop(target, bodies, rate=3 * capacity, seconds=2.0)
            return loaded, await burst

    loaded, burst = asyncio.run(run())
    assert set(loaded.statuses.tolist()) <= {200, 503}  # nobody is left without an answer
    assert loaded.good.sum() > 0
    refused = [reply for reply in burst if reply.status_code == 503]
    assert refused
    for reply in refused:
        assert reply.json()["type"] == "/problems/overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.headers["content-type"] == "application/problem+json"
    assert narrow_stack.client.post("/predict", content=bodies[0], headers=target.headers).status_code == 200  # fmt: skip


def test_benchmark_smoke_run_fills_every_row_it_can(tmp_path: Path) -> None:
    file, figure = tmp_path / "bench.json", tmp_path / "curve.png"
    command = [sys.executable, "benchmarks/serve.py", "--quick", "--json", str(file), "--figure", str(figure)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["machine"]["cores"] >= 1
    assert all(len(curve) == 6 for curve in content["latency against load"].values())
    assert set(content["latency against load"]) == {
        f"lenet_plus_plus, {precision}, cpu" for precision in content["plan"]["precisions"]
    }
    for row in content["rows"]:
        assert set(row) == {
            "name", "value", "unit", "baseline", "against", "ratio", "aim", "met", "command",
        }  # fmt: skip
        if not row["name"].startswith(
            "   "
        ):  # there may be no refusal, or a failure, on a slow machine
            assert (row["value"] is None) == (row["command"] is not None), row["name"]
    names = " ".join(row["name"] for row in content["rows"])
    assert len({row["name"] for row in content["rows"]}) == len(content["rows"])
    for part in (
        "goodput", "p99 / p50", "p99.9", "added p50", "/calibrate", "requests/s", "batch endpoint", "stock handler",
    ):  # fmt: skip
        assert part in names
    assert figure.stat().st_size > 1000


def test_placement_of_threads_is_compared_on_stacks_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "threads.json"
    command = [sys.executable, "benchmarks/threads.py", "--quick", "--precision", "float32", "--json", str(file)]  # fmt: skip
    command += ["--settings", "bound", "free, asleep"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 8
    assert all(row["value"] > 0 for row in rows)
    for setting in ("bound", "free, asleep"):
        measured = [
            row["name"].split(",")[0] for row in rows if f"threads {setting}, lenet" in row["name"]
        ]
        assert sorted(measured) == [
            "images/s",
            "p99 at 1 connection",
            "p99 at 1 connection",
            "p99 at 70 % of capacity",
        ]
