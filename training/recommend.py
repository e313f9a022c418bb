"""Choose the recommended loss, options, preset and score of a protocol: ``python -m training.recommend --protocol glyphs``.

Nothing of the test is read. Every second negative class is hidden from training and stands in for the unknown classes: a
candidate is judged by how it tells known images of the validation's selection part from *training* images of the hidden
classes, which it has not seen. So neither unknown classes nor the images that will calibrate the recommended model take
part in its choice. The model itself is then trained with all negatives.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from openset.fitted_scores import ALL_SCORES
from openset.labels import NEGATIVE, UNKNOWN, is_known
from training.arm_differences import REPLICATES
from training.arms import Arm, candidates, on_request
from training.choices import RUNS
from training.comparisons import require_common, with_epochs_in_name
from training.cures import (
    common_options,
    open_set_figures,
    print_wide,
    rows_of_arms,
    shared_parser,
)
from training.data import (
    SCORE_SELECTION_SHARE,
    ProtocolData,
    Split,
    at_most,
    split_validation,
)
from training.decoded import CachedImages
from training.files import ImageFiles
from training.intervals import (
    Floats,
    Interval,
    ModelScores,
    bootstrap_by_class,
    percentile_interval,
    seed_interval,
    widened,
)
from training.runs import TrainConfig, make_config, write_atomically
from training.score_fitting import scoring_classifier
from training.scoring import Scored, score_split
from training.train import train

logger = logging.getLogger(__name__)

# A candidate's figure is the mean CCR at these false-positive rates.
CRITERION = (1e-2, 1e-1)


def hide_negatives(data: ProtocolData) -> tuple[ProtocolData, Split]:
    """Every second negative class, in order of the names, taken out of training and validation.

    Returns:
        The data without them, and the judges: known images of the validation's selection part (labels as they are) and
        the hidden classes' training images (label UNKNOWN: to the candidate they are).

    Raises:
        ValueError: fewer than two negative classes, or no known image in the selection part.
    """
    train, validation = data.train, data.validation
    negatives = np.unique(train.groups[train.labels == NEGATIVE])
    if len(negatives) < 2:
        raise ValueError(
            f"hiding negative classes needs at least 2 of them in training, got {len(negatives)}"
        )
    hidden = negatives[1::2]
    parts = split_validation(validation.groups, verify_share=0.0, best=False)
    selection = validation.subset(parts.selection)
    knowns = selection.subset(np.flatnonzero(is_known(selection.labels)))
    if not len(knowns):
        # The share of each class is rounded to whole images.
        least = math.floor(0.5 / SCORE_SELECTION_SHARE) + 1
        raise ValueError(
            f"candidates are judged by known images of the validation part, {SCORE_SELECTION_SHARE:.0%} of each class, and no "
            f"known class has the {least} validation images that give one; add images (protocol folders: a fifth of "
            "a class validates)"
        )
    foreign = train.subset(np.flatnonzero(np.isin(train.groups, hidden)))
    train, validation = (
        split.subset(np.flatnonzero(~np.isin(split.groups, hidden)))
        for split in (train, validation)
    )
    return replace(data, train=train, validation=validation), _joined(knowns, foreign)


def _joined(knowns: Split, foreign: Split) -> Split:
    images: torch.Tensor | CachedImages | ImageFiles
    first, second = knowns.images, foreign.images
    if isinstance(first, ImageFiles):
        assert isinstance(second, ImageFiles)
        images = replace(first, paths=[*first.paths, *second.paths])
    elif isinstance(first, CachedImages):
        # Rows of one and the same cache.
        assert isinstance(second, CachedImages)
        assert first.decoded is second.decoded
        images = replace(first, rows=np.concatenate([first.rows, second.rows]))
    else:
        assert isinstance(second, torch.Tensor)
        images = torch.cat([first, second])
    return Split(
        images,
        np.concatenate([knowns.labels, np.full(len(foreign), UNKNOWN)]),
        np.concatenate([knowns.groups, foreign.groups]),
        np.concatenate([knowns.sample_ids, foreign.sample_ids]),
    )


def judge(
    arms: Sequence[Arm],
    *,
    protocol: str,
    epochs: int | None,
    seeds: Sequence[int],
    data: Path | None,
    options: dict[str, Any],
    runs: Path,
    device: str = "auto",
    per_class: int | None = None,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every candidate without the hidden classes and judge it; one row each.

    ``per_class`` training images of every class stand for all of them, where there is no time for more;
    ``show_progress`` draws bars.

    Raises:
        ValueError: a candidate cannot be trained, or the data leave nothing to hide or to judge with; both before the first
            training.
    """

    def configure(arm: Arm, seed: int) -> TrainConfig:
        config = make_config(
            protocol, arm.loss, preset=arm.preset, seed=seed, epochs=epochs, data=data, device=device,
            options={**options, **arm.options},
        )  # fmt: skip
        hidden = "-hidden" if per_class is None else f"-hidden-n{per_class}"
        return with_epochs_in_name(config, runs, hidden)

    def figures_of(config: TrainConfig) -> dict[str, Any]:
        data_of_all = config.load_data(("train", "validation"), decoded=True)
        shown, judges = hide_negatives(
            replace(data_of_all, train=at_most(data_of_all.train, per_class))
        )
        run = train(
            config,
            runs=runs,
            show_progress=show_progress,
            data=shown,
            calibration=data_of_all.validation,
        )
        classifier = scoring_classifier(
            run, shown, ALL_SCORES, device=config.device, show_progress=show_progress
        )
        scored = score_split(
            classifier,
            judges,
            shown.preprocessing,
            workers=config.workers,
            show_progress=show_progress,
        )
        figures = open_set_figures(scored)
        return {
            "accuracy": figures["accuracy"],
            "ccr_at_fpr": {
                name: groups["unknown"] for name, groups in figures["ccr_at_fpr"].items()
            },
            "count": {"known": figures["count"]["known"], "hidden": figures["count"]["unknown"]},
            "classes": min(
                len(np.unique(judges.groups[mask]))
                for mask in (judges.labels == UNKNOWN, is_known(judges.labels))
            ),
            REPLICATES: criterion_replicates(scored),
        }

    # Before any file is decoded for a candidate that is refused.
    listed = configure(arms[0], seeds[0]).load_data(("train", "validation"))
    hide_negatives(listed)
    return rows_of_arms(
        arms, seeds, configure, figures_of, num_classes=len(listed.class_ids), runs=runs
    )


