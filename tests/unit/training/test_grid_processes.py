"""Several processes on one grid: each cell is trained once, cores are divided, and all end together."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.grid_runs import GLYPHS, finished_run, run_grid
from training import reproduce
from training.grid import processes, runner
from training.grid.plan import plan
from training.grid.processes import cores_of
from training.grid.rows import cell_columns, merge_rows, read_rows, results_file, stored_rows
from training.run_folder import RunInUse, claimed_run, locked_run

ROOT = Path(__file__).parents[3]
CELLS = {cell.loss: cell.name for cell in plan("glyphs", **GLYPHS)}


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training and evaluation that only leave rows; the cells that came to it, in order."""
    order: list[str] = []

    def finish(config, columns, runs: Path, *_: object):
        order.append(config.loss)
        return SimpleNamespace(folder=runs / config.name)

    monkeypatch.setattr(runner, "_finish", finish)
    monkeypatch.setattr(runner, "stored_rows", lambda _: [])
    monkeypatch.setattr(runner, "merge_rows", lambda *_: None)
    return order


@pytest.fixture
def cores() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_cell_of_another_process_is_left_alone_and_the_next_is_taken(
    tmp_path: Path, finished: list[str]
) -> None:
    with claimed_run(tmp_path / "runs" / CELLS["softmax"]):
        outcome = run_grid(tmp_path)
    assert finished == ["eos", "os"]
    assert outcome.left == [CELLS["softmax"]]


def test_failed_cell_is_not_left_for_another_process_to_fail_with(
    tmp_path: Path, finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims: dict[str, bool] = {}

    def finish(config: Any, *_: object) -> None:
        for name in CELLS.values():
            try:
                with claimed_run(tmp_path / "runs" / name):
                    claims[name] = False
            except RunInUse:
                claims[name] = True
        raise RuntimeError(f"out of memory for {config.loss}")

    monkeypatch.setattr(runner, "_finish", finish)
    assert len(run_grid(tmp_path).failed) == 3
    assert all(claims.values())  # as seen from the last cell
    with claimed_run(tmp_path / "runs" / CELLS["softmax"]):
        pass


def test_stack_leaves_cells_to_the_other_processes(
    tmp_path: Path, finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []

    def train_stack(configs: list[Any], **_: object) -> dict[str, Exception]:
        groups.append(len(configs))
        return {}

    monkeypatch.setattr(runner, "train_stack", train_stack)
    cells = plan("glyphs", **{**GLYPHS, "losses": ["softmax", "eos", "os", "cosface", "arcface"]})
    runner.reproduce(
        cells, data=None, runs=tmp_path / "runs", results=tmp_path / "results", device="cpu",
        stack=8, processes=2, show_progress=False,
    )  # fmt: skip
    assert groups[0] == 3


def test_what_the_others_did_counts_at_the_end(tmp_path: Path) -> None:
    cells = plan("glyphs", **GLYPHS)
    finished_run(tmp_path / "runs", cells[0])
    rows = stored_rows(tmp_path / "runs" / cells[0].name)
    diverged = [
        {**row, **cell_columns(cells[1], {"classes": rows[0]["classes"]}), "diverged": "diverged"}
        for row in rows[:1]
    ]
    merge_rows(results_file("glyphs", tmp_path / "results"), [*rows, *diverged])
    outcome = runner.Outcome(left=[cell.name for cell in cells])
    runner.update(outcome, cells, data=None, results=tmp_path / "results", device="cpu")
    assert outcome.found == [cells[0].name]
    assert outcome.diverged == [cells[1].name]
    assert outcome.left == [cells[2].name]


def test_claim_ends_with_the_cell(tmp_path: Path, finished: list[str]) -> None:
    run_grid(tmp_path)
    for name in CELLS.values():
        with claimed_run(tmp_path / "runs" / name):
            pass


def test_cell_that_was_finished_before_it_was_claimed_is_not_trained_again(
    tmp_path: Path, finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = runner._claim

    def late(folder: Path, claims: object) -> bool:
        if folder.name == CELLS["eos"]:
            monkeypatch.setattr(runner, "is_recorded", lambda columns, _: columns["loss"] == "eos")
        return claim(folder, claims)

    monkeypatch.setattr(runner, "_claim", late)
    outcome = run_grid(tmp_path)
    assert finished == ["softmax", "os"]
    assert outcome.found == [CELLS["eos"]]


def test_claim_and_lock_of_a_run_do_not_hinder_each_other(tmp_path: Path) -> None:
    with claimed_run(tmp_path / "run"):
        with locked_run(tmp_path / "run"):
            pass
        with pytest.raises(RunInUse), claimed_run(tmp_path / "run"):
            pass


@pytest.mark.parametrize(
    ("available", "count", "expected"),
    [
        ({0, 1, 2, 3}, 2, [{0, 1}, {2, 3}]),
        ({1, 3, 5, 7, 9}, 2, [{1, 3}, {5, 7, 9}]),
        ({0, 1}, 2, [{0}, {1}]),
        ({0, 1}, 3, [{0, 1}] * 3),
    ],
)
def test_cores_are_divided(
    monkeypatch: pytest.MonkeyPatch, available: set[int], count: int, expected: list[set[int]]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: available)
    assert cores_of(count) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "processes must be at least 1, got 0"),
        (["--processes", "2", "--again"], "--again is for one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    tmp_path: Path, arguments: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert reproduce.main(["--protocol", "glyphs", "--runs", str(tmp_path), *arguments]) == 1
    assert message in caplog.text


def sleeper(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers that only sleep, and end with 7 when they are told to."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        f"print('up', flush=True); time.sleep({seconds})"
    )
    start = subprocess.Popen

    def popen(_: object, **options: object) -> subprocess.Popen[bytes]:
        child = start([sys.executable, "-c", code], stdout=subprocess.PIPE, **options)
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        child.stdout.close()
        return child

    monkeypatch.setattr(processes.subprocess, "Popen", popen)


def test_an_error_here_ends_the_others(monkeypatch: pytest.MonkeyPatch, cores: set[int]) -> None:
    sleeper(600, monkeypatch)
    with pytest.raises(KeyboardInterrupt), processes.helpers([], 3, cores_of(3)) as children:
        raise KeyboardInterrupt
    assert [child.returncode for child in children] == [7, 7]
    assert processes.wait_for(children) == 7


def test_helper_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    helper = "from training.grid.processes import end_with_parent; import time; end_with_parent(); time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {helper!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    handle = os.pidfd_open(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ended, _, _ = select.select([handle], [], [], 60)
    if not ended:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    assert ended


def test_two_processes_train_every_cell_once(tmp_path: Path, cores: set[int]) -> None:
    arguments = [
        "--protocol", "glyphs", "--losses", "eos,softmax", "--seeds", "1", "--epochs", "1", "--option", "size=small",
        "--device", "cpu", "--processes", "2", "--quiet", "--runs", str(tmp_path / "runs"), "--results",
        str(tmp_path / "results"),
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "training.reproduce", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert {row["loss"] for row in read_rows(tmp_path / "results/glyphs.json")} == {
        "eos",
        "softmax",
    }
    assert ended.stderr.count(": training") == 2
    assert "process 2: cell 2 of 2" in ended.stderr
    assert ended.stderr.rstrip().endswith(
        "1 trained, 1 were there or came from the other processes, 0 diverged, 0 failed, 0 left"
    )
    assert (tmp_path / "results/glyphs.md").is_file()
