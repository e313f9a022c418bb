"""Can foreign images be told from knowns without looking at what they show? ``python -m training.shortcut --protocol toy``.

Images of two sources differ in more than their subject: how they were scanned, scaled, compressed. A network trained with
negatives of another source can learn that difference in place of the classes (a shortcut: Geirhos et al., "Shortcut Learning
in Deep Neural Networks", 2020), and its open-set figures then say little about unknown kinds of the same source. This probe
sees an image's histogram of values alone, which no rearrangement of the pixels changes. What it keeps of the knowns at a
false-positive rate is what a model may reach on these data without recognizing a single shape.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.choices import DIGITS, RUNS

logger = logging.getLogger(__name__)

FPR_TARGETS = (1e-3, 1e-2, 1e-1)
BINS = 64
PER_CLASS = 1000
# A single histogram tells little of what an image shows: from here on it is the source that it tells.
_TELLING_AUROC = 0.9
_TABLE_WIDTH = 150
_RULE = "strict"  # as the published tables count


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

    def rows(self) -> list[dict[str, Any]]:
        """A row for each fit and foreign group: AUROC, and the share of knowns that is kept at each FPR with its interval.

        Intervals are a bootstrap of whole classes, as in the tables of the grid.
        """
        from openset import metrics
        from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN
        from training.grid_statistics import (
            ModelScores,
            bootstrap_by_class,
            percentile_interval,
            widened,
        )

        # Every known counts as rightly named: what is left of the CCR is the share that is kept.
        predictions = np.maximum(self.labels, 0)
        sample = ModelScores(self.scores, predictions, self.labels, self.groups)
        rows = []
        for fitted_on, scores in self.scores.items():
            for against in (NEGATIVE, UNKNOWN):
                foreign = self.labels == against
                if not foreign.any():
                    continue
                curve = metrics.oscr_curve(scores, predictions, self.labels, against=against)
                replicates = bootstrap_by_class(
                    sample, score=fitted_on, against=against, targets=FPR_TARGETS, rule=_RULE
                )
                classes = min(
                    len(np.unique(self.groups[foreign])), len(np.unique(self.groups[sample.known]))
                )
                kept = {}
                for target in FPR_TARGETS:
                    value = metrics.ccr_at_fpr(curve, max_fpr=target, rule=_RULE)
                    interval = percentile_interval(replicates[f"{target:g}"])
                    if value is not None and interval is not None and classes > 1:
                        low, high = widened(interval, value, classes)
                        interval = max(low, 0.0), min(high, 1.0)
                    else:
                        interval = None
                    kept[f"{target:g}"] = {"value": value, "interval": interval}
                rows.append(
                    {
                        "data": self.title,
                        "fitted_on": fitted_on,
                        "against": GROUP_NAMES[against],
                        "auroc": metrics.auroc(scores, self.labels, against=against),
                        "kept_at_fpr": kept,
                        "known_count": int(sample.known.sum()),
                        "foreign_count": int(foreign.sum()),
                    }
                )
        return rows


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


def probe(data: Any, *, title: str, per_class: int | None = PER_CLASS, workers: int = 0) -> Probe:
    """Fit on the training part's histograms and score the test part's.

    With negatives a logistic regression tells knowns from them; knowns alone have a normal distribution of the logarithms
    (Mahalanobis distance, covariance shrunk by Ledoit and Wolf's rule). Both see log(1 + count).

    Args:
        data: ``training.data.ProtocolData`` with training and test part.
        title: of the data, for people.
        per_class: training images of each class; None for all.
        workers: data loading processes.

    Raises:
        ValueError: there is no foreign image in the test part.
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from openset.labels import GROUP_NAMES, is_known
    from training.data import at_most

    test_counts, labels, groups = _histograms(data.test, data.preprocessing, workers)
    if is_known(labels).all():
        raise ValueError(
            "there is no foreign image in the test part, against which the knowns could be judged; "
            "own classes need unknown/ or negative/ (docs/training.md)"
        )
    train_counts, train_labels, _ = _histograms(
        at_most(data.train, per_class), data.preprocessing, workers
    )
    train, test = np.log1p(train_counts), np.log1p(test_counts)
    known = is_known(train_labels)
    scores = {}
    if not known.all():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(train, known)
        scores["knowns and negatives"] = classifier.decision_function(test)
    scaled = StandardScaler().fit(train[known])
    distribution = LedoitWolf().fit(scaled.transform(train[known]))
    scores["knowns alone"] = -distribution.mahalanobis(scaled.transform(test))
    shares = test_counts.reshape(len(test_counts), -1, BINS).sum(axis=1).astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    masks = {"known": is_known(labels)}
    masks |= {name: labels == label for label, name in GROUP_NAMES.items()}
    return Probe(
        title,
        {name: values.astype(np.float32) for name, values in scores.items()},
        labels,
        groups,
        {name: shares[mask].mean(axis=0) for name, mask in masks.items() if mask.any()},
    )


def _histograms(
    split: Any, preprocessing: Any, workers: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.str_]]:
    """Histograms, labels and groups of the readable images of a part, as the network sees them."""
    found, indices = [], []
    for images, _, index in split.batches(256, preprocessing, workers=workers):
        found.append(value_histograms(images.numpy()))
        indices.append(index)
    if not indices:
        raise ValueError("there is no image to judge")
    order = np.concatenate(indices)
    return np.concatenate(found), split.labels[order], split.groups[order]


