"""The figures of a trained cell: its test, its validation part, and a test with digits of the other source."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.engine import TrainingDiverged
from training.evaluation import SCORES_FILE, results_folder, score_test, write_report
from training.fingerprints import require_former_validation
from training.grid.rows import PUBLISHED_SCORE, SCORES_DIGESTS, scores_digest
from training.losses import LOSSES
from training.report import build_report
from training.runs import Run
from training.score_fitting import need_fitting, scoring_classifier
from training.scoring import Scored, score_split

logger = logging.getLogger(__name__)

_VALIDATION_SCORES = "validation.npz"
_REPEATS = 100
# Of a report, what rows are made from.
_FIGURES = ("rule", "accuracy", "scores")
_TEST_FIGURES = (*_FIGURES, "counts", "notes")


def evaluate_cell(run: Run, device: str, show_progress: bool) -> dict[str, Any]:
    """Score test and validation part and write the test's report.

    Returns:
        ``test``, the figures of that report, which a later evaluation of the run writes over; ``validation``, those that a
        choice between losses and scores may look at; ``published_score``, those of the test with float32 probabilities, None
        for a background class, which the published code does not have; ``other_digits``, the report of a test with the
        digits of the other source, None where there are none; and ``scores_sha256``, digests of the files of test scores.

    Raises:
        TrainingDiverged: a score is not finite.
        ValueError: the validation part is no longer the one that the run was trained beside.
    """
    data = run.protocol_data(("validation",))
    require_former_validation(run, data)  # before anything of a former evaluation is written over
    scored = score_test(run, device=device, show_progress=show_progress)
    _check_finite(scored, "test")
    report = write_report(run)
    rule = report["rule"]
    names = list(scored.scores)
    if need_fitting(names):
        data = replace(data, train=run.protocol_data(("train",)).train)
    validation = score_split(
        scoring_classifier(run, data, names, device=device, show_progress=show_progress),
        data.validation,
        data.preprocessing,
        workers=run.config.workers,
        description="validation",
        show_progress=show_progress,
    )
    _check_finite(validation, "validation")
    validation.save(run.folder / _VALIDATION_SCORES)
    has_background = LOSSES[run.config.loss].background
    other_digits = _with_other_digits(run, device, show_progress)
    files = [run.folder / SCORES_FILE]
    if other_digits is not None:
        files.append(results_folder(run, run.config.other_digits) / SCORES_FILE)
    return {
        "test": {key: report[key] for key in _TEST_FIGURES},
        "validation": _figures(validation, rule),
        "published_score": None
        if has_background
        else _figures(
            replace(scored, scores={PUBLISHED_SCORE: float32_probabilities(scored)}), rule
        ),
        "other_digits": other_digits,
        SCORES_DIGESTS: {str(file.relative_to(run.folder)): scores_digest(file) for file in files},
    }


def _with_other_digits(run: Run, device: str, show_progress: bool) -> dict[str, Any] | None:
    """The report of a test with digits that the model was not trained with; None where there are none.

    What a model learned of its own digits' style is not in those.
    """
    other = run.config.other_digits
    if other is None:
        return None
    try:
        _check_finite(
            score_test(run, device=device, digits=other, show_progress=show_progress), "test"
        )
        return write_report(run, digits=other)
    except (OSError, ValueError, TrainingDiverged) as error:
        # Nothing that the cell itself needs.
        logger.warning("%s: not tested with %s's digits: %s", run.folder, other.upper(), error)
        return None


def float32_probabilities(scored: Scored) -> NDArray[np.float32]:
    """The largest softmax probability as the published code thresholds it, in float32, (N,)."""
    probabilities: NDArray[np.float32] = (
        torch.from_numpy(scored.logits).softmax(dim=1).amax(dim=1).numpy()
    )
    return probabilities


def _figures(scored: Scored, rule: str) -> dict[str, Any]:
    report = build_report(
        scored, config={}, notes=[], counts={}, factory=None, rule=rule, repeats=_REPEATS
    )
    return {key: report[key] for key in _FIGURES}


def _check_finite(scored: Scored, part: str) -> None:
    broken = [name for name, values in scored.scores.items() if not np.isfinite(values).all()]
    if broken:
        raise TrainingDiverged(
            f"the {part} part has {', '.join(broken)} scores that are not finite"
        )
