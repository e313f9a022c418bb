"""What the commands take for seeds."""

from __future__ import annotations

import argparse

import pytest

from training import cures, recommend, reproduce
from training.choices import seed_count_or_list, seed_list
from training.grid.plan import plan


def test_seeds_are_counted_or_named() -> None:
    arguments = {"losses": ["eos"], "digits": ["mnist"]}
    assert [cell.seed for cell in plan("toy", **arguments, seeds=3)] == [1, 2, 3]
    assert [cell.seed for cell in plan("toy", **arguments, seeds=[3, 1])] == [3, 1]
    for text, seeds in (
        ("2-3", [2, 3]),
        ("3-3", [3]),
        ("1,2,3", [1, 2, 3]),
        ("4,1-2,2", [4, 1, 2]),
    ):
        assert seed_count_or_list(text) == seed_list(text) == seeds
    # A number alone is how many to the grid, and which one to cures and recommend.
    assert seed_count_or_list("3") == [1, 2, 3]
    assert seed_list("3") == [3]


def test_seeds_are_named_alike_by_all_commands() -> None:
    grid = ["--protocol", "toy", "--seeds"]
    for text in ("1,2,3", "1-3"):
        assert reproduce.build_parser().parse_args([*grid, text]).seeds == [1, 2, 3]
        assert recommend.build_parser().parse_args(["--seeds", text]).seeds == [1, 2, 3]
        assert cures.build_parser().parse_args(["--cure", "scale", "--seeds", text]).seeds == [
            1,
            2,
            3,
        ]
    assert recommend.build_parser().parse_args([]).seeds == [42]
    assert reproduce.build_parser().parse_args(grid[:2]).seeds == [1, 2, 3]


@pytest.mark.parametrize("text", ["3-2", "-1", "two", "2-", "1,", "1;2", ""])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    for parse in (seed_list, seed_count_or_list):
        with pytest.raises(argparse.ArgumentTypeError, match=f"2-3.*, got '{text}'"):
            parse(text)


@pytest.mark.parametrize("text", ["0", "0-2", "1,0"])
def test_grid_counts_its_seeds_from_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 on .*, got '{text}'"):
        seed_count_or_list(text)
