"""The benchmark of models side by side runs, and says what it compares. On a CPU, a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import stacks


def test_rows_say_how_long_a_step_of_one_model_takes_while_all_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_WARM_UP", 1)
    taken: list[tuple[int, int]] = []
    take_steps = stacks.take_steps

    def counted(running: list[Any], count: int) -> float:
        take_steps(running, count)
        taken.append((len(running), count))
        return 0.002 * count  # of all together, however many

    monkeypatch.setattr(stacks, "take_steps", counted)
    file = tmp_path / "rows.json"
    options = "--device cpu --stacks 1 2 --steps 2 --images 96 --json"
    assert stacks.main([*options.split(), str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "1 model, bfloat16, not recorded, cpu",
        *(f"{count} side by side, {precision}, in turns, cpu" for precision in ("bfloat16", "float32") for count in (1, 2)),
    ]  # fmt: skip
    assert [row["value"] for row in rows] == pytest.approx([2000, 2000, 1000, 2000, 1000])
    assert [row["ratio"] for row in rows] == pytest.approx([1, 1, 2, 1, 2])
    assert taken == [(count, steps) for count in (1, 1, 2, 1, 2) for steps in (1, 2)]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--images", "31"], "--images must be at least 32"),
        (["--steps", "0"], "at least 1"),
        (["--stacks", "4", "0"], "at least 1"),
    ],
)
def test_sizes_that_measure_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], mistake: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        stacks.main(["--device", "cpu", *mistake])
    assert message in capsys.readouterr().err
