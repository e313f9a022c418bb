"""Evaluate a run on its test part."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from openset.artifact import WEIGHTS, BrokenArtifact, read_card
from openset.model_card import DEFAULT_SCORES
from training import figures
from training.contact_sheet import write_contact_sheet
from training.data import ProtocolData
from training.fingerprints import require_former_validation
from training.protocols import FOLDERS
from training.report import build_report
from training.runs import Run, write_atomically
from training.score_fitting import (
    need_fitting,
    scores_in_artifact,
    scoring_classifier,
)
from training.scoring import Scored, left_out, require_device, score_split

logger = logging.getLogger(__name__)

REPORT = "report.json"
SCORES_FILE = "scores.npz"


def evaluate(run: Run, **options: Any) -> dict[str, Any]:
    """Score the test part, write ``scores.npz``, ``report.json`` and the figures, and return the report.

    The options are those of ``score_test``.
    """
    score_test(run, **options)
    return write_report(run, digits=options.get("digits"))


def results_folder(run: Run, digits: str | None = None) -> Path:
    """Where an evaluation's files lie: in the run; those of a test with the other source's digits in ``on-<it>-digits``.

    Raises:
        ValueError: the run's protocol has no choice of digits.
    """
    if digits is None:
        return run.folder
    if run.config.digits is None:
        raise ValueError(
            f"protocol {run.config.protocol} has no choice of digits, got {digits!r}; leave it out"
        )
    return run.folder if digits == run.config.digits else run.folder / f"on-{digits}-digits"


def score_test(
    run: Run,
    *,
    which: str = "last",
    device: str = "cpu",
    precision: str = "float32",
    rule: str | None = None,
    scores: Sequence[str] | None = None,
    digits: str | None = None,
    show_progress: bool = True,
) -> Scored:
    """Score the test part; write ``scores.npz``, all that ``write_report`` needs, and the contact sheet.

    Args:
        run: a trained run.
        which: "last" (default) or "best" checkpoint.
        device: to compute on.
        precision: of the backbone.
        rule: of CCR@FPR; default "inclusive", for runs as published "strict".
        scores: which to judge; default softmax and logit and those of the artifact and of the run. The state of a score
            is the artifact's where that holds this model, else it is fitted on training data.
        digits: source of the test's known digits, for a run of toy; default the run's own. The foreign letters, and with
            them the thresholds, are the same, so that a model that judges by shape keeps either source's digits.
        show_progress: draw a bar.

    Raises:
        ValueError: no such device here, other known classes than the run's, or digits where there is no choice.
    """
    require_device(device)
    folder = results_folder(run, digits)
    # Own classes alone have a test from the files that train and validate: where these are others now, so may it be.
    changed = (
        require_former_validation(run, run.protocol_data(("validation",)), which=which)
        if run.config.protocol == FOLDERS
        else []
    )
    expected = [*DEFAULT_SCORES, *_scores_of_artifact(run), *(run.config.scores or [])]
    names = list(scores or dict.fromkeys(expected))
    fitted = scores_in_artifact(run, which) if need_fitting(names) else {}
    complete = set(need_fitting(names)) <= fitted.keys()
    parts = ("test",) if complete else ("train", "test")
    is_own = digits is None or folder == run.folder
    data = run.protocol_data(parts) if is_own else _with_digits(run, str(digits), parts)
    classifier = scoring_classifier(
        run, data, names, fitted=fitted, which=which, device=device, precision=precision, show_progress=show_progress
    )  # fmt: skip
    scored = score_split(
        classifier,
        data.test,
        data.preprocessing,
        workers=run.config.workers,
        description="test",
        show_progress=show_progress,
    )
    folder.mkdir(exist_ok=True)
    scored.save(folder / SCORES_FILE)
    context = {
        "which": which,
        "device": device,
        "precision": precision,
        "rule": rule or ("strict" if run.config.as_published else "inclusive"),
        "notes": [
            *data.notes,
            *changed,
            *run.pretraining_notes(which),
            *run.unfinished(),
            *left_out(data.test, scored),
        ],
        "counts": data.counts,
    }
    write_atomically(folder / "evaluation.json", json.dumps(context, indent=2) + "\n")
    write_contact_sheet(scored, data, folder / "figures", title=_title(run, folder))
    return scored


def _with_digits(run: Run, digits: str, parts: Sequence[str]) -> ProtocolData:
    """The test part with the digits of another source; what fits scores stays the run's own."""
    tested = run.config.tested_with(digits).load_data(("test",))
    own = str(run.config.digits).upper()
    data = dataclasses.replace(
        tested,
        notes=[*tested.notes, f"the model was trained with {own}'s digits"],
        counts={"test": tested.counts["test"]},
    )
    if "train" in parts:
        data = dataclasses.replace(data, train=run.protocol_data(("train",)).train)
    return data


def _title(run: Run, folder: Path) -> str:
    """Of figures."""
    parts = [run.config.protocol, run.config.loss]
    if folder != run.folder:
        parts.append(folder.name.replace("-", " "))
    return " · ".join(parts)


def _scores_of_artifact(run: Run) -> list[str]:
    try:
        return read_card(run.artifact).scores
    except BrokenArtifact:
        return []


def write_report(run: Run, *, digits: str | None = None) -> dict[str, Any]:
    """Make report and figures from the stored scores, without the model; ``digits`` as in ``score_test``."""
    folder = results_folder(run, digits)
    scored = Scored.load(folder / SCORES_FILE)
    context = json.loads((folder / "evaluation.json").read_text())
    factory, doubts = _factory_point(run, scored, f"{context['device']}-{context['precision']}-")
    report = build_report(
        scored,
        config=dataclasses.asdict(run.config)
        | {key: context[key] for key in ("which", "device", "precision")},
        notes=[*context["notes"], *doubts],
        counts=context["counts"],
        factory=factory,
        rule=context["rule"],
    )
    write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")
    figures.draw_all(scored, run.config, folder / "figures", title=_title(run, folder))
    return report


def _factory_point(
    run: Run, scored: Scored, path_prefix: str
) -> tuple[dict[str, Any] | None, list[str]]:
    """The artifact's operating point, if it belongs to the model that was evaluated, and what to know about it."""
    try:
        card = read_card(run.artifact)
    except BrokenArtifact:
        return None, []
    with safe_open(run.artifact / WEIGHTS, framework="numpy") as weights:
        exported = _directions(weights.get_tensor("head.weight"))
    evaluated = _directions(scored.centers)
    if exported.shape != evaluated.shape or not np.allclose(exported, evaluated, atol=1e-6):
        return None, [
            "the artifact holds another model than the one evaluated (other checkpoint or later training); "
            "its threshold is not judged here, export the run again"
        ]
    if card.factory is not None and card.factory["score_type"] not in scored.scores:
        return None, [
            f"the factory threshold is one of the score {card.factory['score_type']}, which was not evaluated; "
            f"it is not judged here"
        ]
    if card.factory is not None and not str(card.factory["path"]).startswith(path_prefix):
        return card.factory, [
            f"the factory threshold belongs to the path {card.factory['path']}, these scores to {path_prefix}*: "
            "close, but not the served computation"
        ]
    return card.factory, []


def _directions(centers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centers at unit length, (C, D); a head may store them at another."""
    unit: NDArray[np.float32] = centers / np.linalg.norm(centers, axis=1, keepdims=True).clip(1e-12)
    return unit
