"""Scores: one number per sample, higher = more known. The table is open: a new score is one more entry.

These are functions of the head's output alone; scores with a state of their own are in ``openset.fitted_scores``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from openset import geometry
from openset.heads import OpenSetOutput

DEFAULT_SCORE = "softmax"

Score = Callable[[OpenSetOutput], Tensor]


def all_logits(output: OpenSetOutput) -> Tensor:
    """Logits of the known classes, and of the background after them where the head has one, (N, C) or (N, C + 1)."""
    return output.logits if output.all_logits is None else output.all_logits


def class_probabilities(output: OpenSetOutput) -> Tensor:
    """Softmax probabilities of the known classes, (N, C); with a background class they sum to less than 1."""
    return all_logits(output).softmax(dim=1)[:, : output.logits.shape[1]]


def log_odds_of_largest_probability(output: OpenSetOutput) -> Tensor:
    """Log-odds of the largest softmax probability, (N,): z_max - logsumexp(z of the others, background included).

    Strictly monotone in the probability, but it never saturates: float32 probabilities tie at 1 from a logit gap of
    about 20 on, their log-odds do not.
    """
    logits = all_logits(output)
    if logits.shape[1] < 2:
        raise ValueError(f"log-odds need at least 2 classes, got {logits.shape[1]}")
    largest, index = output.logits.max(dim=1, keepdim=True)
    others = logits.scatter(1, index, -math.inf)
    return (largest - torch.logsumexp(others, dim=1, keepdim=True)).squeeze(1)


def largest_logit(output: OpenSetOutput) -> Tensor:
    """The largest logit of a known class, (N,)."""
    return output.logits.amax(dim=1)


def free_energy(output: OpenSetOutput) -> Tensor:
    """Logsumexp of the known classes' logits, (N,): the negative free energy at temperature 1 (Liu et al., NeurIPS 2020)."""
    return torch.logsumexp(output.logits, dim=1)


def magnitude_times_probability(output: OpenSetOutput) -> Tensor:
    """Length of the deep feature times the largest probability, (N,) (Dhamija et al., NeurIPS 2018, section 4)."""
    return geometry.magnitudes(output.features) * class_probabilities(output).amax(dim=1)


SCORES: dict[str, Score] = {
    "softmax": log_odds_of_largest_probability,
    "logit": largest_logit,
    "energy": free_energy,
    "magnitude": magnitude_times_probability,
}


def score_probability(score_type: str, score: float) -> float | None:
    """The softmax probability that belongs to a score, for display only; None where a score has none."""
    if score_type != "softmax" or math.isnan(score):
        return None
    if score >= 0:
        return 1.0 / (1.0 + math.exp(-min(score, 700.0)))
    odds = math.exp(max(score, -700.0))
    return odds / (1.0 + odds)
