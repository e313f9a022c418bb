"""Fits the scores that have a state, on known training samples, and finds them again in a run's artifact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from openset.artifact import BrokenArtifact, load_artifact
from openset.classifier import OpenSetClassifier
from openset.fitted_scores import FITTED_SCORES
from openset.labels import is_known
from training.data import ProtocolData
from training.runs import Run
from training.scoring import score_split

# Class statistics settle long before this many; a pass over all of ImageNet would teach them nothing more.
SAMPLES_PER_CLASS = 500
_SEED = 20233


def need_fitting(names: Sequence[str]) -> list[str]:
    """Those of the scores that have a state."""
    return [name for name in names if name in FITTED_SCORES]


def fit_scores(
    names: Sequence[str],
    classifier: OpenSetClassifier,
    data: ProtocolData,
    *,
    workers: int = 0,
    show_progress: bool = True,
) -> dict[str, nn.Module]:
    """Fit what has a state among the scores; at most ``SAMPLES_PER_CLASS`` training images of each known class.

    Args:
        names: of scores; those without a state need nothing.
        classifier: the model, on the path that the state is meant for.
        data: with the training part.
        workers: data loading processes.
        show_progress: draw a bar.

    Raises:
        ValueError: too few training samples.
    """
    wanted = need_fitting(names)
    if not wanted:
        return {}
    random = np.random.default_rng(_SEED)
    labels = data.train.labels
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:SAMPLES_PER_CLASS]
        for label in np.unique(labels[is_known(labels)])
    ]
    if not chosen:
        raise ValueError(
            f"the score {', '.join(wanted)} needs known training samples, there are none"
        )
    scored = score_split(
        classifier,
        data.train.subset(np.sort(np.concatenate(chosen))),
        data.preprocessing,
        workers=workers,
        description="fitting scores",
        show_progress=show_progress,
    )
    features, predictions, classes = map(
        torch.from_numpy, [scored.features, scored.predictions, scored.labels]
    )
    return {
        name: FITTED_SCORES[name].fit(features, predictions, classes, len(data.class_ids))
        for name in wanted
    }


def scores_in_artifact(run: Run, which: str) -> dict[str, nn.Module]:
    """The fitted scores of the run's artifact; none where there is no artifact or it holds another model."""
    try:
        exported = load_artifact(run.artifact)
    except BrokenArtifact:
        return {}
    network, head = run.load_model(which)
    if exported.head.scale != head.scale:
        return {}
    for ours, theirs in ((network, exported.network), (head, exported.head)):
        stored = theirs.state_dict()
        for name, value in ours.state_dict().items():
            if name not in stored or not torch.equal(value, stored[name]):
                return {}
    return exported.fitted


def scoring_classifier(
    run: Run,
    data: ProtocolData,
    names: Sequence[str],
    *,
    fitted: dict[str, nn.Module] | None = None,
    which: str = "last",
    device: str = "cpu",
    precision: str = "float32",
    show_progress: bool = True,
) -> OpenSetClassifier:
    """The run's model with these scores; what has a state and is not among ``fitted`` is fitted on the training part."""
    ready = dict(fitted or {})
    if missing := [name for name in need_fitting(names) if name not in ready]:
        plain = run.classifier(data, which=which, device=device, precision=precision)
        ready |= fit_scores(
            missing, plain, data, workers=run.config.workers, show_progress=show_progress
        )
    return run.classifier(
        data, which=which, device=device, precision=precision, scores=names, fitted=ready
    )
