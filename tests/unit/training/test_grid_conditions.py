"""The thesis' tables of images and hyperparameters beside ours."""

from __future__ import annotations

import pytest

from training.grid.conditions import own_hyperparameters, sections
from training.grid.plan import all_classes
from training.protocols import get_protocol
from training.published import published_counts, published_hyperparameters

FOUND = {
    part: {"known": 1000, "negative": 20, "unknown": 3} for part in ("train", "validation", "test")
}


@pytest.mark.parametrize("protocol", ["toy", "toy_vis", "p1", "p2", "p3"])
def test_defaults_of_the_thesis_preset_are_those_of_table_5_2(protocol: str) -> None:
    published, ours = published_hyperparameters(protocol), own_hyperparameters(protocol)
    used = {name: value for name, value in published.items() if value is not None}
    assert used == {name: ours[name] for name in used}


@pytest.mark.parametrize("protocol", ["p1", "p2", "p3"])
def test_published_test_parts_have_fifty_images_a_class(protocol: str) -> None:
    lists = get_protocol(protocol)
    assert published_counts(protocol)["test"] == {
        group: 50 * len(getattr(lists, group)) for group in ("known", "negative", "unknown")
    }


def test_counts_stand_beside_those_of_the_newest_run_on_all_classes() -> None:
    newest = {"classes": all_classes("toy"), "evaluated": "2026-02", "counts": FOUND}
    older = newest | {"evaluated": "2026-01", "counts": {}}
    restricted = older | {"classes": "2/1/1", "evaluated": "2027"}
    rows = [older, newest, restricted]
    text = "\n".join(sections("toy", rows))
    assert "| train, known | 48,000 | 1,000 |" in text
    assert "| test, unknown | 8,800 | 3 |" in text
    assert "train, unknown" not in text  # there are none
    assert "| m mult | 1.2 | 1.2 |" in text
    assert "| learning rate | 0.001 | 0.001 |" in text


def test_without_a_run_on_all_classes_ours_stays_empty() -> None:
    text = "\n".join(sections("p2", [{"classes": "2/1/1", "evaluated": "2026", "counts": FOUND}]))
    assert "| train, negative | 31,794 |  |" in text
    assert "| m mult | – | 1.2 |" in text
    assert sections("glyphs", []) == []
