"""Figures, intervals and differences as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.grid_runs import rows_of_cos_eos
from training.grid.formatting import difference_text, figure_text, interval_text, number
from training.grid.results import Difference, group_rows, published_setting


def test_difference_is_bold_where_both_intervals_exclude_zero() -> None:
    up, down, across = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)
    assert difference_text(Difference(0.2, up, up)) == "**+.2000** ±.1000 [.100, .300]"
    assert difference_text(Difference(-0.2, down, down)) == "**−.2000** ±.1000 [−.300, −.100]"
    assert difference_text(Difference(0.2, up, across)) == "+.2000 ±.1000 [−.100, .300]"
    assert difference_text(Difference(0.1, across, up)) == "+.1000 ±.2000 [.100, .300]"
    assert difference_text(Difference(0.2, None, up)) == "+.2000 [.100, .300]"
    assert difference_text(None) == "–"


def test_figure_has_the_half_width_of_its_interval_over_seeds(grid: Path) -> None:
    rows = rows_of_cos_eos(grid, [0.8, 0.9], None)
    [entry] = group_rows(rows, grid / "none", grid / "none")[published_setting("toy")]
    assert figure_text(entry, "0.01") == ".8500 ±.6353"  # 12.706 standard errors of .05


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.98494, ".9849"), (1.0, "1.0000"), (0.0, ".0000"), (-0.25, "−.2500"), (-0.00001, ".0000"), (None, "–")],
)  # fmt: skip
def test_numbers_are_written_as_in_the_thesis(value: float | None, text: str) -> None:
    assert number(value) == text


def test_intervals_have_three_digits() -> None:
    assert interval_text((0.97006, 1.0)) == "[.970, 1.000]"
    assert interval_text(None) == ""
