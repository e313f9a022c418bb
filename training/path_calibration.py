"""Add the calibration scores of one more serving path.

A threshold belongs to the computation that made its scores. The same samples are scored by the same artifact on another
device or in another precision, and stored beside the others.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openset.artifact import CALIBRATION, BrokenArtifact, load_artifact, weights_digest
from openset.calibration import ScoreSet, load_score_sets, save_score_sets
from training.artifact_folder import locked, recover
from training.fingerprints import require_former_validation
from training.runs import Run, require_same_classes
from training.scoring import left_out, require_device, score_split

logger = logging.getLogger(__name__)


def calibrate(run: Run, *, device: str, precision: str, compiled: bool = False) -> str:
    """Score the artifact's calibration samples on another path and return its key.

    Raises:
        BrokenArtifact: the run has not been exported.
        ValueError: no such device here, the data no longer hold the calibration samples, the same classes or the run's
            validation part, or the artifact was exported anew while it was scored.
    """
    recover(run.artifact)
    classifier = load_artifact(
        run.artifact, device=require_device(device), precision=precision, compiled=compiled
    )
    weights = weights_digest(run.artifact)
    score_sets = load_score_sets(run.artifact / CALIBRATION)
    if not score_sets:
        raise BrokenArtifact(f"{run.artifact} holds no calibration scores; export the run again")
    wanted = next(iter(score_sets.values())).sample_ids
    data = run.protocol_data(("validation",))
    require_same_classes(classifier.card.class_ids, data, what=run.artifact)
    require_former_validation(run, data, which=classifier.card.training.get("checkpoint", "last"))
    position = {sample: index for index, sample in enumerate(data.validation.sample_ids)}
    if missing := [sample for sample in wanted if sample not in position]:
        raise ValueError(
            f"{len(missing)} calibration samples are not in the data any more, e.g. {missing[0]}; export the run again"
        )
    split = data.validation.subset(np.array([position[sample] for sample in wanted]))
    scored = score_split(
        classifier, split, data.preprocessing, workers=run.config.workers, description="calibration"
    )
    for note in left_out(split, scored):
        logger.warning("%s", note)
    own = scored.score_set(classifier.path.key)
    _add(run.artifact, own, weights=weights, wanted=wanted)
    return own.path


def _add(artifact: Path, own: ScoreSet, *, weights: str, wanted: NDArray[np.str_]) -> None:
    """Put a score set beside those that are there now; others may have come while it was scored."""
    with locked(artifact):
        present = load_score_sets(artifact / CALIBRATION)
        first = next(iter(present.values()))
        if (
            weights_digest(artifact) != weights
            or not np.array_equal(first.sample_ids, wanted)
            or first.scores.keys() != own.scores.keys()
        ):
            raise ValueError(
                f"{artifact} was exported anew while it was scored; its scores are left as they are. Calibrate again"
            )
        others = [score_set for key, score_set in present.items() if key != own.path]
        save_score_sets(artifact / CALIBRATION, [*others, own])
