"""Rows by setting and loss: which belong together, and over what the intervals of means and differences are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.grid_runs import line_of, rows_of_cos_eos, section
from training.grid import pages, tables
from training.grid.formatting import difference_text
from training.grid.results import difference, group_rows, published_setting
from training.grid.rows import OTHER_DIGITS_GROUP, merge_rows, read_rows
from training.intervals import (
    percentile_interval,
    seed_difference_interval,
    seed_interval,
    widened,
)


def test_summary_of_another_evaluation_is_not_taken(grid: Path) -> None:
    shutil.rmtree(grid / "runs")
    rows = read_rows(grid / "results/toy.json")
    for row in rows:
        row["evaluated"] = "2026-01-02"
    [entry, *_] = group_rows(rows, grid / "runs", grid / "results")[published_setting("toy")]
    assert entry.replicates("unknowns", "softmax") is None


def test_options_that_all_in_a_table_have_are_named_once(grid: Path) -> None:
    rows = read_rows(grid / "results/toy.json")
    for row in rows:
        own = {"detach_radial": True} if row["loss"] == "cos_eos" else {}
        row["options"] = {**row["options"], "feature_dim": 64, **own}
    settings = group_rows(rows, grid / "runs", grid / "results")
    # Beside the published figures every option counts.
    published = settings[published_setting("toy")]
    assert not [entry.label for entry in published if "feature_dim=64" not in entry.label]

    ours = [row | {"preset": "modern"} for row in rows]
    settings = group_rows(ours, grid / "runs", grid / "results")
    several = [entries for entries in settings.values() if len(entries) > 1]
    assert several
    for entries in several:
        assert {entry.shared_text for entry in entries} == {"feature_dim=64"}
        labels = {entry.loss: entry.label for entry in entries}
        assert labels.pop("cos_eos") == "cos_eos (detach_radial=true)"
        assert all(loss == label for loss, label in labels.items())


def test_intervals_are_of_paired_replicates_and_of_seeds_paired_within_models(grid: Path) -> None:
    settings = group_rows(read_rows(grid / "results/toy.json"), grid / "runs", grid / "results")
    [first, second, *_] = settings[published_setting("toy")]
    ours, theirs = (entry.replicates("unknowns", "softmax") for entry in (first, second))
    assert ours is not None
    assert theirs is not None
    low, high = widened(percentile_interval(theirs["0.1"]), second.mean("0.1"), 10)
    assert second.over_classes("0.1") == pytest.approx((max(0.0, low), min(1.0, high)))
    found = difference(first, second, "0.1")
    assert found is not None
    expected = widened(percentile_interval(ours["0.1"] - theirs["0.1"]), found.value, 10)
    assert found.over_classes == pytest.approx(expected)
    values = [entry.values("0.1") for entry in (first, second)]
    assert found.over_seeds == pytest.approx(seed_difference_interval(*values))
    change = difference(second, second, "0.1", scores=("logit", "softmax"))
    assert change is not None
    by_seed = np.subtract(second.values("0.1", score="logit"), second.values("0.1"))
    assert change.value == pytest.approx(by_seed.mean())
    assert change.value != 0
    assert change.over_seeds == pytest.approx(seed_interval(by_seed.tolist()))
    line = line_of(tables.score_table([second]), second.label)
    assert line[9] == difference_text(change)


def test_stored_interval_is_that_of_one_model_and_not_of_several(grid: Path) -> None:
    for values, expected in (([0.8], True), ([0.8, 0.9], False)):
        rows = rows_of_cos_eos(grid, values, [0.5, 0.9])
        [entry] = group_rows(rows, grid / "none", grid / "none")[published_setting("toy")]
        assert (entry.over_classes("0.01") is not None) == expected


def test_score_of_an_older_evaluation_is_not_shown(grid: Path) -> None:
    rows = rows_of_cos_eos(grid, [0.8], None)
    older = [row | {"evaluated": "2025-01-01", "score": "former"} for row in rows]
    [entry] = group_rows(rows + older, grid / "none", grid / "none")[published_setting("toy")]
    assert entry.mean("0.01") == 0.8
    assert entry.mean("0.01", score="former") is None


def test_published_setting_is_what_the_thesis_trained() -> None:
    setting = published_setting("toy")
    assert setting.is_published
    for changes in (
        {"digits": "emnist"}, {"preset": "modern"}, {"as_published": False}, {"epochs": 1},
        {"classes": "10/5/5"}, {"data_options": (("image_size", 14),)},
    ):  # fmt: skip
        assert not replace(setting, **changes).is_published


def test_classes_of_a_figure_are_of_the_group_with_fewer() -> None:
    setting = replace(published_setting("toy"), classes="30/11/20")
    groups = ("unknowns", OTHER_DIGITS_GROUP, "negatives", "validation_negatives")
    assert [setting.class_count(group, "0.1") for group in groups] == [20, 20, 11, 11]
    assert setting.class_count("unknowns", "accuracy") == 30
    assert replace(setting, classes="10/11/20").class_count("unknowns", "0.1") == 10


def test_interval_of_a_difference_stays_within_what_is_possible(
    grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = group_rows(read_rows(grid / "results/toy.json"), grid / "runs", grid / "results")
    [first, second, *_] = entries[published_setting("toy")]
    monkeypatch.setattr("training.grid.results.widened", lambda *_: (-1.2, 1.009))
    found = difference(first, second, "0.1")
    assert found is not None
    assert found.over_classes == (-1.0, 1.0)
    assert first.over_classes("0.1") == (0.0, 1.0)


def test_scores_of_another_evaluation_are_not_mixed_with_the_rows(grid: Path) -> None:
    setting = published_setting("toy")
    rows = read_rows(grid / "results/toy.json")
    for row in rows:
        if row["loss"] == "eos":
            row["evaluated"] = "2026-01-02"  # evaluated again, elsewhere
    entries = {
        entry.loss: entry for entry in group_rows(rows, grid / "runs", grid / "results")[setting]
    }
    assert entries["cos_eos"].replicates("unknowns", "softmax") is not None
    assert entries["eos"].replicates("unknowns", "softmax") is None
    assert entries["eos"].over_classes("0.1") is None
    assert entries["eos"].mean("0.1") is not None


def test_mean_needs_every_seed_to_reach_the_rate(grid: Path) -> None:
    rows = read_rows(grid / "results/toy.json")
    for row in rows:
        if (row["loss"], row["seed"]) == ("eos", 2):
            row["ccr_at_fpr"]["0.1"]["value"] = None
    merge_rows(grid / "other/toy.json", rows)
    pages.write("toy", runs=grid / "none", results=grid / "other")
    text = (grid / "other/toy.md").read_text()
    line = line_of(section(text, "## The thesis' table 6.1 and ours"), "eos")
    assert line[7] == "– (1 of 2 seeds reach it)"
