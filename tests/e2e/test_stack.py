"""The real thing: TorchServe and the gateway as processes, driven with httpx."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from openset.artifact import load_artifact
from openset.classifier import SCORE_TOLERANCE
from serving.archive import build_archive
from serving.configuration import ServingSettings, device_defaults
from serving.torchserve import ManagementClient
from tests.factories import grey_image, image_bytes, tiny_artifact

ROOT = Path(__file__).parents[2]
PNG = {"content-type": "image/png"}


class Stack:
    """A running ``python -m serving.stack``."""

    def __init__(self, store: Path, *arguments: str) -> None:
        self.store = store
        self.run_dir = Path(tempfile.mkdtemp(prefix="os-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = self.run_dir / "log"
        command = [
            sys.executable, "-m", "serving.stack", "--model", "tiny", "--model-store", str(store), "--device", "cpu",
            "--run-dir", str(self.run_dir), "--port", str(self.port), "--java-heap", "512m", *arguments,
        ]  # fmt: skip
        # Nobody can write there, root neither: as in a container with a read-only root.
        environment = {**os.environ, "HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=environment
            )
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False
        )
        self.wait_for_text("ready: ")

    def wait_for_text(self, text: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def model_worker(self) -> psutil.Process:
        return next(
            p
            for p in self.children()
            if any("model_service_worker" in part for part in p.cmdline())
        )

    def stop(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(90)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def store(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(artifact, "tiny", tmp_path_factory.mktemp("store")).parent


@pytest.fixture(scope="module")
def stack(store: Path) -> Iterator[Stack]:
    running = Stack(store, "--gateway-processes", "2")
    yield running
    running.stop()


def predict(client: httpx.Client, image: bytes, query: str = "") -> dict[str, Any]:
    reply = client.post(f"/predict{query}", content=image, headers=PNG)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def outcome_counts(client: httpx.Client) -> dict[str, float]:
    return {
        outcome: float(count)
        for outcome, count in re.findall(
            r'openset_outcomes_total\{outcome="(\w+)"\} (\S+)', client.get("/metrics").text
        )
    }


def test_known_gets_its_label_and_the_rest_is_unknown(stack: Stack, artifact: Path) -> None:
    classifier = load_artifact(artifact)
    factory = classifier.card.factory
    assert factory is not None
    candidates = [
        grey_image(seed) * (np.arange(28)[:, None] < 2 + seed % 26) for seed in range(400)
    ]
    images = torch.stack([classifier.preprocessing.from_array(array) for array in candidates])
    prediction = classifier.predict(images)
    scores, predictions = prediction.scores[factory["score_type"]].numpy(), prediction.predictions
    clear = np.abs(scores - factory["tau"]) > SCORE_TOLERANCE["float32"]
    chosen = np.concatenate(
        [
            np.flatnonzero(clear & side)[:8]
            for side in (scores >= factory["tau"], scores < factory["tau"])
        ]
    )
    assert len(chosen) == 16
    answers = [predict(stack.client, image_bytes(candidates[index])) for index in chosen]
    np.testing.assert_allclose(
        [answer["score"] for answer in answers],
        scores[chosen],
        atol=SCORE_TOLERANCE["float32"],
        rtol=0,
    )
    expected = [str(int(predictions[index])) for index in chosen[:8]] + ["unknown"] * 8
    assert [answer["label"] for answer in answers] == expected


def clients_of_every_gateway_process(stack: Stack, processes: int) -> list[httpx.Client]:
    """Clients with an open connection each, until every process of the gateway holds one of them."""
    clients: list[httpx.Client] = []
    for _ in range(100):
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{stack.port}", timeout=60, trust_env=False
        )
        client.get("/livez").raise_for_status()
        clients.append(client)
        holders = {
            child.pid
            for child in stack.children()
            for connection in child.net_connections("tcp")
            if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == stack.port
        }
        if len(holders) == processes:
            return clients
    raise AssertionError(f"connections landed on processes {holders} only")


def test_calibrate_is_seen_by_every_gateway_process_at_once(stack: Stack) -> None:
    both = clients_of_every_gateway_process(stack, 2)
    for fpr in (0.1, 0.02, 0.05, 0.01):
        body = stack.client.post(f"/calibrate?fpr={fpr}").json()
        tau = body["operating_point"]["tau"]
        seen = {predict(client, image_bytes())["tau"] for client in both}
        assert seen == {tau}
    for client in both:
        client.close()


def test_concurrent_requests_with_bad_images_among_them(stack: Stack) -> None:
    async def run() -> list[int]:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{stack.port}", timeout=60, trust_env=False
        ) as client:
            bad = image_bytes(format="JPEG")[:300]
            bodies = [bad if number % 4 == 3 else image_bytes() for number in range(32)]
            replies = await asyncio.gather(
                *(client.post("/predict", content=body, headers=PNG) for body in bodies)
            )
            return [reply.status_code for reply in replies]

    assert asyncio.run(run()) == [422 if number % 4 == 3 else 200 for number in range(32)]


def test_own_target_and_angles(stack: Stack) -> None:
    body = predict(stack.client, image_bytes(), "?fpr=0.2&angles=all&top_k=3")
    assert body["calibration"]["id"] is None
    assert (len(body["angles"]), len(body["top_k"])) == (10, 3)


def test_metrics_count_each_outcome(stack: Stack) -> None:
    before = outcome_counts(stack.client)
    outcome = "accepted" if predict(stack.client, image_bytes())["accepted"] else "unknown"
    after = outcome_counts(stack.client)
    assert after[outcome] == before.get(outcome, 0) + 1


def test_readiness_model_docs_and_page(stack: Stack) -> None:
    assert stack.client.get("/readyz").json()["status"] == "ready"
    assert stack.client.get("/model").json()["card"]["loss"] == "cos_eos"
    docs = stack.client.get("/docs")
    assert docs.status_code == 200
    assets = re.findall(r"(?:src|href)=\"([^\"]+)\"", docs.text)
    assert assets
    for asset in assets:
        assert asset.startswith("/"), asset  # the gateway's own, not a content network's
        assert stack.client.get(asset).status_code == 200, asset
    assert "openset-serve" in stack.client.get("/").text


def test_sockets_are_private(stack: Stack) -> None:
    for name in ("ts/inference.sock", "admin/management.sock"):
        assert (stack.run_dir / name).stat().st_mode & 0o007 == 0


def test_settings_are_what_torchserve_runs_with(stack: Stack, store: Path) -> None:
    settings = ServingSettings(
        model="tiny",
        model_store=store,
        run_dir=stack.run_dir,
        workers=device_defaults("cpu")["workers"],
    )
    described = asyncio.run(ManagementClient(settings).describe())
    for key, value in settings.read_back().items():
        if key in described:
            assert described[key] == value, key
    assert {"batchSize", "maxBatchDelay", "responseTimeout"} <= described.keys()


def test_killed_worker_heals_and_no_answer_is_wrong(stack: Stack) -> None:
    before = predict(stack.client, image_bytes())
    os.kill(stack.model_worker().pid, signal.SIGKILL)
    deadline = time.monotonic() + 600
    while True:
        reply = stack.client.post("/predict", content=image_bytes(), headers=PNG)
        if reply.status_code == 200:
            break
        assert reply.status_code in (503, 504), reply.text
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert reply.json()["score"] == pytest.approx(before["score"], abs=SCORE_TOLERANCE["float32"])


def test_model_without_workers_is_healed(stack: Stack, store: Path) -> None:
    """What TorchServe itself leaves for ever: it accepts requests and nobody works on them."""
    settings = ServingSettings(model="tiny", model_store=store, run_dir=stack.run_dir)
    asyncio.run(ManagementClient(settings).scale(0))
    stack.wait_for_text("restarting the workers")
    deadline = time.monotonic() + 600
    while stack.client.post("/predict", content=image_bytes(), headers=PNG).status_code != 200:
        assert time.monotonic() < deadline, stack.log.read_text()
        time.sleep(0.5)


def test_second_stack_on_the_same_port_is_refused(stack: Stack, store: Path) -> None:
    command = [
        sys.executable, "-m", "serving.stack", "--model", "tiny", "--model-store", str(store), "--device", "cpu",
        "--run-dir", str(stack.run_dir / "second"), "--port", str(stack.port),
    ]  # fmt: skip
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{stack.port}" in ended.stderr
    assert stack.client.get("/readyz").status_code == 200


def test_page_in_a_real_browser(stack: Stack, tmp_path: Path) -> None:
    import shutil

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", f"{stack.client.base_url}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "tiny: 10 known classes" in done.stdout, done.stderr[-2000:]
    assert "expected CCR" in done.stdout


def test_restart_keeps_the_operating_point_and_leaves_no_orphan(store: Path) -> None:
    first = Stack(store)
    tau = first.client.post("/calibrate?fpr=0.07").json()["operating_point"]["tau"]
    family = first.children()
    assert first.stop() == 0
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert len(gone) >= 3
    assert not list(first.run_dir.rglob("*.sock"))
    second = Stack(store)
    assert predict(second.client, image_bytes())["tau"] == tau
    # kill -9 of the parent: the children are told by the kernel.
    family = second.children()
    second.client.close()
    second.process.kill()
    second.process.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
