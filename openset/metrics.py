"""Open-set metrics: OSCR curve, CCR at FPR, intervals. Integer counts, exact ties, O(N log N).

Negatives and unknowns are never pooled: every figure is ``against`` one foreign group. CCR = share of *all* knowns that
are classified correctly and accepted; FPR = share of the foreign group that is accepted (Dhamija et al. 2018, as
corrected by Bisgin et al. 2023). There is no area under the curve: FPR 0 is no point of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from openset.decision import accept
from openset.labels import GROUP_NAMES, is_known

Floats = NDArray[np.floating[Any]]

RULES = ("inclusive", "strict")

# A share of bootstrap replicates may fail to reach the FPR before the interval is called undefined.
_MAX_UNREACHED_SHARE = 0.025


class OscrCurve(NamedTuple):
    """Open-set classification rate curve; thresholds fall, rates rise.

    Attributes:
        ccr: element ``i`` is the correct classification rate of knowns with score >= ``thresholds[i]``, (T,).
        fpr: element ``i`` is the share of the foreign group with score >= ``thresholds[i]``, (T,).
        thresholds: the distinct scores of the foreign group, decreasing, (T,).
        foreign_count: size of the foreign group.
    """

    ccr: NDArray[np.float64]
    fpr: NDArray[np.float64]
    thresholds: Floats
    foreign_count: int


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    scores_array = np.asarray(scores)
    labels_array = np.asarray(labels)
    if not np.issubdtype(scores_array.dtype, np.floating):
        scores_array = scores_array.astype(np.float64)
    if scores_array.ndim != 1 or scores_array.shape != labels_array.shape:
        raise ValueError(
            f"scores and labels must be one-dimensional and of equal length, got {scores_array.shape} and {labels_array.shape}"
        )
    if not np.isfinite(scores_array).all():
        raise ValueError(
            f"scores must be finite, got {int((~np.isfinite(scores_array)).sum())} NaN or infinite values; "
            "did the model diverge?"
        )
    return scores_array, labels_array.astype(np.int64, copy=False)


def count_at_least(sorted_scores: Floats, thresholds: Floats) -> NDArray[np.int64]:
    """How many of the ascending scores ``accept`` takes at each threshold."""
    counts: NDArray[np.int64] = len(sorted_scores) - np.searchsorted(
        sorted_scores, thresholds, side="left"
    )
    return counts


def oscr_curve(
    scores: ArrayLike, predictions: ArrayLike, labels: ArrayLike, *, against: int
) -> OscrCurve:
    """CCR against FPR over all thresholds that matter.

    Args:
        scores: higher = more known, (N,).
        predictions: index of the best class, (N,).
        labels: true class, or NEGATIVE or UNKNOWN, (N,).
        against: the foreign group, NEGATIVE or UNKNOWN; samples of the other group are left out.

    Raises:
        ValueError: unequal shapes, non-finite scores or no known sample.
    """
    scores_array, labels_array = _checked(scores, labels)
    known = is_known(labels_array)
    if not known.any():
        raise ValueError("oscr_curve needs at least one known sample (label >= 0), got none")
    foreign = np.sort(scores_array[labels_array == against])
    if not len(foreign):
        warnings.warn(
            f"no {GROUP_NAMES.get(against, against)} sample: the false-positive rate is undefined",
            stacklevel=2,
        )
        empty = np.empty(0)
        return OscrCurve(empty, empty, empty, 0)
    correct = np.sort(scores_array[known & (np.asarray(predictions) == labels_array)])
    # Foreign scores tie when logits vanish; distinct thresholds keep the curve monotone. They are searched for upwards,
    # which is several times faster, and a foreign score's own rank is known without a search.
    is_first = np.concatenate([[True], foreign[1:] != foreign[:-1]])
    thresholds = foreign[is_first]
    return OscrCurve(
        ccr=count_at_least(correct, thresholds)[::-1] / int(known.sum()),
        fpr=(len(foreign) - np.flatnonzero(is_first))[::-1] / len(foreign),
        thresholds=thresholds[::-1],
        foreign_count=len(foreign),
    )


def allowed_count(max_fpr: float, foreign_count: int, rule: str) -> int:
    """How many foreign samples may be accepted at a target FPR."""
    if rule == "inclusive":
        return math.floor(max_fpr * foreign_count + 1e-9)
    return math.ceil(max_fpr * foreign_count - 1e-9) - 1


def ccr_at_fpr(curve: OscrCurve, *, max_fpr: float, rule: str = "inclusive") -> float | None:
    """CCR at the smallest threshold whose FPR stays within ``max_fpr``; None where that is unreachable.

    Args:
        curve: from ``oscr_curve``.
        max_fpr: target in (0, 1].
        rule: "inclusive" (FPR <= target) or "strict" (FPR < target, the published thesis' convention).
    """
    reached = _reached(curve, max_fpr, rule)
    return float(curve.ccr[reached - 1]) if reached else None


def threshold_at_fpr(
    curve: OscrCurve, *, max_fpr: float, rule: str = "inclusive"
) -> np.floating[Any] | None:
    """The threshold at which ``ccr_at_fpr`` reads the CCR, in the scores' dtype; None where that is unreachable."""
    reached = _reached(curve, max_fpr, rule)
    return curve.thresholds[reached - 1] if reached else None


def _reached(curve: OscrCurve, max_fpr: float, rule: str) -> int:
    """How many of the curve's points keep the FPR within ``max_fpr``."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], got {max_fpr}")
    counts = np.rint(curve.fpr * curve.foreign_count)
    return int(
        np.searchsorted(counts, allowed_count(max_fpr, curve.foreign_count, rule), side="right")
    )


def ccr_at_zero_fpr(
    scores: ArrayLike, predictions: ArrayLike, labels: ArrayLike, *, against: int
) -> float | None:
    """CCR with no foreign sample accepted (tau just above the largest foreign score); None without foreign samples."""
    scores_array, labels_array = _checked(scores, labels)
    foreign = scores_array[labels_array == against]
    if not len(foreign):
        return None
    tau = np.nextafter(foreign.max(), scores_array.dtype.type(np.inf))
    return ccr_at_tau(scores_array, predictions, labels_array, tau=tau)


def ccr_at_tau(scores: ArrayLike, predictions: ArrayLike, labels: ArrayLike, *, tau: Any) -> float:
    """Share of all knowns that are classified correctly and accepted at tau."""
    scores_array, labels_array = _checked(scores, labels)
    known = is_known(labels_array)
    correct = known & (np.asarray(predictions) == labels_array)
    return float((correct & accept(scores_array, tau)).sum() / known.sum())


def fpr_at_tau(scores: ArrayLike, labels: ArrayLike, *, tau: Any, against: int) -> float | None:
    """Share of one foreign group accepted at tau; None without such samples."""
    scores_array, labels_array = _checked(scores, labels)
    foreign = scores_array[labels_array == against]
    return float(accept(foreign, tau).mean()) if len(foreign) else None


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Closed-set accuracy: share of knowns with the right class, whatever the score."""
    labels_array = np.asarray(labels)
    known = is_known(labels_array)
    if not known.any():
        raise ValueError("accuracy needs at least one known sample (label >= 0), got none")
    return float((np.asarray(predictions) == labels_array)[known].mean())


def auroc(scores: ArrayLike, labels: ArrayLike, *, against: int) -> float | None:
    """Probability that a known scores above a foreign sample, ties counting half; None if a group is missing."""
    scores_array, labels_array = _checked(scores, labels)
    known, foreign = scores_array[is_known(labels_array)], scores_array[labels_array == against]
    if not len(known) or not len(foreign):
        return None
    ranks = stats.rankdata(np.concatenate([known, foreign]))
    wins = ranks[: len(known)].sum() - len(known) * (len(known) + 1) / 2
    return float(wins / (len(known) * len(foreign)))


def clopper_pearson(
    successes: int, trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Exact two-sided binomial interval for a rate (Clopper and Pearson 1934)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}"
        )
    low, high = clopper_pearson_bounds(np.array([successes]), trials, confidence=confidence)
    return float(low[0]), float(high[0])