def criterion_replicates(scored: Scored) -> dict[str, Floats]:
    """Class-clustered bootstrap replicates of each score's figure, (repeats,); the same classes for all candidates."""
    sample = ModelScores(scored.scores, scored.predictions, scored.labels, scored.groups)
    found = {}
    for name in scored.scores:
        columns = bootstrap_by_class(
            sample, score=name, against=UNKNOWN, targets=CRITERION, rule="inclusive"
        )
        parts = [np.nan_to_num(columns[f"{target:g}"]) for target in CRITERION]
        found[name] = np.mean(parts, axis=0)
    return found


def figure_of_merit(ccr_at_fpr: dict[str, float | None]) -> float:
    """Mean CCR over the criterion's rates, for ranking only: a rate that is not reached counts as 0."""
    values = [ccr_at_fpr[f"{target:g}"] for target in CRITERION]
    return sum(0.0 if value is None else value for value in values) / len(values)


Key = tuple[str, str]  # candidate, score


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The simplest candidate within one standard error of the best, with the simplest of its scores within one of its best.

    This is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984). A candidate's figure is
    that of its best score, mean over the seeds. The standard error is that of the paired difference, over seeds (from two
    on) or over classes, whichever is larger; where there is neither, the best is taken. Of candidates the one with fewer
    options is simpler, then the earlier; of scores the earlier in ``ALL_SCORES``. All that lie within it are named, the
    simplest first: what else would do. The choice is provisional with a single seed or candidate, and where an interval of
    the difference between the best two candidates includes 0.

    Raises:
        ValueError: every candidate diverged with some seed.
    """
    figures: dict[Key, list[float]] = {}
    arms: dict[str, dict[str, Any]] = {}
    for row in rows:
        arms.setdefault(row["arm"], row)
        for score in ALL_SCORES:
            # A candidate that diverges with one seed is no recommendation.
            value = -np.inf if "diverged" in row else figure_of_merit(row["ccr_at_fpr"][score])
            figures.setdefault((row["arm"], score), []).append(float(value))
    means = {key: float(np.mean(values)) for key, values in figures.items()}
    order = {name: number for number, name in enumerate(arms)}

    def by_mean(keys: Iterable[Key]) -> list[Key]:
        return sorted(keys, key=lambda key: (-means[key], *simplicity(key)))

    def simplicity(key: Key) -> tuple[int, int, int]:
        return len(arms[key[0]]["options"]), order[key[0]], ALL_SCORES.index(key[1])

    def as_good(keys: list[Key]) -> list[Key]:
        first = keys[0]
        good = [
            key
            for key in keys
            if means[first] - means[key] <= _standard_error(rows, figures, first, key)
        ]
        return sorted(good, key=simplicity)

    best_of = [by_mean((arm, score) for score in ALL_SCORES)[0] for arm in arms]
    ranked = by_mean(key for key in best_of if np.isfinite(means[key]))
    if not ranked:
        raise ValueError("every candidate diverged with some seed; there is nothing to recommend")
    within = {
        arm: [score for _, score in as_good(by_mean((arm, score) for score in ALL_SCORES))]
        for arm, _ in as_good(ranked)
    }
    name = next(iter(within))
    best = (name, within[name][0])
    compared = _comparison(rows, figures, *ranked[:2]) if len(ranked) > 1 else None
    reasons = []
    if len({row["seed"] for row in rows}) < 2:
        reasons.append("one seed")
    if compared is None:
        reasons.append("a single candidate")
    elif not compared["separable"]:
        reasons.append("the best two candidates cannot be told apart")
    return {
        "loss": arms[name]["loss"],
        "options": arms[name]["options"],
        "preset": arms[name]["preset"],
        "score": best[1],
        "mean_ccr": means[best],
        "provisional": bool(reasons),
        "why_provisional": reasons,
        "best_two": compared,
        "within_one_standard_error": within,
    }


def _comparison(
    rows: Sequence[dict[str, Any]], figures: dict[Key, list[float]], first: Key, second: Key
) -> dict[str, Any]:
    """What is known of the difference between two candidates, each with its best score."""
    differences = [a - b for a, b in zip(figures[first], figures[second], strict=True)]
    mean = float(np.mean(differences))
    over_seeds = seed_interval(differences)
    over_classes = _over_classes(rows, first, second, mean)
    intervals = [found for found in (over_seeds, over_classes) if found is not None]
    return {
        "first": list(first), "second": list(second), "difference": mean,
        "standard_error": _standard_error(rows, figures, first, second),
        "over_seeds": over_seeds, "over_classes": over_classes,
        "separable": bool(intervals) and all(low > 0 for low, _ in intervals),
    }  # fmt: skip


def _standard_error(
    rows: Sequence[dict[str, Any]], figures: dict[Key, list[float]], first: Key, second: Key
) -> float:
    """Of the paired difference: over seeds or over classes, the larger; 0 where neither is known."""
    found = [0.0]
    if len(figures[first]) > 1:
        differences = np.subtract(figures[first], figures[second])
        found.append(float(np.std(differences, ddof=1)) / math.sqrt(len(differences)))
    if (replicates := _replicates_of_difference(rows, first, second)) is not None:
        count = _class_count(rows)
        # A bootstrap over G classes has a variance that is too small by (G - 1) / G.
        few = math.sqrt(count / (count - 1)) if count > 1 else math.inf
        found.append(few * float(np.std(replicates)))
    return max(found)


def _over_classes(
    rows: Sequence[dict[str, Any]], first: Key, second: Key, difference: float
) -> Interval | None:
    """Class-clustered interval of the paired difference, mean over seeds; None without replicates."""
    replicates = _replicates_of_difference(rows, first, second)
    interval = None if replicates is None else percentile_interval(replicates)
    return None if interval is None else widened(interval, difference, _class_count(rows))


def _replicates_of_difference(
    rows: Sequence[dict[str, Any]], first: Key, second: Key
) -> Floats | None:
    parts = []
    for arm, score in (first, second):
        stored = [row[REPLICATES][score] for row in rows if row["arm"] == arm and REPLICATES in row]
        if not stored:
            return None
        parts.append(np.mean(stored, axis=0))
    difference: Floats = parts[0] - parts[1]
    return difference


def _class_count(rows: Sequence[dict[str, Any]]) -> int:
    return int(min(row["classes"] for row in rows if "classes" in row))


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Mean CCR of each candidate by score."""
    table = Table(title=title)
    for heading in ("candidate", "seed"):
        table.add_column(heading)
    for heading in ALL_SCORES:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = (
            ["diverged"] * len(ALL_SCORES)
            if "diverged" in row
            else [f"{figure_of_merit(row['ccr_at_fpr'][score]):.4f}" for score in ALL_SCORES]
        )
        table.add_row(row["arm"], str(row["seed"]), *cells)
    print_wide(table)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = shared_parser("python -m training.recommend", __doc__)
    parser.add_argument("--runs", type=Path, default=RUNS / "recommend")
    by_default = "; ".join(arm.name for arm in candidates("toy"))
    others = [arm.name for arm in on_request("toy")]
    parser.add_argument(
        "--candidates",
        nargs="+",
        metavar="NAME",
        choices=[*(arm.name for arm in candidates("toy")), *others],
        help=f"default: all that the protocol has, of: {by_default}. On request, without negatives: {'; '.join(others)}",
    )
    return parser


