"""The report against counts made by hand, and what the terminal must not swallow."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from openset import metrics
from openset.labels import NEGATIVE, UNKNOWN
from training.report import FPR_TARGETS, build_report, print_report
from training.scoring import Scored


def four_and_five(foreign_label: int = UNKNOWN) -> Scored:
    """The worked example of the evaluation rules: four foreign scores, five knowns of which two are wrong."""
    scores = np.array([0.95, 0.9, 0.5, 0.4, 0.2, 0.1, 0.4, 0.4, 0.9], dtype=np.float32)
    labels = np.array([0, 0, 0, 0, 0] + [foreign_label] * 4)
    predictions = np.array([0, 0, 1, 0, 0, 0, 1, 0, 1])
    return with_scores(scores, labels, predictions)


def with_scores(scores: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> Scored:
    count = len(labels)
    cosines = np.linspace(-1, 1, 2 * count, dtype=np.float32).reshape(count, 2)
    return Scored(
        features=np.stack([scores, scores], axis=1),
        logits=cosines,
        cosines=cosines,
        scores={"softmax": scores, "logit": scores},
        predictions=predictions,
        labels=labels,
        groups=labels.astype(str),
        sample_ids=np.arange(count).astype(str),
        centers=np.array([[3, 0], [0, 0.5]], dtype=np.float32),
    )


def random_sample() -> Scored:
    random = np.random.default_rng(3)
    labels = random.choice([0, 1, NEGATIVE, UNKNOWN], 3000)
    scores = random.normal(np.where(labels >= 0, 2, 0), 1).round(1).astype(np.float32)  # many ties
    return with_scores(scores, labels, random.integers(0, 2, 3000))


def report_of(scored: Scored, **changes):
    arguments = {
        "config": {"protocol": "toy", "loss": "cos_os"},
        "notes": [],
        "counts": {},
        "factory": None,
        "repeats": 5,
    }
    return build_report(scored, **(arguments | changes))


def printed(report) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    return console.file.getvalue()


def test_unreachable_rate_is_none_and_printed_as_a_dash() -> None:
    report = report_of(four_and_five())
    cells = report["scores"]["softmax"]["unknown"]["ccr_at_fpr"]
    for target in ("0.0001", "0.001", "0.01", "0.1"):
        assert set(cells[target].values()) == {None}
    assert cells["1"]["value"] == 0.8
    row = next(line for line in printed(report).splitlines() if "softmax" in line)
    assert row.count(" - ") == 4


def test_strict_rule_excludes_the_threshold_that_just_reaches_the_target() -> None:
    values = {
        rule: report_of(four_and_five(), rule=rule)["scores"]["softmax"]["unknown"]["ccr_at_fpr"][
            "1"
        ]
        for rule in metrics.RULES
    }
    # At FPR 1 four of the five are right and accepted, two of five where only three foreign images may pass.
    assert (values["inclusive"]["value"], values["strict"]["value"]) == (0.8, 0.6)
    assert values["inclusive"]["false_negative_rate"] == 0
    assert values["strict"]["false_negative_rate"] == pytest.approx(0.2)


@pytest.mark.parametrize("rule", metrics.RULES)
@pytest.mark.parametrize(("group", "label"), [("negative", NEGATIVE), ("unknown", UNKNOWN)])
def test_false_negative_rate_counts_rejected_knowns_of_any_prediction(
    rule: str, group: str, label: int
) -> None:
    scored = random_sample()
    scores, foreign = scored.scores["softmax"], scored.scores["softmax"][scored.labels == label]
    cells = report_of(scored, rule=rule)["scores"]["softmax"][group]["ccr_at_fpr"]
    reached = 0
    for target in FPR_TARGETS:
        rates = {tau: (foreign >= tau).mean() for tau in np.unique(foreign)}
        allowed = [
            tau
            for tau, rate in rates.items()
            if (rate <= target if rule == "inclusive" else rate < target)
        ]
        if not allowed:
            assert cells[f"{target:g}"]["false_negative_rate"] is None
            continue
        reached += 1
        expected = (scores[scored.labels >= 0] < min(allowed)).mean()
        assert cells[f"{target:g}"]["false_negative_rate"] == pytest.approx(expected)
    assert reached >= 3


def test_group_that_is_missing_is_left_out_not_zero() -> None:
    report = report_of(four_and_five(NEGATIVE))
    assert set(report["scores"]["softmax"]) == {"negative"}
    assert set(report["feature_magnitudes"]) == set(report["angles_deg"]) == {"known", "negative"}
    assert "NaN" not in json.dumps(report)


def test_center_angles_do_not_depend_on_the_length_of_centers() -> None:
    angles = report_of(four_and_five())["center_angles_deg"]
    assert angles["matrix"] == [[0, 90], [90, 0]]
    assert (angles["min"], angles["mean"], angles["max"]) == (90, 90, 90)


def test_figures_at_the_factory_threshold_are_counts_with_exact_intervals() -> None:
    factory = {"score_type": "softmax", "tau": 0.4, "fpr": 0.5, "confidence": 0.95}
    scored = four_and_five()
    # 0.4 itself is accepted: inclusive, in float32.
    result = report_of(scored, factory=factory)["factory"]
    assert result["ccr"] == 0.6
    assert result["ccr_interval"] == metrics.clopper_pearson(3, 5)
    assert result["false_negative_rate"] == pytest.approx(0.2)
    assert result["false_negative_rate_interval"] == metrics.clopper_pearson(1, 5)
    assert result["realised_fpr"]["unknown"]["accepted"] == 3
    assert result["realised_fpr"]["unknown"]["interval"] == metrics.clopper_pearson(3, 4)


def test_brackets_in_a_note_reach_the_reader() -> None:
    note = "left out [n01440764] and [/n02085620]"
    assert note in printed(report_of(four_and_five(), notes=[note]))
