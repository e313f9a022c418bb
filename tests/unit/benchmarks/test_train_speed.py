"""The training benchmark runs, and says of every row either what was measured or how to measure it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.train import main


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
