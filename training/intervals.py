"""Intervals of means and differences: over seeds (Student's t), over classes (bootstrap of whole classes, paired by model)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from openset import metrics
from openset.labels import is_known

Floats = NDArray[np.float64]
Interval = tuple[float, float]

REPEATS = 1000
ACCURACY = "accuracy"
# As in openset.metrics: an interval of which so many replicates are undefined is undefined.
_MAX_UNREACHED_SHARE = 0.025


def seed_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    half = (
        _t_quantile(len(values) - 1, confidence) * np.std(values, ddof=1) / math.sqrt(len(values))
    )
    mean = float(np.mean(values))
    return mean - float(half), mean + float(half)


def prediction_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """Where one more seed is expected: Student's t prediction interval of a normal sample; None for fewer than two."""
    mean_interval = seed_interval(values, confidence=confidence)
    if mean_interval is None:
        return None
    mean = float(np.mean(values))
    half = (mean_interval[1] - mean) * math.sqrt(len(values) + 1)
    return mean - half, mean + half


def seed_difference_interval(
    first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95
) -> Interval | None:
    """Welch's t interval of mean(first) - mean(second); None unless both have at least two seeds."""
    if min(len(first), len(second)) < 2:
        return None
    difference = float(np.mean(first) - np.mean(second))
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    variance = sum(parts)
    if variance == 0:
        return difference, difference
    degrees = variance**2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    half = _t_quantile(degrees, confidence) * math.sqrt(variance)
    return difference - half, difference + half


def _t_quantile(degrees: float, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def percentile_interval(replicates: Floats, *, confidence: float = 0.95) -> Interval | None:
    """Percentiles of bootstrap replicates, NaN where a replicate does not reach the FPR; None if too many do not."""
    reached = replicates[~np.isnan(replicates)]
    if len(reached) < (1 - _MAX_UNREACHED_SHARE) * len(replicates):
        return None
    low, high = np.quantile(reached, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def widened(
    interval: Interval, center: float, class_count: int, *, confidence: float = 0.95
) -> Interval:
    """A percentile interval of a bootstrap over few classes, made as wide as it claims to be.

    With G classes the bootstrap's variance is too small by (G - 1) / G, and its percentiles are a normal's where G - 1
    degrees of freedom need Student's t. Both are made up for, on either side of the estimate.

    Args:
        interval: percentiles of the replicates.
        center: the estimate.
        class_count: G, of the group with the fewest classes.
        confidence: of the interval.
    """
    if class_count < 2:
        return -math.inf, math.inf
    normal = float(stats.norm.ppf((1 + confidence) / 2))
    factor = (
        math.sqrt(class_count / (class_count - 1))
        * _t_quantile(class_count - 1, confidence)
        / normal
    )
    return center - factor * (center - interval[0]), center + factor * (interval[1] - center)


@dataclass(frozen=True, eq=False)
class ModelScores:
    """Stored scores of one model on the test part; the columns a figure needs, nothing else.

    Attributes:
        scores: by score type, (N,) each.
        predictions: (N,).
        labels: (N,).
        groups: class of each sample, (N,).
    """

    scores: dict[str, NDArray[np.float32]]
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Which samples are known, (N,)."""
        mask: NDArray[np.bool_] = is_known(self.labels)
        return mask


def class_draws(classes: Sequence[str], repeats: int = REPEATS) -> NDArray[np.int64]:
    """How often each class is drawn in each replicate, (repeats, classes).

    A function of the class list alone: all models of a protocol are resampled alike, which is what pairs them.
    """
    random = np.random.default_rng(zlib.crc32("/".join(classes).encode()))
    size = len(classes)
    return random.multinomial(size, np.full(size, 1 / size), repeats)


def bootstrap_by_class(
    sample: ModelScores,
    *,
    score: str,
    against: int,
    targets: Sequence[float],
    rule: str,
    repeats: int = REPEATS,
) -> dict[str, Floats]:
    """Replicates of CCR@FPR and of the accuracy, (repeats,) each, NaN where the FPR is not reached.

    Whole classes are drawn, knowns and foreign ones apart, and the threshold is estimated anew in every replicate:
    images of one class resemble each other, so that they are no independent draws. All replicates are one matrix
    product, since a sample's weight is its class's.

    Args:
        sample: the model's test scores.
        score: which score accepts.
        against: NEGATIVE or UNKNOWN.
        targets: FPRs.
        rule: as in ``openset.metrics.ccr_at_fpr``.
        repeats: number of replicates.

    Returns:
        By f"{target:g}", and "accuracy".
    """
    values = sample.scores[score]
    foreign = sample.labels == against
    thresholds = np.unique(values[foreign])[::-1]
    foreign_draws, foreign_weights = _drawn(sample.groups[foreign], repeats)
    known_draws, known_weights = _drawn(sample.groups[sample.known], repeats)
    correct = (sample.predictions == sample.labels)[sample.known]
    # Counts are whole numbers far below 2**53: exact in float64, whose matrix product is the fast one.
    accepted = foreign_draws @ _reaching(values[foreign], foreign_weights, thresholds)
    right = _reaching(values[sample.known][correct], known_weights[:, correct], thresholds)
    foreign_totals = foreign_draws @ foreign_weights.sum(axis=1)
    known_totals = known_draws @ known_weights.sum(axis=1)
    replicates = {}
    for target in targets:
        allowed = [metrics.allowed_count(target, int(total), rule) for total in foreign_totals]
        within = (accepted <= np.array(allowed)[:, None]).sum(axis=1)
        reached = np.take_along_axis(accepted, (within - 1).clip(0)[:, None], axis=1)
        # Thresholds at which a replicate has no sample add none: its threshold is the last one that it has.
        lowest = (accepted < reached).sum(axis=1)
        correctly = (known_draws * right[:, lowest].T).sum(axis=1) / known_totals
        is_reached = (within > 0) & (reached[:, 0] > 0)
        replicates[f"{target:g}"] = np.where(is_reached, correctly, np.nan)
    replicates[ACCURACY] = known_draws @ known_weights[:, correct].sum(axis=1) / known_totals
    return replicates


def _drawn(groups: NDArray[np.str_], repeats: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Draws of the classes, (repeats, classes), and which samples belong to each class, (classes, samples)."""
    names, members = np.unique(groups, return_inverse=True)
    draws = class_draws(names.tolist(), repeats).astype(np.float64)
    return draws, members[None, :] == np.arange(len(names))[:, None]


def _reaching(
    values: NDArray[np.float32], members: NDArray[np.bool_], thresholds: NDArray[np.float32]
) -> Floats:
    """How many samples of each class reach each threshold, (classes, thresholds)."""
    counts = [metrics.count_at_least(np.sort(values[mask]), thresholds) for mask in members]
    return np.stack(counts).astype(np.float64)