def _chosen_arms(protocol: str, names: list[str] | None) -> list[Arm]:
    arms = candidates(protocol)
    if names is None:
        return arms
    arms += on_request(protocol)
    if unknown := set(names) - {arm.name for arm in arms}:
        raise ValueError(f"{protocol} has no candidate {'; '.join(sorted(unknown))}")
    return [arm for arm in arms if arm.name in names]


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in (__name__, rows_of_arms.__module__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        arms = _chosen_arms(arguments.protocol, arguments.candidates)
        require_common(common_options(arguments), arms)
        rows = judge(
            arms,
            protocol=arguments.protocol,
            epochs=arguments.epochs,
            seeds=arguments.seeds,
            data=arguments.data,
            options=common_options(arguments),
            runs=arguments.runs,
            device=arguments.device,
            per_class=arguments.per_class,
        )
        chosen = choose(rows)
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues where it stopped")
        return 130
    rates = " and ".join(f"{target:g}" for target in CRITERION)
    title = (
        f"{arguments.protocol}: mean CCR at FPR {rates} on negative classes hidden from training"
    )
    target = arguments.json or arguments.runs / f"{arguments.protocol}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "protocol": arguments.protocol, **common_options(arguments), "per_class": arguments.per_class,
        "criterion": list(CRITERION), "chosen": chosen,
        "rows": [{key: value for key, value in row.items() if key != REPLICATES} for row in rows],
    }  # fmt: skip
    write_atomically(target, json.dumps(content, indent=2) + "\n")
    print_table(rows, title)
    for arm, scores in chosen["within_one_standard_error"].items():
        logger.info("within one standard error of the best: %s (%s)", arm, ", ".join(scores))
    reasons = " and ".join(chosen["why_provisional"])
    logger.info(
        "recommended%s: %s; written: %s", f", provisionally ({reasons})" if reasons else "", chosen, target
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
