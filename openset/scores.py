"""Scores: one number per sample, higher = more known. The table is open: a new score is one more entry."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from openset.heads import OpenSetOutput

DEFAULT_SCORE = "softmax"


def log_odds_of_largest_probability(output: OpenSetOutput) -> Tensor:
    """Log-odds of the largest softmax probability, (N,): z_max - logsumexp(z of the others).

    Strictly monotone in the probability, but it never saturates: float32 probabilities tie at 1 from a logit gap of
    about 20 on, their log-odds do not.
    """
    logits = output.logits
    if logits.shape[1] < 2:
        raise ValueError(f"log-odds need at least 2 classes, got {logits.shape[1]}")
    largest, index = logits.max(dim=1, keepdim=True)
    others = logits.scatter(1, index, -math.inf)
    return (largest - torch.logsumexp(others, dim=1, keepdim=True)).squeeze(1)


def largest_logit(output: OpenSetOutput) -> Tensor:
    """The largest logit, (N,)."""
    return output.logits.amax(dim=1)


SCORES: dict[str, Callable[[OpenSetOutput], Tensor]] = {
    "softmax": log_odds_of_largest_probability,
    "logit": largest_logit,
}


def score_probability(score_type: str, score: float) -> float | None:
    """The softmax probability that belongs to a score, for display only; None where a score has none."""
    if score_type != "softmax" or math.isnan(score):
        return None
    if score >= 0:
        return 1.0 / (1.0 + math.exp(-min(score, 700.0)))
    odds = math.exp(max(score, -700.0))
    return odds / (1.0 + odds)
