"""Intervals over seeds and images against second, slower ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from openset import metrics
from openset.labels import NEGATIVE, UNKNOWN
from training.intervals import (
    ModelScores,
    bootstrap_by_class,
    class_draws,
    percentile_interval,
    prediction_interval,
    seed_difference_interval,
    seed_interval,
    widened,
)

TARGETS = (0.001, 0.01, 0.1, 0.5)


def sample(seed: int = 0, spread: float = 1.0, shift: float = 3.0) -> ModelScores:
    """Four known and five unknown classes of unequal size and mean score; one decimal, so that scores tie."""
    random = np.random.default_rng(seed)
    groups = np.repeat(list("0123PQRST"), [30, 50, 60, 100, 40, 60, 80, 100, 120])
    labels = np.where(groups < "P", np.char.find("0123", groups), UNKNOWN)
    means = dict(zip("0123PQRST", random.normal(0, spread, 9), strict=True))
    scores = np.array([means[group] for group in groups]) + random.normal(0, 1, len(groups))
    scores += shift * (labels >= 0)
    predictions = np.where(random.random(len(labels)) < 0.9, labels, 0)
    return ModelScores({"softmax": scores.round(1).astype(np.float32)}, predictions, labels, groups)


def replicates(one: ModelScores, rule: str = "inclusive", repeats: int = 200):
    return bootstrap_by_class(
        one, score="softmax", against=UNKNOWN, targets=TARGETS, rule=rule, repeats=repeats
    )


def test_seed_interval_is_students_t() -> None:
    values = [0.91, 0.93, 0.95]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert seed_interval(values) == pytest.approx(expected)
    assert seed_interval([0.91]) is None
    assert seed_interval([]) is None


def test_prediction_interval_holds_one_more_draw_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    draws = random.normal(0.9, 0.02, (4000, 4))
    found = [prediction_interval(row[:3].tolist()) for row in draws]
    held = [low <= row[3] <= high for row, (low, high) in zip(draws, found, strict=True)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)
    assert prediction_interval([0.91]) is None


def test_seed_difference_interval_is_welchs() -> None:
    first, second = [0.91, 0.93, 0.95], [0.80, 0.90]
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert seed_difference_interval(first, second) == pytest.approx(tuple(expected))
    assert seed_difference_interval(first, [0.8]) is None
    assert seed_difference_interval([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.25)


def test_interval_over_few_classes_covers_as_often_as_it_claims() -> None:
    """The mean of 10 class means; the plain percentile interval is too narrow for that, which is the point."""
    random = np.random.default_rng(0)
    values = random.normal(0.5, 0.1, (2000, 10))
    draws = class_draws(list("ABCDEFGHIJ"), 1000) / 10
    covered = {"plain": 0, "widened": 0}
    for one in values:
        interval = percentile_interval(draws @ one)
        assert interval is not None
        for name, (low, high) in {
            "plain": interval, "widened": widened(interval, float(one.mean()), 10),
        }.items():  # fmt: skip
            covered[name] += low <= 0.5 <= high
    assert covered["plain"] / 2000 < 0.92
    assert 0.94 < covered["widened"] / 2000 < 0.965


def test_many_classes_need_no_widening_and_one_class_allows_no_interval() -> None:
    assert widened((0.4, 0.7), 0.5, 10_000) == pytest.approx((0.4, 0.7), abs=1e-3)
    low, high = widened((0.4, 0.7), 0.5, 10)
    assert (0.5 - low) / 0.1 == pytest.approx((high - 0.5) / 0.2) == pytest.approx(1.2166, abs=1e-3)
    assert widened((0.4, 0.7), 0.5, 1) == (-np.inf, np.inf)


@pytest.mark.parametrize("rule", metrics.RULES)
def test_replicates_equal_the_metrics_on_samples_drawn_class_by_class(rule: str) -> None:
    one = sample()
    found = replicates(one, rule)
    drawn = {
        tuple(names): class_draws(list(names), 200) for names in ("0123", "PQRST")
    }  # fmt: skip
    for number in range(0, 200, 17):
        indices = [
            np.tile(np.flatnonzero(one.groups == name), times)
            for names, draws in drawn.items()
            for name, times in zip(names, draws[number], strict=True)
        ]
        chosen = np.concatenate(indices)
        scores, predictions, labels = (
            values[chosen] for values in (one.scores["softmax"], one.predictions, one.labels)
        )
        curve = metrics.oscr_curve(scores, predictions, labels, against=UNKNOWN)
        for target in TARGETS:
            expected = metrics.ccr_at_fpr(curve, max_fpr=target, rule=rule)
            value = found[f"{target:g}"][number]
            assert np.isnan(value) if expected is None else value == pytest.approx(expected)
        assert found["accuracy"][number] == pytest.approx(metrics.accuracy(predictions, labels))


def test_same_classes_are_drawn_alike_and_others_apart() -> None:
    draws = class_draws(list("ABCD"), 200)
    assert (draws == class_draws(list("ABCD"), 200)).all()
    assert (draws != class_draws(list("WXYZ"), 200)).any()


def test_models_are_resampled_alike_so_that_a_constant_gain_has_no_spread() -> None:
    one = sample()
    known = one.labels >= 0
    worse = ModelScores(one.scores, one.predictions.copy(), one.labels, one.groups)
    # Every known class loses the same share of images, whatever their score: the accuracy drops alike in each draw.
    for name in "0123":
        own = known & (one.groups == name)
        right = np.flatnonzero(own & (one.predictions == one.labels))
        worse.predictions[right[: own.sum() // 10]] = 99
    gain = replicates(one)["accuracy"] - replicates(worse)["accuracy"]
    np.testing.assert_allclose(gain, 0.1)
    assert replicates(one)["accuracy"].std() > 0


def test_drawing_whole_classes_widens_the_interval_where_classes_differ() -> None:
    one = sample(spread=2.0)
    clustered = percentile_interval(replicates(one)["0.1"])
    by_image = metrics.bootstrap_ccr_at_fpr(
        one.scores["softmax"], one.predictions, one.labels, one.groups,
        against=UNKNOWN, max_fpr=0.1, repeats=200,
    )  # fmt: skip
    assert clustered is not None
    assert by_image is not None
    assert clustered[1] - clustered[0] > 2 * (by_image[1] - by_image[0])


def test_rate_that_no_replicate_reaches_has_no_interval() -> None:
    one = sample()
    tied = ModelScores(
        {"softmax": np.ones_like(one.scores["softmax"])}, one.predictions, one.labels, one.groups
    )
    found = replicates(tied)
    assert np.isnan(found["0.1"]).all()
    assert percentile_interval(found["0.1"]) is None
    assert percentile_interval(found["accuracy"]) is not None


def test_interval_bears_a_few_unreached_replicates_and_no_more() -> None:
    values = np.linspace(0, 1, 1000)
    values[:25] = np.nan
    assert percentile_interval(values) is not None
    values[:26] = np.nan
    assert percentile_interval(values) is None


def test_the_other_foreign_group_changes_nothing() -> None:
    one = sample()
    extra = ModelScores(
        {"softmax": np.append(one.scores["softmax"], np.float32(99))},
        np.append(one.predictions, 0),
        np.append(one.labels, NEGATIVE),
        np.append(one.groups, "A"),
    )
    for column, values in replicates(extra).items():
        np.testing.assert_array_equal(values, replicates(one)[column])