def draw(probes: Sequence[Probe]) -> Any:
    """Mean histograms above, what the probe keeps of the knowns below; a column for each of the data."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from openset import metrics
    from openset.labels import NEGATIVE, UNKNOWN
    from training.figures import COLORS, STYLE

    lines = {"knowns and negatives": "-", "knowns alone": "--"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(probes), 6.0), layout="constrained")
        panels = figure.subplots(2, len(probes), squeeze=False, sharey="row")
        for (above, below), one in zip(panels.T, probes, strict=True):
            values = (np.arange(BINS) + 0.5) * 256 / BINS
            for name, shares in one.histograms.items():
                line = ":" if name == "unknown" else "-"
                above.plot(values, shares, line, color=COLORS[name], label=f"{name}s")
            above.set(yscale="log", xlabel="value of a pixel", title=one.title, xlim=(0, 256))
            against = UNKNOWN if (one.labels == UNKNOWN).any() else NEGATIVE
            name = {UNKNOWN: "unknowns", NEGATIVE: "negatives"}[against]
            for fitted_on, scores in one.scores.items():
                curve = metrics.oscr_curve(
                    scores, np.maximum(one.labels, 0), one.labels, against=against
                )
                below.plot(
                    curve.fpr, curve.ccr, lines[fitted_on], color="#0072B2", label=f"fitted on {fitted_on}"
                )  # fmt: skip
            chance = np.geomspace(1e-4, 1, 100)
            below.plot(chance, chance, ":", color="#777777", label="chance")
            below.set(xscale="log", xlim=(1e-4, 1), ylim=(-0.02, 1.02), xlabel=f"FPR on {name}")
        panels[0][0].set_ylabel("share of the pixels, mean over images")
        panels[1][0].set_ylabel("share of the knowns that is kept")
        panels[0][-1].legend(loc="upper center")
        panels[1][-1].legend(loc="upper left")
        figure.suptitle("what a histogram of values tells, blind to every shape")
    return figure


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The table, and what it means."""
    from rich.table import Table

    from training.cures import print_wide

    table = Table(title="share of the knowns kept by a histogram of values, blind to every shape")
    for heading in ("data", "fitted on", "against"):
        table.add_column(heading)
    for heading in ("AUROC", *(f"kept at FPR {target:g}" for target in FPR_TARGETS)):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [_cell(row["kept_at_fpr"][f"{target:g}"]) for target in FPR_TARGETS]
        table.add_row(
            row["data"], row["fitted_on"], f"{row['against']}s", f"{row['auroc']:.4f}", *cells
        )
    print_wide(table, _TABLE_WIDTH)
    for text in warnings(rows):
        logger.warning("warning: %s", text)


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each of the data whose foreign images the histograms give away; by the row that tells most."""
    found = []
    for data in dict.fromkeys(row["data"] for row in rows):
        most = max((row for row in rows if row["data"] == data), key=lambda row: row["auroc"])
        if most["auroc"] < _TELLING_AUROC:
            continue
        shares = [
            f"{100 * one['value']:.1f} % of the knowns are kept at an FPR of {float(target):g}"
            for target, one in most["kept_at_fpr"].items()
            if one["value"] is not None
        ]
        found.append(
            f"{data}: histograms alone tell {most['against']}s from knowns (AUROC {most['auroc']:.3f}"
            f"{', ' + shares[0] if shares else ''}; fitted on {most['fitted_on']}). They differ by their source, so that a "
            "model's CCR on them says little about foreign images from where the knowns are from"
        )
    return found


def _cell(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    interval = found["interval"]
    ends = "" if interval is None else f" \\[{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{found['value']:.4f}{ends}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.shortcut", description=__doc__)
    parser.add_argument("--protocol", default="glyphs")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--digits", choices=DIGITS, help="of toy; default: both, one after another")
    parser.add_argument("--image-size", type=int, help="of p1-p3 and folders")
    parser.add_argument(
        "--per-class", type=int, default=PER_CLASS, help="training images of each class; default: %(default)s"
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--json", type=Path, help="default: runs/shortcut/<protocol>.json")
    parser.add_argument("--figure", type=Path, help="default: runs/shortcut/<protocol>.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    # Torch takes seconds: what stands on the command line was read before.
    from openset.preprocessing import UnreadableImage
    from training.data import load_protocol
    from training.durable import replacing
    from training.runs import write_atomically

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    protocol = arguments.protocol
    options: dict[str, Any] = {"on_unreadable": "skip", "allow_missing_classes": True}
    if arguments.image_size is not None:
        options["image_size"] = arguments.image_size
    sources: list[dict[str, Any]] = [{}]
    if protocol == "toy":
        sources = [{"digits": one} for one in DIGITS if arguments.digits in (None, one)]
    probes = []
    try:
        if arguments.per_class < 1:
            raise ValueError(f"per-class must be at least 1, got {arguments.per_class}")
        for source in sources:
            loaded = load_protocol(
                protocol, data=arguments.data, parts=("train", "test"), **options, **source
            )
            title = f"{source['digits'].upper()}'s digits" if source else protocol
            probes.append(
                probe(loaded, title=title, per_class=arguments.per_class, workers=arguments.workers)
            )
            for note in (f"histograms of {len(probes[-1].labels)} test images", *loaded.notes):
                logger.info("%s: %s", title, note)
    except (FileNotFoundError, UnreadableImage, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    rows = [row for one in probes for row in one.rows()]
    print_rows(rows)
    target = arguments.json or RUNS / "shortcut" / f"{protocol}.json"
    picture = arguments.figure or RUNS / "shortcut" / f"{protocol}.png"
    for file in (target, picture):
        file.parent.mkdir(parents=True, exist_ok=True)
    settings = {"protocol": protocol, "bins": BINS, "per_class": arguments.per_class, "rule": _RULE}
    write_atomically(target, json.dumps(settings | {"rows": rows}, indent=2) + "\n")
    with replacing(picture) as partial:
        draw(probes).savefig(partial, dpi=150, format="png")
    logger.info("written: %s, %s", target, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
