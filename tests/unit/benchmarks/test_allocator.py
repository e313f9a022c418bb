"""The benchmark of memory settings: processes that differ in their environment alone; targets that train have its best."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import allocator

ROOT = Path(__file__).parents[3]


def test_each_way_is_a_process_and_a_missing_library_is_an_empty_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"as it comes": {}, "memory kept": {"MALLOC_MMAP_MAX_": "0"}, "jemalloc": None}
    monkeypatch.setattr(allocator, "settings", lambda: ways)
    file = tmp_path / "rows.json"
    assert allocator.main(["--batch", "2", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"].rsplit(", ", 1)[1] for row in rows] == [*ways] * 2
    for usual, kept, missing in (rows[:3], rows[3:]):
        assert kept["ratio"] == pytest.approx(usual["value"] / kept["value"])
        assert kept["note"].startswith("peak ")
        assert missing["value"] is None
        assert "libjemalloc2" in missing["command"]


def test_a_process_has_the_environment_of_its_way_and_nothing_of_the_callers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    step = allocator.Step("lenet_plus_plus", 2, 28, 1, "float32")
    with allocator.worker(step, {"MALLOC_MMAP_MAX_": "0"}) as process:
        allocator.ask(process)
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    assert b"MALLOC_MMAP_MAX_=0" in environment
    assert not [line for line in environment if line.startswith((b"MALLOC_ARENA", b"THP_MEM"))]


def test_a_process_that_ends_is_an_error_that_says_what_to_do() -> None:
    step = allocator.Step("lenet_plus_plus", 2, 28, 1, "float32")
    with allocator.worker(step, {}) as process:
        process.kill()
        process.wait()  # so that there is nobody to write to
        with pytest.raises(RuntimeError, match=r"status -9; try a smaller --batch"):
            allocator.ask(process)


@pytest.mark.parametrize("target", ["train", "compare-losses", "cures", "recommend", "reproduce"])
def test_targets_that_train_keep_their_memory(target: str, tmp_path: Path) -> None:
    seen = tmp_path / "python"
    seen.write_text("#!/bin/sh\nenv\n")
    seen.chmod(0o755)
    command = ["make", "--assume-old=.venv/installed", target, f"PY={seen}", "CURE=scale"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    kept = {f"{name}={value}" for name, value in allocator.SETTINGS["memory kept"].items()}
    assert kept <= set(printed.stdout.splitlines())
