"""Rows of another machine and what lies beside them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from training.grid.merging import merge
from training.grid.results import group_rows, published_setting
from training.grid.rows import merge_rows, read_rows
from training.grid.summaries import Summary


def copy_evaluated(results: Path, target: Path, evaluated: str) -> Path:
    """The files of another machine, which evaluated the same models at another time."""
    shutil.copytree(results, target)
    rows = read_rows(target / "toy.json")
    (target / "toy.json").unlink()
    merge_rows(target / "toy.json", [row | {"evaluated": evaluated} for row in rows])
    for file in (target / "summaries").iterdir():
        replace(Summary.load(file), evaluated=evaluated).save(file)
    return target / "toy.json"


def test_summary_of_an_older_evaluation_does_not_take_the_place_of_ours(
    grid: Path, tmp_path: Path
) -> None:
    results = grid / "results"
    before = {file: file.read_bytes() for file in (results / "summaries").iterdir()}
    assert before
    merge(copy_evaluated(results, tmp_path / "older", "2025-01-01"), results)
    assert {file: file.read_bytes() for file in before} == before
    [entry, *_] = group_rows(read_rows(results / "toy.json"), tmp_path / "none", results)[published_setting("toy")]  # fmt: skip
    assert entry.replicates("unknowns", "softmax") is not None
    # A newer one does, and where theirs is damaged ours stays.
    newer = copy_evaluated(results, tmp_path / "newer", "2027-01-01")
    damaged, *others = sorted(before)
    (newer.parent / "summaries" / damaged.name).write_bytes(b"damaged")
    merge(newer, results)
    assert damaged.read_bytes() == before[damaged]
    assert {Summary.load(file).evaluated for file in others} == {"2027-01-01"}


def test_pictures_that_are_not_here_come_with_the_rows_that_stay(
    grid: Path, tmp_path: Path
) -> None:
    results = grid / "results"
    name = "toy-mnist-thesis-published-e15-{}-{}.png"
    ours = results / "figures" / name.format("eos", "false_positives")
    for time in ("2025-01-01", "2027-01-01"):
        other = copy_evaluated(results, tmp_path / time, time)
        for loss in ("eos", "cos_eos"):
            for kind in ("features", "false_positives", "thresholds"):
                (other.parent / "figures" / name.format(loss, kind)).write_text(time)
        ours.write_text("ours")
        merge(other, results)
        assert ours.read_text() == "ours"
        brought = results / "figures" / name.format("cos_eos", "false_positives")
        assert brought.exists() == (time == "2027-01-01")
    assert (results / "figures" / name.format("cos_eos", "features")).read_text() == "2027-01-01"
    assert not (results / "figures" / name.format("cos_eos", "thresholds")).exists()
