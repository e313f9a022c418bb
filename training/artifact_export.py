"""Export a run as an artifact with a certified factory threshold.

The validation data are split three ways, stratified by class: a fifth chooses the score type (a half with
``--which best``: the half that also chose the checkpoint), a further slice is kept out for checking the promise, the
rest calibrates. What selects or checks never calibrates.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openset import metrics
from openset.artifact import CALIBRATION, load_artifact, save_artifact, write_card
from openset.calibration import (
    DEFAULT_CONFIDENCE,
    DEFAULT_FPR,
    NotCertifiable,
    OperatingPoint,
    ScoreSet,
    load_score_sets,
    operating_point,
    save_score_sets,
    smallest_attainable_fpr,
)
from openset.decision import accept
from openset.labels import NEGATIVE, is_known, is_negative
from openset.model_card import DEFAULT_SCORES
from openset.scores import DEFAULT_SCORE
from training.artifact_folder import locked, recover, replace_artifact
from training.data import split_validation
from training.fingerprints import require_former_validation
from training.runs import Run
from training.score_fitting import need_fitting, scoring_classifier
from training.scoring import Scored, left_out, require_device, score_split
from training.worth import doubt

logger = logging.getLogger(__name__)

VERIFICATION = "verification.npz"


def choose_score(scored: Scored, fpr: float) -> tuple[str, dict[str, float | None]]:
    """The score type with the larger CCR at the target FPR on the selection part; the default where they tie.

    A selection part without knowns or without negatives, of small data, tells nothing: then all tie.
    """
    found: dict[str, float | None] = dict.fromkeys(scored.scores)
    can_tell = is_known(scored.labels).any() and is_negative(scored.labels).any()
    for name, scores in scored.scores.items() if can_tell else ():
        curve = metrics.oscr_curve(scores, scored.predictions, scored.labels, against=NEGATIVE)
        found[name] = metrics.ccr_at_fpr(curve, max_fpr=fpr)
    order = sorted(found, key=lambda name: name != DEFAULT_SCORE)
    return max(
        order, key=lambda name: -1.0 if found[name] is None else float(found[name] or 0.0)
    ), found


def export(
    run: Run,
    *,
    fpr: float = DEFAULT_FPR,
    confidence: float = DEFAULT_CONFIDENCE,
    which: str = "last",
    name: str | None = None,
    scores: Sequence[str] | None = None,
    verify_share: float = 0.2,
    device: str = "cpu",
    precision: str = "float32",
    show_progress: bool = True,
) -> OperatingPoint:
    """Write the artifact and return its factory operating point; an earlier artifact stays until the new one is whole.

    ``scores`` are what it can be thresholded by (default: the run's, or softmax and logit); those with a state are fitted
    on training data, and the selection part alone chooses which is the default.

    Raises:
        NotCertifiable: too few validation negatives for the target.
        ValueError: no such device here, no negatives, a share or target out of range, or the validation part is no longer the
            one that the run was trained beside.
    """
    require_device(device)
    recover(run.artifact)
    if not 0 <= verify_share < 1:
        raise ValueError(f"verify_share must lie in [0, 1), got {verify_share!r}")
    names = list(scores or run.config.scores or DEFAULT_SCORES)
    data = run.protocol_data(("train", "validation") if need_fitting(names) else ("validation",))
    require_former_validation(run, data, which=which)
    # Known before any score: how many negatives will calibrate. Nobody should wait minutes for a refusal.
    planned = split_validation(
        data.validation.groups, verify_share=verify_share, best=which == "best"
    )
    negatives = int(is_negative(data.validation.labels[planned.calibration]).sum())
    if not negatives:
        raise ValueError(
            f"there are no held-out negatives to set a threshold with; put foreign images into {run.config.data}/negative/ "
            f"(protocol folders) and export again, a run of {run.config.loss} as it is"
        )
    if fpr < smallest_attainable_fpr(negatives, confidence=confidence):
        raise NotCertifiable(n=negatives, fpr=fpr, confidence=confidence)
    # Before the model is read: should training go on meanwhile, the artifact counts as older, never as newer.
    checkpoint_sha256 = run.checkpoint_digest(which)
    fitted_model = scoring_classifier(
        run, data, names, which=which, device=device, precision=precision, show_progress=show_progress
    )  # fmt: skip
    card = run.model_card(data, fitted_model.head, which=which, name=name, scores=names)
    # Scores come from the artifact itself, loaded as the handler loads it.
    staging = run.folder / "artifact.partial"
    shutil.rmtree(staging, ignore_errors=True)
    save_artifact(
        staging,
        network=fitted_model.network,
        head=fitted_model.head,
        card=card,
        fitted=fitted_model.fitted,
    )
    classifier = load_artifact(staging, device=device, precision=precision)
    scored = score_split(
        classifier, data.validation, data.preprocessing,
        workers=run.config.workers, description="validation", show_progress=show_progress,
    )  # fmt: skip
    for note in (*run.unfinished(), *left_out(data.validation, scored)):
        logger.warning("%s", note)
    parts = planned.within(scored.sample_ids, data.validation.sample_ids)
    score_type, found = choose_score(scored.subset(parts.selection), fpr)
    calibration = scored.subset(parts.calibration).score_set(classifier.path.key)
    point = operating_point(calibration, score_type=score_type, fpr=fpr, confidence=confidence)
    facts = {
        **card.training,
        "notes": [*card.training["notes"], *left_out(data.validation, scored)],
        "run": run.folder.resolve().name,
        "checkpoint": which,
        "checkpoint_sha256": checkpoint_sha256,
        "score_selection": {"fpr": fpr, "ccr": found, "samples": len(parts.selection)},
        "calibration_samples": len(parts.calibration),
    }
    write_card(
        staging,
        card.with_changes(default_score=score_type, factory=point.to_dict(), training=facts),
    )
    with locked(run.artifact):  # what a calibration adds meanwhile is not lost
        kept = _other_paths(run.artifact, calibration)
        save_score_sets(staging / CALIBRATION, [calibration, *kept])
        replace_artifact(staging, run.artifact)
    verification = scored.subset(parts.verification)
    verification.save(run.folder / VERIFICATION)
    _tell(point, verification)
    auroc = metrics.auroc(calibration.of_type(score_type), calibration.labels, against=NEGATIVE)
    shown_by = f"make evaluate RUN={run.folder}"
    worthless = doubt(run.folder, auroc=auroc, ccr=point.expected_ccr, shown_by=shown_by)
    if worthless is not None:
        logger.warning("warning: %s", worthless)
    return point


def _other_paths(artifact: Path, calibration: ScoreSet) -> list[ScoreSet]:
    """Score sets of other paths in the artifact to be replaced: kept if model, samples and scores are the same."""
    if not (artifact / CALIBRATION).is_file():
        return []
    others = load_score_sets(artifact / CALIBRATION)
    digest = calibration.path.rpartition("-")[2]
    kept = [
        score_set
        for path, score_set in others.items()
        if path != calibration.path
        and path.rpartition("-")[2] == digest
        and np.array_equal(score_set.sample_ids, calibration.sample_ids)
        and score_set.scores.keys() == calibration.scores.keys()
    ]
    for path in others.keys() - {calibration.path} - {score_set.path for score_set in kept}:
        logger.warning(
            "the scores of path %s are of another model, other samples or other score types and are dropped; "
            "add them again with python -m training.calibrate",
            path,
        )
    return kept


def _tell(point: OperatingPoint, verification: Scored) -> None:
    logger.info(
        "factory threshold: tau %.5f (%s); FPR <= %g with confidence %g: k = %d of n = %d negatives, bound %.5f, "
        "expected CCR %s",
        point.tau, point.score_type, point.fpr, point.confidence, point.k, point.n, point.fpr_upper_bound,
        "-" if point.expected_ccr is None else f"{point.expected_ccr:.4f}",
    )  # fmt: skip
    held_out = verification.scores[point.score_type][verification.labels == NEGATIVE]
    if len(held_out):
        accepted = int(accept(held_out, np.float32(point.tau)).sum())
        low, high = metrics.clopper_pearson(accepted, len(held_out))
        logger.info(
            "on %d further held-out negatives: FPR %.5f [%.5f, %.5f]",
            len(held_out), accepted / len(held_out), low, high,
        )  # fmt: skip
    logger.info(
        "the promise is for new images of the same negatives' classes; it does not cover new kinds of foreign images"
    )