def clopper_pearson_bounds(
    successes: NDArray[np.int64], trials: int, *, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Both ends of ``clopper_pearson`` for many counts, each (m,), of the same number of trials."""
    tail = (1 - confidence) / 2
    low, high = np.zeros(len(successes)), np.ones(len(successes))
    some, not_all = successes > 0, successes < trials
    low[some] = stats.beta.ppf(tail, successes[some], trials - successes[some] + 1)
    high[not_all] = stats.beta.ppf(1 - tail, successes[not_all] + 1, trials - successes[not_all])
    return low, high


def _resampled_weights(
    groups: NDArray[Any], clustered: bool, random: np.random.Generator
) -> NDArray[np.int64]:
    """How often each sample is drawn in one bootstrap replicate, (M,)."""
    if not clustered:
        return np.bincount(random.integers(0, len(groups), len(groups)), minlength=len(groups))
    members = int(groups.max()) + 1
    drawn = np.bincount(random.integers(0, members, members), minlength=members)
    weights: NDArray[np.int64] = drawn[groups]
    return weights


def bootstrap_ccr_at_fpr(
    scores: ArrayLike,
    predictions: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    against: int,
    max_fpr: float,
    rule: str = "inclusive",
    clustered: bool = False,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of CCR@FPR; knowns and foreign samples are resampled apart and tau is estimated anew.

    Args:
        scores: (N,).
        predictions: (N,).
        labels: (N,).
        groups: class or source of each sample, (N,); used when ``clustered``.
        against: NEGATIVE or UNKNOWN.
        max_fpr: target.
        rule: as in ``ccr_at_fpr``.
        clustered: resample whole classes, since images of one class are correlated.
        repeats: number of replicates.
        confidence: of the interval.
        seed: of the resampling.

    Returns:
        (low, high), or None where too many replicates do not reach the FPR.
    """
    return bootstrap_ccr_at_fprs(
        scores, predictions, labels, groups, against=against, max_fprs=[max_fpr], rule=rule,
        clustered=clustered, repeats=repeats, confidence=confidence, seed=seed,
    )[max_fpr]  # fmt: skip


def bootstrap_ccr_at_fprs(
    scores: ArrayLike,
    predictions: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    against: int,
    max_fprs: Sequence[float],
    rule: str = "inclusive",
    clustered: bool = False,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[float, tuple[float, float] | None]:
    """``bootstrap_ccr_at_fpr`` of several targets, all on the same replicates; the same intervals, by target."""
    scores_array, labels_array = _checked(scores, labels)
    group_array = np.asarray(groups)
    random = np.random.default_rng(seed)

    def ordered(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        index = np.flatnonzero(mask)
        index = index[np.argsort(scores_array[index], kind="stable")]
        return index, np.unique(group_array[index], return_inverse=True)[1]

    known, known_groups = ordered(is_known(labels_array))
    foreign, foreign_groups = ordered(labels_array == against)
    if not len(known) or not len(foreign):
        return dict.fromkeys(max_fprs)
    correct = (np.asarray(predictions) == labels_array)[known]
    thresholds, first = np.unique(scores_array[foreign], return_index=True)
    start = np.searchsorted(scores_array[known], thresholds, side="left")
    values: dict[float, list[float]] = {max_fpr: [] for max_fpr in max_fprs}
    for _ in range(repeats):
        weights = _resampled_weights(foreign_groups, clustered, random)
        counts = np.add.reduceat(weights, first)
        accepted = counts[::-1].cumsum()[::-1]
        known_weights = _resampled_weights(known_groups, clustered, random)
        hits, known_count = known_weights * correct, known_weights.sum()
        foreign_count = int(weights.sum())
        for max_fpr, found in values.items():
            reached = (accepted <= allowed_count(max_fpr, foreign_count, rule)) & (counts > 0)
            if reached.any():
                lowest = int(start[int(np.argmax(reached))])
                found.append(hits[lowest:].sum() / known_count)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals: dict[float, tuple[float, float] | None] = dict.fromkeys(max_fprs)
    for max_fpr, found in values.items():
        if len(found) >= (1 - _MAX_UNREACHED_SHARE) * repeats:
            low, high = np.quantile(found, tails)
            intervals[max_fpr] = float(low), float(high)
    return intervals
