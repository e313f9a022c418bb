"""What counts towards the aims, and how far they are."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.grid_runs import Judged, cells, finished_run, section, settings_of, written
from training.choices import seed_count_or_list
from training.grid.aims import Aim, aims, aims_table, recommended_score
from training.grid.formatting import difference_text, name_text, number, signed
from training.grid.results import COLUMNS, difference, group_rows
from training.grid.rows import read_rows


def aims_of(*entries: Judged) -> dict[tuple[str, str], Aim]:
    """By source of the digits and first word of the figure; the last of those with an aim: of the published code."""
    found = aims(settings_of(*entries), "toy")
    return {(aim.digits, aim.what.split()[0]): aim for aim in found if aim.aim is not None}


@pytest.mark.parametrize(
    "changes", [{"epochs": 1}, {"classes": "10/5/5"}, {"data_options": (("image_size", 14),)}]
)
def test_full_trainings_on_all_data_count_alone(changes: dict[str, Any]) -> None:
    key = ("mnist", "best")
    assert aims_of(Judged("softmax", 0.5))[key].reached == 0.5
    assert aims_of(Judged("softmax", 0.5, changes=changes))[key].reached is None


def test_best_of_those_without_negatives_is_the_largest_of_them() -> None:
    entries = [
        Judged("softmax", 0.3),
        Judged("cosface", 0.6),
        Judged("arcface", 0.4),
        Judged("eos", 0.9),
    ]
    found = aims_of(*entries)["mnist", "best"]
    assert (found.reached, found.by) == (0.6, "`cosface`, published code, best of 3 ways to train")
    assert found.distance == pytest.approx(0.6 - 0.65)


def test_a_loss_whose_negatives_are_all_composed_of_knowns_sees_none() -> None:
    entries = [
        Judged("softmax", 0.3),
        Judged("cos_eos", 0.8, options={"composed_negatives": 1.0}),
        Judged("cos_eos", 0.9, options={"composed_negatives": 0.5}),
        Judged("cos_eos", 0.95, options={"composed_negatives": 1.0, "initial_weights": "runs/a"}),
    ]
    found = aims_of(*entries)["mnist", "best"]
    name = "`cos_eos (composed_negatives=1.0)`, published code"
    assert (found.reached, found.by) == (0.8, f"{name}, best of 2 ways to train")


def test_recommended_is_judged_with_mnist_and_its_misses_with_emnist_against_the_best_plain_loss() -> (
    None
):
    recommended = "`recommended`:"
    found = aims_of(
        Judged("cos_bg", 0.995, is_recommended=True),
        Judged("cos_bg", 0.96, digits="emnist", is_recommended=True),
        Judged("eos", 0.8, digits="emnist"),
        Judged("cos_eos", 0.9, digits="emnist"),
        # Neither a loss of ours, nor another preset, nor options are the thesis.
        Judged("cos_bg", 0.99, digits="emnist"),
        Judged("cos_eos", 0.99, digits="emnist", preset="modern"),
        Judged("cos_eos", 0.99, digits="emnist", options={"feature_bias": False}),
    )
    assert found["mnist", recommended].reached == 0.995
    missed = found["emnist", recommended]
    assert missed.reached == pytest.approx(1 - 0.04 / 0.1)
    assert "against `cos_eos`, published code, best of 2 ways to train" in missed.by
    assert missed.command == ""
    alone = aims_of(Judged("cos_bg", 0.96, digits="emnist", is_recommended=True))
    assert alone["emnist", recommended].reached is None
    assert "LOSSES=cos_eos SEEDS=3 DIGITS=emnist" in alone["emnist", recommended].command


def test_best_thesis_loss_is_of_either_definition_and_that_of_the_published_code_stands_beside_it() -> (
    None
):
    by_the_text = {"as_published": False}
    found = aims(
        settings_of(
            Judged("cos_bg", 0.96, digits="emnist", changes=by_the_text, is_recommended=True),
            Judged("eos", 0.8, digits="emnist"),
            Judged("os", 0.9, digits="emnist", changes=by_the_text),
        ),
        "toy",
    )
    missed = [aim for aim in found if "fewer knowns missed at FPR 0.01" in aim.what]
    assert [aim.what.partition("best thesis loss")[2] for aim in missed] == [
        "", " with the published code",
    ]  # fmt: skip
    assert [aim.reached for aim in missed] == pytest.approx([1 - 0.04 / 0.1, 1 - 0.04 / 0.2])
    assert "against `os`, best of 2" in missed[0].by
    assert "against `eos`, published code, best of 1" in missed[1].by


@pytest.mark.parametrize(
    ("score", "reached", "line"),
    [("logit", 0.3, "| MNIST |  | .3000 |  |"), ("energy", None, "| MNIST |  | – |  |")],
)
def test_ccr_with_no_unknown_accepted_is_that_of_the_recommended_score_and_has_no_aim(
    monkeypatch: pytest.MonkeyPatch, score: str, reached: float | None, line: str
) -> None:
    monkeypatch.setattr("training.grid.aims.recommended_score", lambda entry: score)
    found = aims(settings_of(Judged("cos_bg", 0.995, is_recommended=True)), "toy")
    (shown,) = (aim for aim in found if aim.aim is None)
    assert shown.what == "`recommended`: CCR with no unknown accepted"
    assert (shown.reached, shown.distance) == (pytest.approx(reached), None)
    seeds = "; by seed .1000, .2000, .6000" if reached else ""
    assert shown.by == f"`cos_bg`, published code, {score}{seeds}"
    assert line in aims_table([shown])


def test_fewer_seeds_than_three_stand_with_the_command_for_the_others() -> None:
    found = aims_of(
        Judged("cos_bg", 0.995, is_recommended=True, seeds=(1, 2)),
        Judged("sfn_norm", 0.6, preset="modern", options={"scale": 12}, seeds=(2,)),
        Judged("cos_bg", 0.96, digits="emnist", is_recommended=True),
        Judged("eos", 0.8, digits="emnist", seeds=(1,)),
    )
    told = {key: aim.by.partition("; ")[2] for key, aim in found.items()}
    recommended = "`recommended`:"
    make = "`make reproduce PROTOCOL=toy"
    assert told == {
        ("mnist", recommended): (
            f"`cos_bg` has 2 of 3 seeds, for the rest: {make} LOSSES=recommended SEEDS=3-3 DIGITS=mnist DATA=$DATA`"
        ),
        ("mnist", "best"): (
            f"`sfn_norm (scale=12)` has 1 of 3 seeds, for the rest: {make} LOSSES=sfn_norm SEEDS=1,3 DIGITS=mnist PRESET=modern "
            "DATA=$DATA OPTIONS=scale=12`"
        ),
        ("emnist", recommended): (
            f"`eos` has 1 of 3 seeds, for the rest: {make} LOSSES=eos SEEDS=2,3 DIGITS=emnist DATA=$DATA`"
        ),
    }
    for aim, seeds in (("mnist", [3]), ("emnist", [2, 3])):
        named = re.search(r"SEEDS=(\S+)", told[aim, recommended])
        assert named is not None
        assert seed_count_or_list(named[1]) == seeds


def test_of_several_scores_the_one_counts_that_is_best_on_the_validations_negatives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = {("toy", "mnist"): ("softmax", "logit", "energy"), ("toy", "emnist"): ("energy",)}
    monkeypatch.setattr(
        "training.grid.aims.recommendation", lambda *which: SimpleNamespace(scores=scores[which])
    )
    entry: Any = Judged("cos_bg", {"softmax": 0.4, "logit": 0.6, "energy": 0.5})
    assert recommended_score(entry) == "logit"
    entry = Judged("cos_bg", {"softmax": 0.4, "logit": 0.6, "energy": 0.5}, digits="emnist")
    assert recommended_score(entry) == "energy"


def test_protocols_but_toy_have_no_aims() -> None:
    assert aims({}, "p1") == []


def aim_lines(text: str) -> list[list[str]]:
    body = section(text, "## Aims").partition("\n### ")[0]
    lines = [line for line in body.splitlines() if line.startswith("| ")][2:]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def test_aims_of_recommended_stand_with_their_distance_or_with_the_command(grid: Path) -> None:
    lines = aim_lines((grid / "results/toy.md").read_text())
    assert [line[1:3] for line in lines] == [
        ["MNIST", "≥ .990"], ["MNIST", "≥ .994"], ["MNIST", "≥ .650"], *[["EMNIST", "≥ .250"]] * 4,
    ]  # fmt: skip
    assert all(line[3:5] == ["", ""] for line in lines)
    assert "`make reproduce PROTOCOL=toy LOSSES=recommended SEEDS=3 DIGITS=mnist" in lines[0][5]
    for source, quality in (("mnist", 6.0), ("emnist", 4.0)):
        for cell in cells("recommended", digits=[source]):
            finished_run(grid / "runs", cell, quality=quality)
    for cell in cells("sfn_cosface"):
        finished_run(grid / "runs", cell, quality=3.0)
    text = written(grid)
    settings = group_rows(read_rows(grid / "results/toy.json"), grid / "runs", grid / "results")
    of_emnist = [
        entry
        for setting, found in settings.items()
        for entry in found
        if setting.digits == "emnist"
    ]
    [ours] = (entry for entry in of_emnist if entry.is_recommended)
    [theirs] = (entry for entry in of_emnist if entry.setting.as_published)
    lines = aim_lines(text)
    assert all(line[3] for line in lines)
    missed = [1 - (entry.mean("0.1") or 0.0) for entry in (ours, theirs)]
    fewer = 1 - missed[0] / missed[1]
    assert lines[-1][0].endswith("at FPR 0.1 than by the best thesis loss with the published code")
    assert lines[-1][3:5] == [number(fewer), signed(fewer - 0.25)]
    assert "against `cos_eos`, published code, best of 1 ways to train" in lines[-1][5]
    assert lines[2][:3] == ["`recommended`: CCR with no unknown accepted", "MNIST", ""]
    assert lines[3][5].startswith("`sfn_cosface`, published code, best of 1 ways")
    body = section(text, "### What the aims are made of").partition("With EMNIST's digits:")[2]
    name = f"`{ours.full_label}` − `cos_eos`, published code"
    [line] = [line for line in body.splitlines() if line.startswith(f"| {name} |")]
    changes = [difference_text(difference(ours, theirs, column)) for column in COLUMNS]
    assert line == f"| {' | '.join([name, *changes])} |"
    assert float(changes[2].split()[0].strip("*").replace("−", "-")) > 0  # it is the better one
    assert f"| {name_text(ours)} | 2" in text
    assert "(recommended)" in name_text(ours)
