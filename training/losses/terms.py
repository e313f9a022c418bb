"""Loss terms, summed over the N samples of a batch; the sums are divided in one place, the criterion.

Sums are taken by torch's own losses, one operation each: a step is made of so few values that every operation counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from openset.labels import NEGATIVE, is_known
from training.losses.table import OBJECTOSPHERE, RING


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of knowns (thesis eq. 3.5); others count nothing."""
    return functional.cross_entropy(logits, labels, ignore_index=NEGATIVE, reduction="sum")


def entropic_open_set_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of knowns; -mean_c log p_c of all others, least (ln C) when p is uniform (eq. 3.17)."""
    log_p = logits.log_softmax(dim=1)
    of_knowns = functional.nll_loss(log_p, labels, ignore_index=NEGATIVE, reduction="sum")
    shares = (~is_known(labels)).to(log_p.dtype) / log_p.shape[1]
    return of_knowns - log_p.sum(dim=1).dot(shares)


def wanted_magnitudes(
    kind: str, magnitudes: Tensor, labels: Tensor, *, target_magnitude: float
) -> Tensor:
    """Where a magnitude term pulls each sample, (N,), a constant for the gradient.

    Args:
        kind: "ring" pulls all to xi (eq. 4.3), "symmetric_objectosphere" knowns to xi and all others to 0 (eq. 4.4),
            "objectosphere" likewise but leaves knowns beyond xi where they are (eq. 3.19).
        magnitudes: lengths of the deep features, (N,).
        labels: (N,).
        target_magnitude: xi.
    """
    if kind == OBJECTOSPHERE:
        wanted = magnitudes.detach().clamp(min=target_magnitude)
    else:
        wanted = torch.full_like(magnitudes, target_magnitude)
    return wanted if kind == RING else wanted.masked_fill(~is_known(labels), 0.0)


def magnitude_loss(magnitudes: Tensor, wanted: Tensor) -> Tensor:
    """Sum of (a - wanted)^2, of (N,) each; without the factor 1/2 of ring loss' original paper."""
    return functional.mse_loss(magnitudes, wanted, reduction="sum")
