"""When the supervisor heals, and when it must not. The model server is a fake; the real one is healed in the e2e tests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from serving import supervisor as supervisor_module
from serving.configuration import ServingSettings
from serving.supervisor import Supervisor
from serving.torchserve import NoPlaceInQueue, TorchServeFailed

READY = {"workers": [{"status": "READY"}]}


class FakeServer:
    alive = True


class FakeClient:
    """Answers each canary with the next of ``answers``, the last one repeats; each would come after ``wait_s``."""

    def __init__(self, answers: list[Any], described: Any = READY, wait_s: float = 0) -> None:
        self.answers, self.described, self.wait_s = answers, described, wait_s
        self.asked = 0
        self.scaled: list[int] = []

    async def predict(self, image: bytes, timeout_s: float) -> dict[str, Any]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if self.wait_s > timeout_s:
            raise TimeoutError
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def describe(self) -> dict[str, Any]:
        if isinstance(self.described, Exception):
            raise self.described
        return self.described

    async def scale(self, workers: int) -> None:
        self.scaled.append(workers)


async def watched(client: FakeClient, run_dir: Path, canaries: int) -> Supervisor:
    """A supervisor that has watched until ``canaries`` were asked."""
    (run_dir / "tiny.mar").touch()
    settings = ServingSettings(model="tiny", model_store=run_dir, run_dir=run_dir)
    supervisor = Supervisor(settings, watch_seconds=0)
    supervisor.client, supervisor.server = client, FakeServer()  # type: ignore[assignment]
    watching = asyncio.create_task(supervisor.watch())
    while client.asked < canaries and not watching.done():
        await asyncio.sleep(0)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    if watching.done() and not watching.cancelled() and watching.exception():
        raise watching.exception()  # type: ignore[misc]
    return supervisor


async def test_full_queue_of_healthy_workers_is_left_alone(tmp_path: Path) -> None:
    client = FakeClient([NoPlaceInQueue("full")])
    assert (await watched(client, tmp_path, 20)).healed == 0
    assert client.scaled == []


async def test_canary_waits_behind_all_whom_a_long_deadline_admits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSET_DEADLINE_S", "60")
    client = FakeClient([{}], wait_s=75)
    assert (await watched(client, tmp_path, 20)).healed == 0
    assert client.scaled == []


async def test_canary_of_a_healed_model_waits_behind_what_had_queued_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSET_DEADLINE_S", "60")
    client = FakeClient([*[aiohttp.ClientConnectionError("refused")] * 3, {}], wait_s=75)
    assert (await watched(client, tmp_path, 5)).healed == 1


async def test_canary_that_waits_beyond_deadline_and_response_timeout_counts_as_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSET_DEADLINE_S", "60")
    client = FakeClient([{}], wait_s=85)
    with pytest.raises(TorchServeFailed, match="could not be healed"):
        await watched(client, tmp_path, 20)
    assert client.scaled == [0, 1]


@pytest.mark.parametrize("described", [{"workers": []}, {"workers": [{"status": "UNLOADING"}]}])
async def test_no_place_for_want_of_workers_is_healed(tmp_path: Path, described: Any) -> None:
    client = FakeClient([*[NoPlaceInQueue("no worker")] * 3, {}], described)
    assert (await watched(client, tmp_path, 5)).healed == 1
    assert client.scaled == [0, 1]


async def test_three_failures_in_a_row_heal_and_two_do_not(tmp_path: Path) -> None:
    failure = aiohttp.ClientConnectionError("refused")
    seldom = FakeClient([failure, failure, {}, failure, failure, {}])
    assert (await watched(seldom, tmp_path, 12)).healed == 0
    assert (await watched(FakeClient([failure] * 3 + [{}]), tmp_path, 5)).healed == 1


async def test_healing_that_does_not_help_ends_the_watch(tmp_path: Path) -> None:
    client = FakeClient([TimeoutError()])
    with pytest.raises(TorchServeFailed, match="could not be healed"):
        await watched(client, tmp_path, 100)


class StartedServer(FakeServer):
    process = None

    async def start(self) -> None:
        pass


class DyingWorkers(FakeClient):
    """Every look finds the next of ``pids``, never ready; -1 is a worker that has no process yet."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__([{}])
        self.pids = iter(pids)

    async def describe(self) -> dict[str, Any]:
        pid = next(self.pids, None)
        return READY if pid is None else {"workers": [{"status": "UNLOADING", "pid": pid}]}


async def started(client: FakeClient, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "tiny.mar").touch()
    monkeypatch.setattr(supervisor_module, "_POLL_SECONDS", 0)
    supervisor = Supervisor(ServingSettings(model="tiny", model_store=run_dir, run_dir=run_dir))
    supervisor.client, supervisor.server = client, StartedServer()  # type: ignore[assignment]
    await supervisor.start()


async def test_worker_that_dies_again_and_again_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TorchServeFailed, match="died 3 times during the start"):
        await started(DyingWorkers([-1, 11, 11, -1, 12, 13, 14, 14]), tmp_path, monkeypatch)


async def test_slow_start_with_a_death_or_two_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(DyingWorkers([-1, -1, 11, 11, -1, 12, 13, 13, 13]), tmp_path, monkeypatch)


async def test_refused_instance_does_not_write_over_the_status_of_the_one_that_runs(
    tmp_path: Path,
) -> None:
    (tmp_path / "tiny.mar").touch()
    settings = ServingSettings(model="tiny", model_store=tmp_path, run_dir=tmp_path)
    (tmp_path / "status.json").write_text("the other's")
    await Supervisor(settings).stop()
    assert (tmp_path / "status.json").read_text() == "the other's"
