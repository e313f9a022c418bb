"""The scale s: bounds that name it, and AdaCos, which follows the batch (science reference section 3).

A scale may be given as a number or by the name of a rule. For a soft head it is the target magnitude xi.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openset import geometry
from openset.heads import OpenSetOutput
from openset.labels import is_known
from training.losses.margins import (
    AngularMargin,
    AnyMargin,
    CosineMargin,
    LogitMargin,
)

ADACOS = "adacos"
ADACOS_DYNAMIC = "adacos_dynamic"
MARGIN_AWARE = "margin_aware"
THESIS = "thesis"
SCALE_RULES = (THESIS, MARGIN_AWARE, ADACOS, ADACOS_DYNAMIC)

# Of a sample exactly at its center; the thesis' choice, which makes s = 13 for ten classes.
THESIS_PROBABILITY = 0.999995
MARGIN_AWARE_PROBABILITY = 0.99
_ABOVE_BOUND = 1.1


def scale_bound(num_classes: int, probability: float, *, largest_target: float = 1.0) -> float:
    """Smallest s with which a sample at its center reaches a probability, the other centers on a simplex.

    Args:
        num_classes: C.
        probability: wanted of the own class, in (1/C, 1).
        largest_target: the target's cosine at angle 0 with its margin; 1 without (then this is thesis eq. 3.11).

    Raises:
        ValueError: a probability out of range, or a margin that leaves the target no larger than the others.
    """
    if num_classes < 2:
        raise ValueError(f"a scale needs at least 2 classes, got {num_classes}")
    if not 1 / num_classes < probability < 1:
        raise ValueError(
            f"scale_probability must lie between 1/C = {1 / num_classes:.4g} and 1, got {probability!r}"
        )
    other = -1.0 / (num_classes - 1)
    if largest_target <= other:
        raise ValueError(
            f"the margin leaves a perfect sample a target cosine of {largest_target:.3f}, not above the other classes' "
            f"{other:.3f}; no scale can make up for it, choose a smaller margin"
        )
    odds = (num_classes - 1) * probability / (1 - probability)
    return math.log(odds) / (largest_target - other)


def adacos_scale(num_classes: int) -> float:
    """Fixed scale of AdaCos, sqrt(2) ln(C - 1) (Zhang et al., CVPR 2019, eq. 12)."""
    if num_classes < 3:
        raise ValueError(f"the fixed scale of AdaCos needs at least 3 classes, got {num_classes}")
    return math.sqrt(2.0) * math.log(num_classes - 1)


def target_at_center(margin: AnyMargin | None) -> float:
    """The target's cosine at angle 0 with the margin on it: 1 - m_cos or cos(m_ang); 1 for all other losses."""
    if isinstance(margin, CosineMargin):
        return 1.0 - margin.cosine_margin
    if isinstance(margin, AngularMargin):
        return math.cos(margin.angular_margin)
    return 1.0


def resolve_scale(
    scale: float | str,
    *,
    num_classes: int,
    margin: AnyMargin | None = None,
    probability: float = MARGIN_AWARE_PROBABILITY,
) -> float:
    """The number behind a scale that may be named.

    Args:
        scale: a number, or "thesis" (eq. 3.11, rounded up), "margin_aware" (the same bound with the margin, for
            ``probability``), "adacos", or "adacos_dynamic" (its starting value).
        num_classes: C.
        margin: of the loss.
        probability: for "margin_aware".

    Raises:
        ValueError: not positive, or not the name of a rule.
    """
    if scale == THESIS:
        return float(math.ceil(scale_bound(num_classes, THESIS_PROBABILITY)))
    if scale == MARGIN_AWARE:
        return scale_bound(num_classes, probability, largest_target=target_at_center(margin))
    if scale in (ADACOS, ADACOS_DYNAMIC):
        return adacos_scale(num_classes)
    if isinstance(scale, str) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"scale must be a positive number or one of {', '.join(SCALE_RULES)}, got {scale!r}"
        )
    return float(scale)


def magnitude_weight_above_bound(margin: AnyMargin | None, *, target_magnitude: float) -> float:
    """A lambda with which no margin can shrink the magnitudes of knowns (science reference section 8.2).

    In a soft head the margin pushes the magnitude down with -g(0) where theta is 90 degrees (sin m_ang or m_cos); the
    magnitude term pulls it up by at most 2 lambda xi. They balance at lambda = -g(0) / (2 xi); this is a tenth above.
    The bound is for a cross-entropy divided by N; with ``cce_mean="known"`` it is larger by N / N_k (``build_loss`` refuses
    that).

    Raises:
        ValueError: a loss without a margin on the cosine has no such bound.
    """
    if margin is None or isinstance(margin, LogitMargin):
        raise ValueError(
            'magnitude_weight="above_bound" needs a loss with a margin on the cosine; give a number instead'
        )
    push = -float(margin.margin_cosine(torch.zeros(()), 1.0))
    return _ABOVE_BOUND * push / (2.0 * target_magnitude)


class DynamicScale(nn.Module):
    """AdaCos' scale, which follows the batches of a training (Zhang et al., CVPR 2019, eq. 15-17).

    With B the mean over knowns of sum_{c != y} exp(s_{t-1} cos_c) and theta the median angle to the own center:
    s_t = ln B / cos(min(pi/4, theta)). Negatives have no own class and do not count [ours]; a batch without knowns
    leaves the scale as it is. No gradient flows through it. It is a buffer, so that a checkpoint holds it.

    Args:
        start: s_0.
    """

    value: Tensor

    def __init__(self, start: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(float(start)))

    def forward(self, output: OpenSetOutput, labels: Tensor) -> OpenSetOutput:
        """The hard head's output with the adapted scale in place of its own; in training the scale adapts first."""
        if self.training:
            self.update(output, labels)
        scale = self.value.to(output.logits.dtype)
        radii = scale.expand_as(output.radii)
        adapted = output._replace(radii=radii, logits=scale * output.cosines)
        if output.all_logits is None or output.all_radii is None:
            return adapted
        everything = scale * geometry.cosines(output.all_logits, output.all_radii)
        return adapted._replace(all_radii=radii, all_logits=everything)

    @torch.no_grad()
    def update(self, output: OpenSetOutput, labels: Tensor) -> None:
        """Adapt to a batch of N samples, (N, C) cosines and (N,) labels."""
        known = is_known(labels)
        own = labels.clamp(min=0)[:, None]
        others = (self.value * output.cosines.float()).scatter(1, own, -math.inf)
        others = others.masked_fill(~known[:, None], -math.inf)
        count = known.sum()
        log_mean = torch.logsumexp(others.flatten(), dim=0) - count.clamp(min=1).log()
        cosines = output.cosines.float().gather(1, own).squeeze(1)
        angles = torch.arccos(cosines.clamp(-1.0, 1.0))
        median = torch.where(known, angles, torch.full_like(angles, math.nan)).nanmedian()
        adapted = log_mean / median.clamp(max=math.pi / 4).cos()
        self.value.copy_(torch.where(count > 0, adapted, self.value))
