"""Thresholds with a guarantee: tau from held-out foreign scores, valid with a stated confidence.

With n foreign scores drawn like future ones, target FPR alpha and confidence 1 - delta:

    k   = max { k >= 0 : BinomialCDF(k; n, alpha) <= delta }
    tau = the next representable value above the (k+1)-th largest score

Then P(FPR(tau) <= alpha) >= 1 - delta for any score distribution, ties included. It is the one-sided Clopper-Pearson
bound, applied where the threshold itself is chosen. The promise is for new *images* of the population that the scores
were drawn from; it does not cover new kinds of foreign objects.
"""

from __future__ import annotations

import io
import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from openset import metrics
from openset.decision import DEFAULT_CONFIDENCE as DEFAULT_CONFIDENCE
from openset.decision import DEFAULT_FPR as DEFAULT_FPR
from openset.labels import NEGATIVE, is_known, is_negative

# Targets and confidences come no nearer to 0 and 1: nobody has the negatives for it, and float64 rounds there.
NEAREST_TO_BOUNDARY = 1e-9


class NotCertifiable(ValueError):
    """Too few foreign scores to promise the target FPR at this confidence."""

    def __init__(self, *, n: int, fpr: float, confidence: float) -> None:
        self.n = n
        self.fpr = fpr
        self.confidence = confidence
        self.smallest_attainable_fpr = smallest_attainable_fpr(n, confidence=confidence)
        super().__init__(
            f"a false-positive rate of {fpr:g} cannot be promised at confidence {confidence:g} with {n} calibration "
            f"negatives; "
            + (
                f"the smallest attainable rate is {_rounded_up(self.smallest_attainable_fpr):g}, and "
                if n
                else ""
            )
            + f"{fpr:g} needs at least {negatives_needed(fpr, confidence=confidence)} negatives"
        )


@dataclass(frozen=True)
class Threshold:
    """A certified threshold.

    Attributes:
        tau: accept iff score >= tau; exactly representable in the dtype of the comparison.
        n: foreign scores it rests on.
        k: how many of them may be accepted.
        accepted: how many of them are accepted (<= k; fewer if scores tie).
        expected_fpr: (k + 1) / (n + 1), an upper value if scores tie.
        fpr_upper_bound: one-sided Clopper-Pearson bound, <= the target.
    """

    tau: float
    n: int
    k: int
    accepted: int
    expected_fpr: float
    fpr_upper_bound: float


def _rounded_up(rate: float) -> float:
    """Three significant digits, rounded up: a rate that is named must be attainable."""
    scale: float = 10.0 ** (2 - math.floor(math.log10(rate)))
    return math.ceil(rate * scale) / scale


def _check_targets(fpr: float, confidence: float) -> None:
    for name, value in (("target false-positive rate", fpr), ("confidence", confidence)):
        if not NEAREST_TO_BOUNDARY <= value <= 1 - NEAREST_TO_BOUNDARY:
            raise ValueError(
                f"the {name} must lie between 0 and 1, not nearer to either than {NEAREST_TO_BOUNDARY:g}, got {value!r}"
            )


def _require_finite(scores: NDArray[Any]) -> None:
    if bad := int((~np.isfinite(scores)).sum()):
        raise ValueError(
            f"calibration scores must be finite, got {bad} NaN or infinite of {len(scores)}"
        )


