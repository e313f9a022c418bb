"""Per-sample loss terms, all (N,); the mean is taken in one place, the criterion."""

from __future__ import annotations

import torch
from torch import Tensor

from openset.labels import is_known
from training.losses.margins import target_entries


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of knowns, 0 for all others, (N,) (thesis eq. 3.5)."""
    own = target_entries(logits.log_softmax(dim=1), labels)
    return torch.where(is_known(labels), -own, torch.zeros_like(own))


def entropic_open_set_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of knowns; -mean_c log p_c of all others, least (ln C) when p is uniform, (N,) (eq. 3.17)."""
    log_probabilities = logits.log_softmax(dim=1)
    own = target_entries(log_probabilities, labels)
    return -torch.where(is_known(labels), own, log_probabilities.mean(dim=1))


def ring_loss(magnitudes: Tensor, *, target_magnitude: float) -> Tensor:
    """(s - a)^2 of every sample, (N,) (eq. 4.3; without the original paper's factor 1/2)."""
    return (target_magnitude - magnitudes).square()


def objectosphere_loss(
    magnitudes: Tensor, labels: Tensor, *, target_magnitude: float, symmetric: bool
) -> Tensor:
    """Pull negatives to magnitude 0 and knowns to xi or beyond, (N,).

    Args:
        magnitudes: lengths of the deep features, (N,).
        labels: (N,).
        target_magnitude: xi.
        symmetric: punish knowns beyond xi as well (eq. 4.4); else only below it (eq. 3.19).
    """
    missing = target_magnitude - magnitudes
    of_knowns = missing if symmetric else missing.clamp(min=0.0)
    return torch.where(is_known(labels), of_knowns, magnitudes).square()
