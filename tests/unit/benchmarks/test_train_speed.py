"""The training benchmark runs, and says of every row either what was measured or how to measure it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.train import main
from benchmarks.training.rows import TABLE_BEGINS, TABLE_ENDS, Row, Table


@pytest.mark.filterwarnings("ignore:os.fork:DeprecationWarning")
def test_rows_hold_a_measurement_or_the_command_that_makes_it(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    arguments = ["--quick", "--only", "toy", "losses", "metrics", "photographs", "--device", "cpu"]
    assert main([*arguments, "--json", str(file), "--markdown", str(tmp_path / "speed.md")]) == 0
    content = json.loads(file.read_text())
    assert content["machine"]["cores"] >= 1
    names = [row["name"] for row in content["rows"]]
    for part in ("glyphs epoch", "head + arc_eos", "OSCR + CCR@FPR", "ResNet-50, GPU"):
        assert any(part in name for name in names), part
    for row in content["rows"]:
        assert (row["value"] is None) <= bool(row["command"] or row["note"]), row["name"]
        assert (row["met"] is None) or row["aim"], row["name"]
    assert (tmp_path / "speed.md").read_text().count("\n") == len(names) + 2


def test_rows_are_on_disk_before_the_next_is_measured(tmp_path: Path) -> None:
    table = Table(json=tmp_path / "speed.json", markdown=tmp_path / "speed.md")
    for number in range(1, 3):
        table.add([Row(f"row {number}", 1.0, "s", "")])
        assert len(json.loads((tmp_path / "speed.json").read_text())["rows"]) == number
        assert f"row {number}" in (tmp_path / "speed.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md"]


def test_page_written_by_hand_keeps_what_stands_around_its_table(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\n{TABLE_BEGINS}\nold\n{TABLE_ENDS}\n\n**What is missed.**\n")
    for _ in range(2):
        Table(markdown=page).add([Row("a row", 1.0, "s", "")])
    text = page.read_text()
    assert text.startswith(f"# Speed\n\n{TABLE_BEGINS}\n\n| measured |")
    assert text.endswith(f"\n\n{TABLE_ENDS}\n\n**What is missed.**\n")
    assert text.count("a row") == 1
    assert "old" not in text
