"""What is kept of each model beside its rows: bootstrap replicates, curves, angles, who passed; small enough to be committed.

With these files a report is complete on a machine that has no scores, but for deep features and contact sheets.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openset import metrics
from openset.labels import NEGATIVE, UNKNOWN
from training.angles import Angles, ProbabilityCurve
from training.grid.rows import OTHER_DIGITS_GROUP
from training.intervals import Floats, ModelScores, bootstrap_by_class
from training.published import TARGETS
from training.stored_arrays import loaded

logger = logging.getLogger(__name__)

SUMMARIES = "summaries"
GROUP_LABELS = {"negatives": NEGATIVE, "unknowns": UNKNOWN}
FPR_GRID = np.geomspace(8e-5, 1.0, 240)
# At which false-positive rates it is kept which foreign classes passed, and as what; the most frequent ones.
PASSING_TARGETS = ("1e-2", "1e-1")
_PASSING_PAIRS = 12
# Rates are stored as whole numbers of this many parts; a report shows thousandths of an interval.
_PARTS = 65_000
_UNREACHED = 65_535


@dataclass(frozen=True)
class Passing:
    """Foreign images above a threshold.

    Attributes:
        count: all of them.
        pairs: how many, by (foreign class, class it is taken for).
    """

    count: int
    pairs: dict[tuple[str, str], int]


@dataclass(frozen=True, eq=False)
class Summary:
    """Statistics of one evaluated model.

    Attributes:
        evaluated: when; rows of the same time belong to it.
        replicates: by (group, score), then by column, (repeats,), NaN where a replicate does not reach the FPR.
        curves: CCR at ``FPR_GRID`` by (group, score), (240,), NaN where the FPR is not reached.
        passing: by (group, score, target), how many foreign images are accepted, and of them those of each pair of a foreign
            and a known class, the most frequent pairs first; nothing where the FPR is not reached.
        angles: histograms by group; None in a file of an earlier release.
    """

    evaluated: str
    replicates: dict[tuple[str, str], dict[str, Floats]]
    curves: dict[tuple[str, str], Floats]
    passing: dict[tuple[str, str, str], Passing] = field(default_factory=dict)
    angles: Angles | None = None

    def save(self, file: Path) -> None:
        """Write atomically; the same statistics give the same bytes."""
        arrays: dict[str, NDArray[Any]] = {
            f"replicates/{group}/{score}/{column}": _packed(values)
            for (group, score), columns in self.replicates.items()
            for column, values in columns.items()
        }
        arrays |= {f"curves/{g}/{s}": _packed(values) for (g, s), values in self.curves.items()}
        for (group, score, target), passing in self.passing.items():
            name = f"passing/{group}/{score}/{target}"
            arrays[f"{name}/count"] = np.array(passing.count)
            arrays[f"{name}/pairs"] = np.array([list(pair) for pair in passing.pairs], dtype=str)
            arrays[f"{name}/counts"] = np.array(list(passing.pairs.values()), dtype=np.int64)
        if self.angles is not None:
            arrays |= {f"angles/{group}": counts for group, counts in self.angles.counts.items()}
            if self.angles.curve is not None:
                arrays["probability"] = self.angles.curve.packed()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        with partial.open("wb") as stream:
            np.savez_compressed(
                stream, allow_pickle=False, evaluated=np.array(self.evaluated), **arrays
            )
        os.replace(partial, file)

    @classmethod
    def load(cls, file: Path) -> Summary:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        replicates: dict[tuple[str, str], dict[str, Floats]] = {}
        curves = {}
        passing = {}
        counts_of_angles = {}
        probability = None
        with loaded(file) as stored:
            evaluated = str(stored["evaluated"])
            for name in stored.files:
                kind, *key = name.split("/")
                if kind == "replicates":
                    group, score, column = key
                    replicates.setdefault((group, score), {})[column] = _unpacked(stored[name])
                elif kind == "curves":
                    curves[key[0], key[1]] = _unpacked(stored[name])
                elif kind == "angles":
                    counts_of_angles[key[0]] = stored[name]
                elif kind == "probability":
                    probability = ProbabilityCurve.unpacked(stored[name])
                elif kind == "passing" and key[-1] == "count":
                    place = name.removesuffix("/count")
                    pairs = (tuple(pair) for pair in stored[f"{place}/pairs"].tolist())
                    counts = stored[f"{place}/counts"].tolist()
                    passing[key[0], key[1], key[2]] = Passing(
                        int(stored[name]), dict(zip(pairs, counts, strict=True))
                    )
        angles = Angles(counts_of_angles, probability) if counts_of_angles else None
        return cls(evaluated, replicates, curves, passing, angles)


def summarize(
    sample: ModelScores,
    *,
    rule: str,
    evaluated: str,
    angles: Angles | None = None,
    other_digits: ModelScores | None = None,
) -> Summary:
    """Bootstrap replicates and curves of every score against every foreign group of a test part.

    ``other_digits`` is the test with the digits of the other source, of which the replicates against unknowns are kept.
    """
    keys = [
        (group, score)
        for group, label in GROUP_LABELS.items()
        if (sample.labels == label).any()
        for score in sample.scores
    ]
    targets = [float(target) for target in TARGETS]
    samples = [(group, score, sample, GROUP_LABELS[group]) for group, score in keys]
    if other_digits is not None:
        samples += [
            (OTHER_DIGITS_GROUP, score, other_digits, UNKNOWN) for score in other_digits.scores
        ]
    return Summary(
        evaluated,
        {
            (group, score): bootstrap_by_class(
                of, score=score, against=label, targets=targets, rule=rule
            )
            for group, score, of, label in samples
        },
        {(group, score): _ccr_at_grid(sample, group, score) for group, score in keys},
        {
            (group, score, target): passing
            for group, score in keys
            for target in PASSING_TARGETS
            if (passing := _passing(sample, group, score, target, rule)) is not None
        },
        angles,
    )


def _ccr_at_grid(sample: ModelScores, group: str, score: str) -> Floats:
    curve = metrics.oscr_curve(
        sample.scores[score], sample.predictions, sample.labels, against=GROUP_LABELS[group]
    )
    reached = np.searchsorted(curve.fpr, FPR_GRID, side="right") - 1
    return np.where(reached < 0, np.nan, curve.ccr[reached.clip(0)])


def _passing(sample: ModelScores, group: str, score: str, target: str, rule: str) -> Passing | None:
    scores, label = sample.scores[score], GROUP_LABELS[group]
    curve = metrics.oscr_curve(scores, sample.predictions, sample.labels, against=label)
    tau = metrics.threshold_at_fpr(curve, max_fpr=float(target), rule=rule)
    if tau is None:
        return None
    known = sample.labels >= 0
    of_label = dict(zip(sample.labels[known].tolist(), sample.groups[known].tolist(), strict=True))
    passed = (sample.labels == label) & (scores >= tau)
    pairs = Counter(
        (str(foreign), str(of_label.get(taken, taken)))
        for foreign, taken in zip(
            sample.groups[passed].tolist(), sample.predictions[passed].tolist(), strict=True
        )
    )
    first = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:_PASSING_PAIRS]
    return Passing(int(passed.sum()), dict(first))


def summary_file(results: Path, run: str) -> Path:
    """Where the summary of a run lies."""
    return results / SUMMARIES / f"{run}.npz"


def stored_summary(file: Path, evaluated: str) -> Summary | None:
    """The summary of a file; None where there is none of this evaluation."""
    if not file.is_file():
        return None
    try:
        summary = Summary.load(file)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    return summary if summary.evaluated == evaluated else None


def _packed(rates: Floats) -> NDArray[np.uint16]:
    return np.where(np.isnan(rates), _UNREACHED, np.rint(np.nan_to_num(rates) * _PARTS)).astype(
        np.uint16
    )


def _unpacked(stored: NDArray[np.uint16]) -> Floats:
    return np.where(stored == _UNREACHED, np.nan, stored / _PARTS)
