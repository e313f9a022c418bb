"""The metrics: a Python loop over thresholds against ours, and a million images from logits to CCR@FPR."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from benchmarks.training.rows import Row, seconds_side_by_side
from openset.heads import OpenSetOutput
from openset.labels import NEGATIVE
from openset.metrics import ccr_at_fpr, oscr_curve
from openset.scores import SCORES

CLASSES = 151
TARGETS = (1e-3, 1e-2, 1e-1)
_ROWS = 8192  # logits scored at once: a batch of the evaluation, and what fits a cache


def _by_loop(
    scores: NDArray[Any], predictions: NDArray[Any], labels: NDArray[Any]
) -> list[float | None]:
    known, foreign = labels >= 0, scores[labels == NEGATIVE]
    correct = scores[known & (predictions == labels)]
    found: list[float | None] = [None] * len(TARGETS)
    for threshold in sorted(set(foreign.tolist()), reverse=True):
        fpr = (foreign >= threshold).mean()
        ccr = float((correct >= threshold).sum() / known.sum())
        for number, target in enumerate(TARGETS):
            if fpr <= target:
                found[number] = ccr
    return found


def _ours(
    scores: NDArray[Any], predictions: NDArray[Any], labels: NDArray[Any]
) -> list[float | None]:
    curve = oscr_curve(scores, predictions, labels, against=NEGATIVE)
    return [ccr_at_fpr(curve, max_fpr=target) for target in TARGETS]


def _scored(logits: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    scores, predictions = [], []
    for part in logits.split(_ROWS):
        scores.append(SCORES["softmax"](OpenSetOutput(part, part, part)))
        predictions.append(part.argmax(dim=1))
    return torch.cat(scores).numpy(), torch.cat(predictions).numpy()


def measure(*, loop_images: int, images: int, repeats: int) -> list[Row]:
    """Rows of the curve alone, and of everything from logits on; half of the images are negatives."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(images, CLASSES, generator=random) * 3
    labels = torch.randint(0, CLASSES, (images,), generator=random).numpy()
    labels[::2] = NEGATIVE
    scores, predictions = _scored(logits)
    few = (scores[:loop_images], predictions[:loop_images], labels[:loop_images])
    if _by_loop(*few) != _ours(*few):
        raise AssertionError("the loop over thresholds and oscr_curve disagree")
    seconds = seconds_side_by_side(
        {"loop": lambda: _by_loop(*few), "few": lambda: _ours(*few)}, repeats=min(repeats, 3)
    )
    many = seconds_side_by_side(
        {
            "curve": lambda: _ours(scores, predictions, labels),
            "all": lambda: _ours(*_scored(logits), labels),
        },
        repeats=repeats,
    )
    ratio, rate = seconds["loop"] / seconds["few"], loop_images / seconds["few"]
    what = f"{loop_images:,} x {CLASSES}"
    return [
        Row(f"OSCR + CCR@FPR, {what}", seconds["few"], "s", f"Python loop over thresholds: {seconds['loop']:.2f} s",
            ratio, ">= 30", ratio >= 30),
        Row(f"OSCR + CCR@FPR, {what}", rate, "scores/s", "", None, ">= 1,000,000 scores/s", rate >= 1e6),
        Row(f"OSCR + CCR@FPR, {images:,} scores", images / many["curve"], "scores/s", "", None,
            ">= 1,000,000 scores/s", images / many["curve"] >= 1e6),
        Row(f"{images:,} x {CLASSES} logits: scores, predictions, OSCR, CCR@FPR", many["all"], "s", "", None, "< 2 s",
            many["all"] < 2),
    ]  # fmt: skip
