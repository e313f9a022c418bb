"""Curves and rates against hand-worked cases, a slow loop and scikit-learn."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from openset.decision import accept
from openset.labels import NEGATIVE, UNKNOWN
from openset.metrics import (
    RULES,
    accuracy,
    allowed_count,
    auroc,
    bootstrap_ccr_at_fpr,
    bootstrap_ccr_at_fprs,
    ccr_at_fpr,
    ccr_at_tau,
    ccr_at_zero_fpr,
    clopper_pearson,
    fpr_at_tau,
    oscr_curve,
    threshold_at_fpr,
)

# The worked example of the science reference: foreign {.1 .4 .4 .9}; knowns .95 right, .9 right, .5 wrong, .4, .2 right.
SCORES = np.array([0.95, 0.9, 0.5, 0.4, 0.2, 0.1, 0.4, 0.4, 0.9])
LABELS = np.array([0, 1, 0, 1, 0, NEGATIVE, NEGATIVE, NEGATIVE, NEGATIVE])
PREDICTIONS = np.array([0, 1, 1, 1, 0, 0, 0, 1, 1])


def random_case(seed: int, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.choice([0, 1, 2, NEGATIVE, UNKNOWN], count)
    scores = np.round(random.normal(size=count) + (labels >= 0), 1)  # rounded: many ties
    return scores, random.integers(0, 3, count), labels


def test_worked_example_gives_its_three_points() -> None:
    curve = oscr_curve(SCORES, PREDICTIONS, LABELS, against=NEGATIVE)
    np.testing.assert_allclose(curve.fpr, [0.25, 0.75, 1.0])
    np.testing.assert_allclose(curve.ccr, [0.4, 0.6, 0.8])
    np.testing.assert_allclose(curve.thresholds, [0.9, 0.4, 0.1])


@pytest.mark.parametrize(
    ("max_fpr", "rule", "expected"),
    [
        (0.25, "inclusive", 0.4),
        (0.25, "strict", None),
        (0.5, "inclusive", 0.4),
        (0.1, "inclusive", None),
        (1.0, "inclusive", 0.8),
    ],
)
def test_ccr_at_fpr_of_the_worked_example(
    max_fpr: float, rule: str, expected: float | None
) -> None:
    curve = oscr_curve(SCORES, PREDICTIONS, LABELS, against=NEGATIVE)
    assert ccr_at_fpr(curve, max_fpr=max_fpr, rule=rule) == (
        None if expected is None else pytest.approx(expected)
    )


@pytest.mark.parametrize("max_fpr", ["0.001", "0.01", "0.07", "0.1", "0.29", "1"])
def test_allowed_count_is_that_of_exact_fractions(max_fpr: str) -> None:
    for count in range(1, 301):
        product = Fraction(max_fpr) * count
        assert allowed_count(float(max_fpr), count, "inclusive") == math.floor(product)
        assert allowed_count(float(max_fpr), count, "strict") == math.ceil(product) - 1


def test_rate_of_a_point_is_reached_at_this_point() -> None:
    for count in range(1, 60):  # 1 / 49 * 49 is less than 1
        scores = np.arange(count + 1.0)
        curve = oscr_curve(scores, scores * 0, [UNKNOWN] * count + [0], against=UNKNOWN)
        for fpr, threshold in zip(curve.fpr, curve.thresholds, strict=True):
            assert threshold_at_fpr(curve, max_fpr=fpr) == threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_fpr": 0.0}, "max_fpr must lie in"), ({"max_fpr": 1.001}, "max_fpr must lie in"),
        ({"max_fpr": np.nan}, "max_fpr must lie in"), ({"max_fpr": 0.1, "rule": "lax"}, "rule must be one of"),
    ],
)  # fmt: skip
def test_impossible_rates_and_unknown_rules_are_refused(options: dict, message: str) -> None:
    curve = oscr_curve(SCORES, PREDICTIONS, LABELS, against=NEGATIVE)
    with pytest.raises(ValueError, match=message):
        ccr_at_fpr(curve, **options)


def test_unreachable_rate_is_none_and_not_zero() -> None:
    curve = oscr_curve([2.0, 1.0, 1.0], [0, 0, 0], [0, UNKNOWN, UNKNOWN], against=UNKNOWN)
    assert ccr_at_fpr(curve, max_fpr=0.5) is None
    assert ccr_at_fpr(curve, max_fpr=1.0) == 1.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("against", [NEGATIVE, UNKNOWN])
def test_every_threshold_reapplied_with_accept_gives_its_point(seed: int, against: int) -> None:
    scores, predictions, labels = random_case(seed)
    curve = oscr_curve(scores, predictions, labels, against=against)
    known = labels >= 0
    for ccr, fpr, tau in zip(curve.ccr, curve.fpr, curve.thresholds, strict=True):
        accepted = [bool(accept(score, tau)) for score in scores]
        right = sum(
            a and p == y for a, p, y in zip(accepted, predictions, labels, strict=True) if y >= 0
        )
        foreign = [a for a, y in zip(accepted, labels, strict=True) if y == against]
        assert ccr == pytest.approx(right / known.sum())
        assert fpr == pytest.approx(np.mean(foreign))
        assert ccr_at_tau(scores, predictions, labels, tau=tau) == pytest.approx(ccr)
        assert fpr_at_tau(scores, labels, tau=tau, against=against) == pytest.approx(fpr)


def test_curve_is_monotone_and_ends_at_rate_one() -> None:
    curve = oscr_curve(*random_case(7), against=UNKNOWN)
    assert (np.diff(curve.fpr) > 0).all()
    assert (np.diff(curve.ccr) >= 0).all()
    assert curve.fpr[-1] == 1.0
    assert (np.diff(curve.thresholds) < 0).all()


def test_memory_of_a_curve_grows_with_the_samples_and_not_their_square() -> None:
    def peak(count: int) -> int:
        scores, predictions, labels = random_case(0, count)
        tracemalloc.start()
        oscr_curve(scores, predictions, labels, against=NEGATIVE)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak(80_000) < 5 * peak(20_000)


def test_groups_are_never_pooled() -> None:
    scores, predictions, labels = random_case(3)
    alone = labels != UNKNOWN
    with_unknowns = oscr_curve(scores, predictions, labels, against=NEGATIVE)
    without = oscr_curve(scores[alone], predictions[alone], labels[alone], against=NEGATIVE)
    np.testing.assert_array_equal(with_unknowns.ccr, without.ccr)
    assert ccr_at_zero_fpr([2.0, 3.0, 1.0], [0, 0, 0], [0, NEGATIVE, UNKNOWN], against=UNKNOWN) == 1


def test_rate_of_a_group_that_is_not_there_is_none_and_not_zero() -> None:
    assert fpr_at_tau([1.0], [0], tau=0.5, against=UNKNOWN) is None
    assert auroc([1.0], [0], against=UNKNOWN) is None
    assert auroc([1.0], [UNKNOWN], against=UNKNOWN) is None


def test_no_foreign_sample_warns_and_reaches_nothing() -> None:
    with pytest.warns(UserWarning, match="no unknown sample"):
        curve = oscr_curve([1.0], [0], [0], against=UNKNOWN)
    assert ccr_at_fpr(curve, max_fpr=1.0) is None
    assert ccr_at_zero_fpr([1.0], [0], [0], against=UNKNOWN) is None


def test_curve_needs_a_known_sample_and_a_label_for_every_score() -> None:
    with pytest.raises(ValueError, match="at least one known"):
        oscr_curve([1.0], [0], [UNKNOWN], against=UNKNOWN)
    with pytest.raises(ValueError, match="equal length"):
        oscr_curve([1.0, 2.0], [0], [0], against=UNKNOWN)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scores_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        oscr_curve([bad, 1.0], [0, 0], [0, UNKNOWN], against=UNKNOWN)


def test_zero_fpr_accepts_no_foreign_sample_in_float32() -> None:
    scores = np.array([5.0, np.nextafter(np.float32(5), np.float32(6)), 5.0], np.float32)
    assert ccr_at_zero_fpr(scores, [0, 0, 0], [0, 0, UNKNOWN], against=UNKNOWN) == 0.5


def test_accuracy_ignores_foreign_samples() -> None:
    assert accuracy([0, 1, 1], [0, 0, UNKNOWN]) == 0.5


def test_auroc_equals_scikit_learn() -> None:
    scores, _, labels = random_case(11)
    chosen = labels != NEGATIVE
    expected = roc_auc_score(labels[chosen] >= 0, scores[chosen])
    assert auroc(scores, labels, against=UNKNOWN) == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_clopper_pearson_equals_scipys_exact_interval(confidence: float) -> None:
    assert clopper_pearson(0, 10)[1] == pytest.approx(0.30850, abs=1e-5)
    for successes in range(11):
        expected = stats.binomtest(successes, 10).proportion_ci(confidence, "exact")
        found = clopper_pearson(successes, 10, confidence=confidence)
        assert found == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="trials >= 1"):
        clopper_pearson(0, 0)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_bootstrap_is_the_metric_itself_on_samples_drawn_one_by_one(
    rule: str, clustered: bool
) -> None:
    scores, predictions, labels = random_case(5, 300)
    groups = np.random.default_rng(1).choice(list("AABBBCCCCDDDDD"), len(labels))
    order = np.argsort(scores, kind="stable")
    random = np.random.default_rng(0)

    def drawn(members: np.ndarray) -> np.ndarray:
        names = np.unique(groups[members]) if clustered else members
        chosen = names[random.integers(0, len(names), len(names))]
        return (
            np.concatenate([members[groups[members] == name] for name in chosen])
            if clustered
            else chosen
        )

    found = []
    for _ in range(100):
        foreign, known = drawn(order[labels[order] == UNKNOWN]), drawn(order[labels[order] >= 0])
        index = np.concatenate([foreign, known])
        curve = oscr_curve(scores[index], predictions[index], labels[index], against=UNKNOWN)
        found.append(ccr_at_fpr(curve, max_fpr=0.4, rule=rule))
    interval = bootstrap_ccr_at_fpr(
        scores, predictions, labels, groups, against=UNKNOWN, max_fpr=0.4, rule=rule, clustered=clustered,
        repeats=100, confidence=0.8,
    )  # fmt: skip
    reached = [value for value in found if value is not None]
    assert interval == pytest.approx(tuple(np.quantile(reached, [0.1, 0.9])))


def test_bootstrap_bears_a_few_unreached_replicates_and_no_more() -> None:
    # A replicate reaches the rate unless its best foreign score is drawn more often than may be accepted.
    scores, labels = np.arange(11.0), np.array([UNKNOWN] * 10 + [0])
    intervals = bootstrap_ccr_at_fprs(
        scores, labels * 0, labels, labels, against=UNKNOWN, max_fprs=[0.2, 0.4]
    )
    assert intervals == {0.2: None, 0.4: (1.0, 1.0)}


def test_bootstrap_interval_covers_the_estimate_and_clusters_widen_it() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 50)
    shift = random.normal(size=20)[groups]
    labels = np.where(groups < 10, groups, UNKNOWN)
    scores = random.normal(size=1000) + shift + 2 * (labels >= 0)
    predictions = np.where(random.random(1000) < 0.9, labels.clip(0), 0)
    curve = oscr_curve(scores, predictions, labels, against=UNKNOWN)
    point = ccr_at_fpr(curve, max_fpr=0.1)
    plain = bootstrap_ccr_at_fpr(
        scores, predictions, labels, groups, against=UNKNOWN, max_fpr=0.1, repeats=300
    )
    clustered = bootstrap_ccr_at_fpr(
        scores,
        predictions,
        labels,
        groups,
        against=UNKNOWN,
        max_fpr=0.1,
        repeats=300,
        clustered=True,
    )
    assert point is not None
    assert plain is not None
    assert clustered is not None
    assert plain[0] <= point <= plain[1]
    assert clustered[1] - clustered[0] > 1.5 * (plain[1] - plain[0])


def test_bootstrap_is_none_where_the_rate_is_out_of_reach() -> None:
    scores = np.ones(100)
    labels = np.where(np.arange(100) < 50, 0, UNKNOWN)
    assert (
        bootstrap_ccr_at_fpr(
            scores, np.zeros(100), labels, labels, against=UNKNOWN, max_fpr=0.1, repeats=50
        )
        is None
    )


@pytest.mark.parametrize("clustered", [False, True])
def test_bootstrap_of_several_targets_equals_that_of_each(clustered: bool) -> None:
    scores, predictions, labels = random_case(3)
    groups = np.arange(len(labels)) % 7
    arguments = {"against": UNKNOWN, "clustered": clustered, "repeats": 60}
    targets = [1e-9, 0.3, 0.6, 1.0]
    found = bootstrap_ccr_at_fprs(
        scores, predictions, labels, groups, max_fprs=targets, **arguments
    )
    assert list(found) == targets
    assert found[1e-9] is None
    assert found[0.3] < found[0.6] < found[1.0]
    for target in targets:
        alone = bootstrap_ccr_at_fpr(
            scores, predictions, labels, groups, max_fpr=target, **arguments
        )
        assert alone == found[target]


def test_bootstrap_follows_the_strict_rule() -> None:
    # Ten foreign scores, far below or above whole blocks of knowns: one accepted foreigner more or less moves the CCR.
    scores = np.concatenate([np.arange(10.0), np.repeat(np.arange(10.0) + 0.5, 100)])
    labels = np.concatenate([np.full(10, UNKNOWN), np.zeros(1000, dtype=int)])
    found = {
        rule: bootstrap_ccr_at_fpr(
            scores, labels.clip(0), labels, labels, against=UNKNOWN, max_fpr=0.5, rule=rule
        )
        for rule in ("inclusive", "strict")
    }
    inclusive, strict = found["inclusive"], found["strict"]
    assert inclusive is not None
    assert strict is not None
    assert strict[0] < inclusive[0]
