"""A probe that sees an image's histogram of values and nothing else: can foreign images be told from knowns by that?

Images of two sources differ in more than their subject: how they were scanned, scaled, compressed. A network trained with
negatives of another source can learn that difference in place of the classes (a shortcut: Geirhos et al., "Shortcut Learning
in Deep Neural Networks", 2020), and its open-set figures then say little about foreign images from the knowns' own source.
No rearrangement of the pixels changes a histogram. What the probe keeps of the knowns at a false-positive rate can
therefore be had on these data without recognizing a shape: by source and lighting, and of photographs also by color.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from openset import metrics
from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN, is_known
from openset.preprocessing import Preprocessing
from training.cures import FPR_TARGETS
from training.data import ProtocolData, Split, at_most, batch_count
from training.figures import COLORS, STYLE
from training.intervals import (
    Interval,
    ModelScores,
    bootstrap_by_class,
    percentile_interval,
    widened,
)
from training.report import group_masks

BINS = 64
_BATCH_SIZE = 256
_LINES = {"knowns and negatives": "-", "knowns alone": "--"}
# A CCR is in doubt where the histogram reaches either of these; at an FPR of 1 % a guess keeps .01 of the knowns.
_DOUBTFUL_AUROC = 0.9
_DOUBTFUL_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Probe:
    """What histograms of values tell of the test part of some data.

    Attributes:
        title: of the data, for people.
        scores: by what the probe was fitted on ("knowns and negatives", "knowns alone"), (N,) float32, high for knowns.
        labels: (N,) int64, of ``openset.labels``.
        groups: class of each image, (N,) str.
        histograms: mean share of the pixels in each bin by group ("known", "negative", "unknown"), (BINS,) each, over all
            channels.
    """

    title: str
    scores: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    histograms: dict[str, NDArray[np.float64]]

    @property
    def foreign(self) -> list[int]:
        """Labels of the foreign groups that are there."""
        return [label for label in GROUP_NAMES if (self.labels == label).any()]

    @property
    def sample(self) -> ModelScores:
        """The scores with every known rightly named: what is left of a CCR is the share that is kept."""
        return ModelScores(self.scores, np.maximum(self.labels, 0), self.labels, self.groups)

    def rows(self, *, rule: str) -> list[dict[str, Any]]:
        """A row for each fit and foreign group: AUROC, and the share of knowns that is kept at each FPR with its interval.

        Intervals are a bootstrap of whole classes, as in the tables of the grid; None with one class, or where an FPR is
        not reached.

        Args:
            rule: of the FPR, as in ``openset.metrics.ccr_at_fpr``.
        """
        return [
            {
                "data": self.title,
                "fitted_on": fitted_on,
                "against": GROUP_NAMES[against],
                "auroc": metrics.auroc(scores, self.labels, against=against),
                "kept_at_fpr": self._kept(fitted_on, against, rule),
                "known_count": int(is_known(self.labels).sum()),
                "foreign_count": int((self.labels == against).sum()),
            }
            for fitted_on, scores in self.scores.items()
            for against in self.foreign
        ]

    def _kept(self, fitted_on: str, against: int, rule: str) -> dict[str, Any]:
        sample = self.sample
        curve = metrics.oscr_curve(
            sample.scores[fitted_on], sample.predictions, self.labels, against=against
        )
        classes = min(
            len(np.unique(self.groups[mask])) for mask in (sample.known, self.labels == against)
        )
        replicates = bootstrap_by_class(
            sample, score=fitted_on, against=against, targets=FPR_TARGETS, rule=rule
        )
        kept = {}
        for target in FPR_TARGETS:
            value = metrics.ccr_at_fpr(curve, max_fpr=target, rule=rule)
            interval: Interval | None = None
            drawn = percentile_interval(replicates[f"{target:g}"])
            if value is not None and drawn is not None and classes > 1:
                low, high = widened(drawn, value, classes)
                interval = max(low, 0.0), min(high, 1.0)
            kept[f"{target:g}"] = {"value": value, "interval": interval}
        return kept


def value_histograms(images: NDArray[np.uint8], bins: int = BINS) -> NDArray[np.int64]:
    """How many pixels of each image lie in each of ``bins`` equal ranges of 0..255, channel by channel.

    Args:
        images: (N, channels, H, W).
        bins: a divisor of 256.

    Returns:
        (N, channels * bins).
    """
    count, channels = images.shape[:2]
    values = images.reshape(count * channels, -1) // (256 // bins)
    places = values.astype(np.int64) + bins * np.arange(count * channels)[:, None]
    counted = np.bincount(places.ravel(), minlength=count * channels * bins)
    return counted.reshape(count, channels * bins)


def probe(
    data: ProtocolData,
    *,
    title: str,
    per_class: int | None = None,
    workers: int = 0,
    show_progress: bool = True,
) -> Probe:
    """Fit on the training part's histograms and score the test part's.

    With negatives a logistic regression tells knowns from them; knowns alone have a normal distribution (Mahalanobis
    distance, covariance shrunk by the rule of Ledoit and Wolf, 2004). Both see log(1 + count), standardized.

    Args:
        data: with training and test part.
        title: of the data, for people.
        per_class: training images of each class; None for all.
        workers: data loading processes.
        show_progress: draw bars.

    Raises:
        ValueError: a part holds no known image that can be read, or the test part no foreign one.
    """
    shown = at_most(data.train, per_class)
    counts, train_labels, _ = _histograms(
        shown, data.preprocessing, "training", workers, show_progress
    )
    test_counts, labels, groups = _histograms(
        data.test, data.preprocessing, "test", workers, show_progress
    )
    for part, found in (("training", train_labels), ("test", labels)):
        if not is_known(found).any():
            raise ValueError(f"there is no known image in the {part} part")
    if is_known(labels).all():
        raise ValueError(
            "there is no foreign image in the test part, against which the knowns could be judged; "
            "own classes need unknown/ or negative/ (docs/training.md)"
        )
    train, test, known = np.log1p(counts), np.log1p(test_counts), is_known(train_labels)
    scores = {}
    if not known.all():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        scores["knowns and negatives"] = classifier.fit(train, known).decision_function(test)
    scaler = StandardScaler().fit(train[known])
    distribution = LedoitWolf().fit(scaler.transform(train[known]))
    scores["knowns alone"] = -distribution.mahalanobis(scaler.transform(test))
    shares = test_counts.reshape(len(test_counts), -1, BINS).sum(axis=1).astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    return Probe(
        title,
        {name: values.astype(np.float32) for name, values in scores.items()},
        labels,
        groups,
        {name: shares[mask].mean(axis=0) for name, mask in group_masks(labels).items()},
    )


def _histograms(
    split: Split, preprocessing: Preprocessing, part: str, workers: int, show_progress: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.str_]]:
    """Histograms, labels and groups of the readable images of a part, as the network sees them."""
    found, indices = [], []
    for images, _, index in tqdm(
        split.batches(_BATCH_SIZE, preprocessing, workers=workers),
        total=batch_count(split, _BATCH_SIZE),
        desc=f"histograms, {part} part",
        disable=None if show_progress else True,  # None: no bar where nobody watches
        leave=False,
    ):
        found.append(value_histograms(images.numpy()))
        indices.append(index)
    if not indices:
        raise ValueError(f"there is no image in the {part} part that can be read")
    order = np.concatenate(indices)
    return np.concatenate(found), split.labels[order], split.groups[order]


def doubts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each of the data and foreign groups that the histogram gives away, by the fit that tells most."""
    found = []
    doubtful = [row for row in rows if _is_doubtful(row)]
    for data, against in dict.fromkeys((row["data"], row["against"]) for row in doubtful):
        most = max(
            (row for row in doubtful if (row["data"], row["against"]) == (data, against)),
            key=lambda row: row["auroc"],
        )
        share = most["kept_at_fpr"]["0.01"]["value"]
        shown = f", {100 * share:.1f} % of the knowns kept at an FPR of 1 %" if share else ""
        found.append(
            f"{data}: a histogram of values, fitted on {most['fitted_on']}, tells {against}s from knowns (AUROC "
            f"{most['auroc']:.3f}{shown}). By source, lighting or color a model gets as far without recognizing anything; "
            f"its figures on these {against}s then do not hold for foreign images that are like the knowns in that"
        )
    return found


