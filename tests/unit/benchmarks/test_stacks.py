"""The benchmark of models side by side runs, and says what it compares. On a CPU, a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import stacks


def test_rows_compare_models_side_by_side_with_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_WARM_UP", 1)
    file = tmp_path / "rows.json"
    command = [
        "--device",
        "cpu",
        "--stacks",
        "1",
        "2",
        "--steps",
        "1",
        "--images",
        "96",
        "--json",
        str(file),
    ]
    assert stacks.main(command) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "1 model, bfloat16, not recorded, cpu",
        *(f"{count} side by side, {precision}, in turns, cpu" for precision in ("bfloat16", "float32") for count in (1, 2)),
    ]  # fmt: skip
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


def test_too_few_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stacks.main(["--device", "cpu", "--images", "31"])
    assert "--images must be at least" in capsys.readouterr().err
