"""Rows gather over runs and machines: nothing is lost, nothing is mixed up."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.grid_runs import as_before, cells, finished_run
from training.evaluation import REPORT
from training.grid.rows import is_recorded, merge_rows, read_rows, row_key, stored_rows


def row(value: float = 0.9, evaluated: str = "2026-01-01T00:00:00+00:00", **changes: Any) -> dict:
    cell = {"value": value, "interval": [0.1, 0.2], "interval_clustered": None}
    return {
        "protocol": "toy", "loss": "cos_eos", "options": {"as_published": True}, "preset": "thesis", "seed": 1,
        "epochs": 15, "digits": "mnist", "classes": "10/11/11", "group": "unknowns", "score": "softmax",
        "rule": "strict", "ccr_at_fpr": {"0.01": cell}, "ccr_at_zero_fpr": 0.123456789,
        "accuracy": {"value": 0.99, "interval": [0.98, 1.0]}, "foreign_count": 8144, "run": "somewhere",
        "commit": "abc", "device": "cpu", "precision": "float32", "evaluated": evaluated,
    } | changes  # fmt: skip


def values(rows: list[dict]) -> list[float]:
    return [one["ccr_at_fpr"]["0.01"]["value"] for one in rows]


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "eos"}, {"options": {}}, {"preset": "modern"}, {"seed": 2}, {"epochs": 5}, {"digits": "emnist"},
        {"classes": "6/12/40"}, {"group": "negatives"}, {"score": "logit"}, {"protocol": "toy_vis"},
        {"precision": "bfloat16"},
    ],
)  # fmt: skip
def test_rows_of_different_experiments_stand_side_by_side(tmp_path: Path, change: dict) -> None:
    file = tmp_path / "toy.json"
    merge_rows(file, [row()])
    merge_rows(file, [row(0.5, **change)])
    assert sorted(values(read_rows(file))) == [0.5, 0.9]


def test_later_evaluation_of_the_same_row_wins_whatever_the_order_of_merging(
    tmp_path: Path,
) -> None:
    old, new = row(0.5, "2026-01-01T00:00:00+00:00"), row(0.9, "2026-01-02T00:00:00+00:00")
    for number, pair in enumerate([(old, new), (new, old)]):
        file = tmp_path / f"{number}.json"
        for one in pair:
            merge_rows(file, [one])
        assert values(read_rows(file)) == [0.9]


def test_file_is_deterministic_a_line_a_row_ranked_and_rounded(tmp_path: Path) -> None:
    rows = [row(seed=2), row(loss="softmax"), row(), row(loss="eos")]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    merge_rows(first, rows)
    merge_rows(second, rows[::-1])
    assert first.read_bytes() == second.read_bytes()
    lines = first.read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    ordered = json.loads(first.read_text())["rows"]
    assert [(one["loss"], one["seed"]) for one in ordered] == [
        ("cos_eos", 1), ("cos_eos", 2), ("eos", 1), ("softmax", 1),
    ]  # fmt: skip
    assert ordered[0]["ccr_at_zero_fpr"] == 0.123457


def test_column_of_an_earlier_release_goes_when_the_file_is_written(tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    former = row(is_recommended=False)
    file.write_text(json.dumps({"schema": 1, "protocol": "toy", "rows": [former]}))
    merge_rows(file, [row(seed=2, is_recommended=True)])
    assert [set(one) for one in read_rows(file)] == [set(row())] * 2


def test_key_does_not_depend_on_the_order_of_options() -> None:
    one = row(options={"a": 1, "b": 2})
    other = row(options={"b": 2, "a": 1})
    assert row_key(one) == row_key(other)


def test_writers_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    writers = [
        threading.Thread(target=merge_rows, args=(file, [row(seed=seed)])) for seed in range(12)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(one["seed"] for one in read_rows(file)) == list(range(12))


@pytest.mark.parametrize(
    "content", ["{", '{"schema": 1}', '{"schema": 1, "rows": [{"loss": "eos"}]}', "[]"]
)
def test_damaged_file_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    file = tmp_path / "toy.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"toy\.json does not hold rows"):
        merge_rows(file, [row()])
    assert file.read_text() == content


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    file.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match="schema 2, this release reads 1"):
        read_rows(file)


def test_cell_is_recorded_once_its_rows_have_the_scores_that_are_asked_for() -> None:
    columns = {key: value for key, value in row().items() if key != "score"} | {"scores": ["ghost"]}
    assert not is_recorded(columns, [row()])
    assert is_recorded(columns, [row(), row(score="ghost")])
    assert is_recorded(columns | {"scores": []}, [row()])
    assert not is_recorded(columns | {"scores": []}, [row(seed=2)])
    assert is_recorded(columns, [row() | {"diverged": "loss is nan"}])


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "toy.json") == []


def test_later_report_of_a_run_changes_no_row(tmp_path: Path) -> None:
    file = tmp_path / "results/toy.json"
    folders = [finished_run(tmp_path / "runs", cell) for cell in cells("eos")]
    report = as_before(folders[0])  # which of the two evaluations it is of cannot be told
    found = [row for folder in folders for row in stored_rows(folder)]
    merge_rows(file, found)
    before = file.read_bytes()
    changed = json.loads(report.read_text())
    changed["accuracy"]["value"] = 0.5
    for folder in folders:
        (folder / REPORT).write_text(json.dumps(changed))
    again = [row for folder in folders for row in stored_rows(folder)]
    assert {row["accuracy"]["value"] for row in again if row["seed"] == 2} != {0.5}
    assert {row["accuracy"]["value"] for row in again if row["seed"] == 1} == {0.5}
    merge_rows(file, again)
    assert file.read_bytes() == before
