"""Separating the two causes of a loss of knowns: on geometry where the answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from openset.labels import NEGATIVE, UNKNOWN
from openset.metrics import ccr_at_fpr, oscr_curve, threshold_at_fpr
from tests.factories import FOREIGN_DEG as FOREIGN
from tests.factories import KNOWN_DEG as KNOWNS
from tests.factories import scored_at
from training import low_fpr
from training.intervals import seed_interval
from training.low_fpr import outcome_groups, separate_causes
from training.scoring import Scored


def causes(baseline: Scored, other: Scored, **options):
    found = separate_causes(baseline, other, **({"max_fpr": 0.25, "against": UNKNOWN} | options))
    assert found is not None
    return found


def test_nearer_foreign_samples_are_the_foreign_cause_alone() -> None:
    found = causes(scored_at(KNOWNS, FOREIGN), scored_at(KNOWNS, [a - 30 for a in FOREIGN]))
    assert (found.baseline, found.other) == (0.6, 0.3)
    assert (found.foreign, found.known) == (pytest.approx(-0.3), pytest.approx(0))
    assert found.threshold_deg == (pytest.approx(60, abs=0.01), pytest.approx(30, abs=0.01))


def test_angle_of_a_foreign_sample_is_to_its_nearest_center_and_of_a_known_to_its_own() -> None:
    behind = scored_at([179.0, *KNOWNS], [179.0], wrong=1)  # the second center is at arccos(-.99)
    found = causes(behind, behind, max_fpr=1.0)
    assert found.threshold_deg == pytest.approx([171.89] * 2, abs=0.01)
    outcomes = outcome_groups(behind, "softmax", max_fpr=1.0, against=UNKNOWN)
    assert outcomes is not None
    groups = outcomes["groups"]
    assert groups["foreign, accepted"]["angle_deg"]["0.5"] == pytest.approx(171.89, abs=0.01)
    assert groups["known, wrong, accepted"]["angle_deg"]["0.5"] == pytest.approx(179, abs=0.01)


def test_farther_knowns_are_the_known_cause_alone() -> None:
    found = causes(scored_at(KNOWNS, FOREIGN), scored_at([a + 20 for a in KNOWNS], FOREIGN))
    assert (found.foreign, found.known) == (pytest.approx(0), pytest.approx(-0.2))


def test_parts_add_up_whatever_changes() -> None:
    random = np.random.default_rng(0)
    models = [
        scored_at(random.uniform(0, 100, 200).tolist(), random.uniform(30, 120, 80).tolist(), wrong)
        for wrong in (3, 20)
    ]
    for fpr in (0.05, 0.3):
        found = causes(*models, max_fpr=fpr)
        assert found.foreign + found.known == pytest.approx(found.other - found.baseline)
        back = causes(*models[::-1], max_fpr=fpr)
        assert (back.foreign, back.known) == (
            pytest.approx(-found.foreign),
            pytest.approx(-found.known),
        )
    assert separate_causes(*models, max_fpr=0.001, against=UNKNOWN) is None


def test_outcomes_are_counted_and_measured_at_the_operating_point() -> None:
    found = outcome_groups(
        scored_at(KNOWNS, FOREIGN, wrong=1), "softmax", max_fpr=0.25, against=UNKNOWN
    )
    assert found is not None
    groups = found["groups"]
    counts = {name: group["count"] for name, group in groups.items()}
    assert counts == {
        "known, right, accepted": 5, "known, right, rejected": 4, "known, wrong, accepted": 1,
        "known, wrong, rejected": 0, "foreign, accepted": 1, "foreign, rejected": 3,
    }  # fmt: skip
    angles = groups["known, right, rejected"]["angle_deg"]
    assert angles == pytest.approx({"0.05": 66.5, "0.5": 80, "0.95": 93.5}, abs=0.01)
    assert groups["foreign, accepted"]["share"] == 0.25
    assert groups["foreign, rejected"]["magnitude"]["0.5"] == pytest.approx(2)
    assert groups["known, wrong, rejected"]["angle_deg"] is None
    assert math.degrees(math.acos(found["tau"] / 10)) == pytest.approx(60, abs=0.01)


def test_threshold_is_the_one_at_which_the_ccr_is_read() -> None:
    scored = scored_at(KNOWNS, FOREIGN)
    curve = oscr_curve(scored.scores["softmax"], scored.predictions, scored.labels, against=UNKNOWN)
    for fpr in (0.25, 0.5, 0.6, 1.0):
        tau = threshold_at_fpr(curve, max_fpr=fpr)
        accepted = scored.scores["softmax"] >= tau
        assert accepted[scored.labels == UNKNOWN].mean() <= fpr
        assert accepted[scored.labels == 0].mean() == ccr_at_fpr(curve, max_fpr=fpr)
    assert threshold_at_fpr(curve, max_fpr=0.1) is None


def test_command_compares_stored_runs_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name, shift in (("a", 0), ("b", 30)):
        (tmp_path / name).mkdir()
        moved = scored_at(KNOWNS, [angle - shift for angle in FOREIGN])
        moved.save(tmp_path / name / "scores.npz")
    arguments = ["--baseline", str(tmp_path / "a"), "--runs", str(tmp_path / "b"), "--fpr", "0.25"]
    assert low_fpr.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert [[one["run"] for one in row["runs"]] for row in written["rows"]] == [["a"], ["b"]]
    found = written["rows"][1]["causes"]["foreign"]
    assert (found["mean"], found["interval"]) == (pytest.approx(-0.3), None)
    assert "-0.3000" in capsys.readouterr().out
    assert low_fpr.main([*arguments, "--score", "ghost"]) == 1
    # The stored score stays: an evaluation replaces what is there.
    assert caplog.records[-1].message.endswith("SCORES=softmax,ghost")
    assert low_fpr.main(["--baseline", str(tmp_path / "c")]) == 1
    assert "make evaluate" in caplog.records[-1].message


def test_several_seeds_of_an_arm_give_a_mean_with_its_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shifts = {"a1": 0, "a2": 10, "b1": 30, "b2": 10}
    for name, shift in shifts.items():
        (tmp_path / name).mkdir()
        scored_at(KNOWNS, [a - shift for a in FOREIGN]).save(tmp_path / name / "scores.npz")

    def paths(*names: str) -> str:
        return ",".join(str(tmp_path / name) for name in names)

    arguments = [
        "--fpr",
        "0.25",
        "--json",
        str(tmp_path / "out.json"),
        "--baseline",
        paths("a1", "a2"),
        "--runs",
    ]
    assert low_fpr.main([*arguments, paths("b1", "b2")]) == 0
    row = json.loads((tmp_path / "out.json").read_text())["rows"][1]
    assert [one["ccr"] for one in row["runs"]] == [0.3, 0.5]
    each = [one["causes"]["foreign"] for one in row["runs"]]
    assert each == pytest.approx([-0.3, 0])  # each seed against the same seed of the baseline
    assert row["causes"]["foreign"]["mean"] == pytest.approx(sum(each) / 2)
    assert row["causes"]["foreign"]["interval"] == pytest.approx(seed_interval(each))
    assert "0.4000 ±1.2706" in capsys.readouterr().out  # 12.706 standard errors of .1
    assert low_fpr.main([*arguments, paths("b1")]) == 1
    assert "as many runs as the baseline" in caplog.records[-1].message


def test_mean_over_seeds_needs_all_of_them_to_reach_the_rate(tmp_path: Path) -> None:
    for name, foreign in (("a1", FOREIGN), ("a2", FOREIGN), ("b1", FOREIGN), ("b2", [60.0] * 4)):
        (tmp_path / name).mkdir()
        scored_at(KNOWNS, foreign).save(tmp_path / name / "scores.npz")
    arms = [[tmp_path / "a1", tmp_path / "a2"], [tmp_path / "b1", tmp_path / "b2"]]
    _, row = low_fpr.analyse(arms, score="softmax", max_fpr=0.25, against=UNKNOWN)
    assert row["runs"][0]["ccr"] == 0.6
    nothing = {"mean": None, "interval": None}
    assert row["ccr"] == row["causes"]["foreign"] == nothing


def test_runs_without_negatives_cannot_be_judged_against_them() -> None:
    scored = scored_at(KNOWNS, FOREIGN)
    with pytest.warns(UserWarning, match="negative"):
        assert outcome_groups(scored, "softmax", max_fpr=0.25, against=NEGATIVE) is None