def _is_doubtful(row: dict[str, Any]) -> bool:
    kept = row["kept_at_fpr"]["0.01"]
    least = kept["value"] or 0.0 if kept["interval"] is None else kept["interval"][0]
    return bool(row["auroc"] >= _DOUBTFUL_AUROC or least >= _DOUBTFUL_SHARE)


def draw(probes: Sequence[Probe]) -> Figure:
    """Mean histograms above, what the probe keeps of the knowns below; a column for each of the data."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(probes), 6.0), layout="constrained")
        panels = figure.subplots(2, len(probes), squeeze=False, sharey="row")
        for (above, below), one in zip(panels.T, probes, strict=True):
            values = (np.arange(BINS) + 0.5) * 256 / BINS
            for name, shares in one.histograms.items():
                line = ":" if name == "unknown" else "-"
                above.plot(values, shares, line, color=COLORS[name], label=f"{name}s")
            above.set(yscale="log", xlabel="value of a pixel", title=one.title, xlim=(0, 256))
            against = UNKNOWN if UNKNOWN in one.foreign else NEGATIVE
            sample = one.sample
            for fitted_on, scores in one.scores.items():
                curve = metrics.oscr_curve(scores, sample.predictions, one.labels, against=against)
                label = f"fitted on {fitted_on}"
                below.plot(curve.fpr, curve.ccr, _LINES[fitted_on], color="#0072B2", label=label)
            chance = np.geomspace(1e-4, 1, 100)
            below.plot(chance, chance, ":", color="#777777", label="chance")
            name = GROUP_NAMES[against]
            below.set(xscale="log", xlim=(1e-4, 1), ylim=(-0.02, 1.02), xlabel=f"FPR on {name}s")
        panels[0][0].set_ylabel("share of the pixels, mean over images")
        panels[1][0].set_ylabel("share of the knowns that is kept")
        panels[0][-1].legend(loc="upper center")
        panels[1][-1].legend(loc="upper left")
        figure.suptitle("what a histogram of values tells, blind to every shape")
    return figure
