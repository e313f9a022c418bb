"""The benchmark of packing, on the small network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import packing
from openset.packing import can_pack


@pytest.mark.skipif(not can_pack("float32"), reason="this torch has no oneDNN")
def test_eager_and_packed_are_measured_for_every_size(tmp_path: Path) -> None:
    target = tmp_path / "packing.json"
    small = ["--networks", "lenet_plus_plus", "--batches", "1", "3", "--threads", "1", "--repeats", "2"]  # fmt: skip
    assert packing.main([*small, "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    float32 = [row for row in rows if "float32" in row["name"]]
    assert [row["name"].split(", ", 2)[2] for row in float32] == [
        "1 threads, batch 1, packed",
        "1 threads, batch 3, packed",
    ]
    assert all(
        row["ratio"] == pytest.approx(row["value"] / row["baseline"], abs=0.01) for row in rows
    )