def smallest_attainable_fpr(n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """Smallest FPR that n foreign scores can certify: 1 - delta^(1/n); 1, which nothing attains, for n = 0.

    The rate is one that ``choose_threshold`` accepts: it lies above the formula by a few roundings at most.
    """
    if n <= 0:
        return 1.0
    rate = -math.expm1(math.log1p(-confidence) / n)
    step = math.ulp(rate)
    while _allowed_accepted(n, rate, confidence) < 0:
        rate += step
        step *= 2
    return rate


def negatives_needed(fpr: float, *, confidence: float = DEFAULT_CONFIDENCE) -> int:
    """Fewest foreign scores that certify ``fpr``: ceil(ln delta / ln(1 - fpr)), a number that ``choose_threshold`` accepts."""
    n = math.ceil(math.log1p(-confidence) / math.log1p(-fpr) - 1e-9)
    while _allowed_accepted(n, fpr, confidence) < 0:
        n += 1
    return n


def _allowed_accepted(n: int, fpr: float, confidence: float) -> int:
    """Largest k with BinomialCDF(k; n, fpr) <= 1 - confidence, or -1."""
    delta = 1 - confidence
    k = int(stats.binom.ppf(delta, n, fpr))
    while k >= 0 and stats.binom.cdf(k, n, fpr) > delta:
        k -= 1
    return k


def choose_threshold(
    negative_scores: ArrayLike,
    *,
    fpr: float,
    confidence: float = DEFAULT_CONFIDENCE,
    dtype: Any = np.float32,
) -> Threshold:
    """Choose tau so that the FPR stays at or below ``fpr`` with the given confidence.

    Args:
        negative_scores: scores of held-out foreign samples, used for nothing else, (n,); higher = more known.
        fpr: target false-positive rate, in (0, 1), not nearer to either than 1e-9.
        confidence: 1 - delta, likewise.
        dtype: of the comparison that will be made in serving; scores are rounded to it first.

    Raises:
        NotCertifiable: n is too small; names the smallest attainable FPR.
        ValueError: non-finite scores, wrong shape, targets out of range.
    """
    _check_targets(fpr, confidence)
    scores = np.asarray(negative_scores)
    if scores.ndim != 1:
        raise ValueError(f"negative_scores must be one-dimensional, got shape {scores.shape}")
    scores = scores.astype(dtype)
    _require_finite(scores)
    return _threshold(np.sort(scores), fpr=fpr, confidence=confidence)


def _threshold(ascending: NDArray[Any], *, fpr: float, confidence: float) -> Threshold:
    """``choose_threshold`` on finite scores that are sorted and have the dtype of the comparison, (n,)."""
    n = len(ascending)
    k = _allowed_accepted(n, fpr, confidence)
    if k < 0:
        raise NotCertifiable(n=n, fpr=fpr, confidence=confidence)
    # The next value in the dtype of the comparison: rounded later, it would fall back on the score and accept the tie.
    above = np.array(np.inf, dtype=ascending.dtype)
    tau = np.nextafter(ascending[n - k - 1], above, dtype=ascending.dtype)
    return Threshold(
        tau=float(tau),
        n=n,
        k=k,
        accepted=int(metrics.count_at_least(ascending, tau)),
        expected_fpr=(k + 1) / (n + 1),
        fpr_upper_bound=float(stats.beta.ppf(confidence, k + 1, n - k)),
    )


def p_value(score: float, sorted_negative_scores: NDArray[np.float32]) -> float:
    """Conformal p-value of a score: (1 + #{calibration scores >= score}) / (n + 1).

    Args:
        score: of the image in question, a float32 value.
        sorted_negative_scores: ascending, (n,).
    """
    n = len(sorted_negative_scores)
    # Every answer needs one: a search in plain floats costs a fraction of NumPy's.
    return (1 + n - bisect_left(sorted_negative_scores.data, score)) / (n + 1)


@dataclass(frozen=True, eq=False)
class ScoreSet:
    """Calibration scores of one path.

    Attributes:
        path: ``PathIdentity.key`` of the computation that made the scores.
        scores: by score type, each (N,) float32.
        predictions: (N,) int64.
        labels: known classes and NEGATIVE, (N,) int64.
        groups: class or source of each sample, (N,) str.
        sample_ids: (N,) str.
    """

    path: str
    scores: dict[str, NDArray[np.float32]]
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    sample_ids: NDArray[np.str_]

    def __post_init__(self) -> None:
        count = len(self.labels)
        arrays: dict[str, NDArray[Any]] = {
            **self.scores,
            "predictions": self.predictions,
            "groups": self.groups,
            "sample_ids": self.sample_ids,
        }
        for name, values in arrays.items():
            if values.shape != (count,):
                raise ValueError(
                    f"score set {self.path}: {name} must have shape ({count},), got {values.shape}"
                )

    def of_type(self, score_type: str) -> NDArray[np.float32]:
        """All scores of one type, (N,)."""
        if score_type not in self.scores:
            raise ValueError(f"score must be one of {sorted(self.scores)}, got {score_type!r}")
        return self.scores[score_type]

    def negative_scores(self, score_type: str) -> NDArray[np.float32]:
        """Scores of the negatives, (n,)."""
        scores: NDArray[np.float32] = self.of_type(score_type)[is_negative(self.labels)]
        return scores


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold with everything a user must know about it.

    Attributes:
        score_type: one of the model card's scores.
        tau: accept iff score >= tau, in the unit of the score.
        fpr: target.
        confidence: of the bound.
        n: calibration negatives.
        k: accepted at most.
        accepted: accepted in fact.
        expected_fpr: (k + 1) / (n + 1).
        fpr_upper_bound: holds with ``confidence``.
        expected_ccr: CCR on the calibration knowns at tau; None without knowns.
        path: path of the score set.
    """

    score_type: str
    tau: float
    fpr: float
    confidence: float
    n: int
    k: int
    accepted: int
    expected_fpr: float
    fpr_upper_bound: float
    expected_ccr: float | None
    path: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> OperatingPoint:
        """Read back what ``to_dict`` wrote."""
        names = {field.name for field in fields(cls)}
        if content.keys() != names:
            raise ValueError(
                f"operating point must have the keys {sorted(names)}, got {sorted(content)}"
            )
        return cls(**content)


@dataclass(frozen=True, eq=False)
class SortedScores:
    """What is needed of a score set to choose thresholds again and again, sorted once.

    Attributes:
        score_type: of the scores.
        path: of the score set.
        negatives: scores of the negatives, ascending, (n,) float32.
        correct: scores of the knowns whose prediction is right, ascending, (m,) float32.
        knowns: number of knowns.
    """

    score_type: str
    path: str
    negatives: NDArray[np.float32]
    correct: NDArray[np.float32]
    knowns: int

    @classmethod
    def of(cls, score_set: ScoreSet, score_type: str) -> SortedScores:
        """Sort the scores of one type.

        Raises:
            ValueError: unknown score type, or a score that is not finite.
        """
        scores = score_set.of_type(score_type).astype(np.float32)
        _require_finite(scores)
        known = is_known(score_set.labels)
        correct = known & (score_set.predictions == score_set.labels)
        return cls(
            score_type=score_type,
            path=score_set.path,
            negatives=np.sort(scores[score_set.labels == NEGATIVE]),
            correct=np.sort(scores[correct]),
            knowns=int(known.sum()),
        )

    def operating_point(
        self, *, fpr: float, confidence: float = DEFAULT_CONFIDENCE
    ) -> OperatingPoint:
        """Choose tau and say what it costs.

        Raises:
            NotCertifiable: too few negatives for this target.
            ValueError: bad targets.
        """
        _check_targets(fpr, confidence)
        threshold = _threshold(self.negatives, fpr=fpr, confidence=confidence)
        tau = np.array(threshold.tau, dtype=np.float32)
        labelled = int(metrics.count_at_least(self.correct, tau))
        return OperatingPoint(
            score_type=self.score_type,
            fpr=fpr,
            confidence=confidence,
            expected_ccr=labelled / self.knowns if self.knowns else None,
            path=self.path,
            **asdict(threshold),
        )


def operating_point(
    score_set: ScoreSet, *, score_type: str, fpr: float, confidence: float = DEFAULT_CONFIDENCE
) -> OperatingPoint:
    """Choose tau on a score set and say what it costs.

    Raises:
        NotCertifiable: too few negatives for this target.
        ValueError: unknown score type or bad targets.
    """
    return SortedScores.of(score_set, score_type).operating_point(fpr=fpr, confidence=confidence)


def save_score_sets(file: Path | str, score_sets: Iterable[ScoreSet]) -> None:
    """Write the score sets to one ``calibration.npz`` (atomically; no pickle)."""
    arrays: dict[str, NDArray[Any]] = {}
    index = []
    for number, score_set in enumerate(score_sets):
        index.append({"path": score_set.path, "scores": sorted(score_set.scores)})
        for score_type, values in score_set.scores.items():
            arrays[f"{number}/scores/{score_type}"] = values.astype(np.float32)
        for name in ("predictions", "labels", "groups", "sample_ids"):
            arrays[f"{number}/{name}"] = getattr(score_set, name)
    arrays["index"] = np.array(json.dumps(index, sort_keys=True))
    target = Path(file)
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    os.replace(partial, target)


def require_stated_sizes(content: Any) -> None:
    """Refuse an open npz file with an array whose header is damaged: it would ask for memory that nothing in the file needs.

    Raises:
        ValueError: an array's header does not say what is stored.
    """
    for member in content.zip.infolist():
        with content.zip.open(member) as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            expected = stream.tell() + math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and expected != member.file_size:  # numpy refuses objects
            name = member.filename.removesuffix(".npy")
            raise ValueError(f"{name} has {member.file_size} bytes, its header says {expected}")


def load_score_sets(file: Path | str | bytes) -> dict[str, ScoreSet]:
    """Read ``calibration.npz`` from a path or from its bytes; keyed by path.

    Raises:
        ValueError: not a file of score sets, or a damaged one.
        MemoryError: a sound file may hold more than there is room for now.
    """
    source: Any = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with np.load(source, allow_pickle=False) as content:
            require_stated_sizes(content)
            index = json.loads(str(content["index"]))
            sets = [
                ScoreSet(
                    path=entry["path"],
                    scores={name: content[f"{number}/scores/{name}"] for name in entry["scores"]},
                    **{
                        name: content[f"{number}/{name}"]
                        for name in ("predictions", "labels", "groups", "sample_ids")
                    },
                )
                for number, entry in enumerate(index)
            ]
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:
        # Damaged bytes: numpy, zipfile and what decompresses for them raise a dozen kinds.
        raise ValueError(
            f"not a file of calibration scores ({type(error).__name__}: {error})"
        ) from error
    return {score_set.path: score_set for score_set in sets}
