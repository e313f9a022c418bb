"""Margins: what changes the target entry of a known sample, in training only.

A margin has a value and a gradient of its own (van den Bergh 2023, section 4; Liu et al., "SphereFace Revived", 2023):
the *value* of the target cosine is g(c), its derivative stays 1, so that dz_y/dc = r exactly. Negatives and all other
entries are untouched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openset import geometry
from openset.heads import OpenSetOutput
from openset.labels import is_known


@dataclass(frozen=True)
class CosineMargin:
    """Additive cosine margin: g(c) = c - cosine_margin (CosFace, arXiv:1801.09414; thesis eq. 3.15, 4.1)."""

    cosine_margin: float = 0.35

    def margin_cosine(self, cosines: Tensor, factor: float) -> Tensor:
        """g(c) with this share of the margin, for a warm-up."""
        return cosines - factor * self.cosine_margin


@dataclass(frozen=True)
class AngularMargin:
    """Additive angular margin: g(c) = cos(min(theta + angular_margin, pi)) (ArcFace; eq. 3.16, 4.2).

    Attributes:
        angular_margin: radians.
        monotone: beyond theta = pi - margin use c - m sin(m), which keeps falling, instead of the constant -1.
    """

    angular_margin: float = 0.5
    monotone: bool = False

    def margin_cosine(self, cosines: Tensor, factor: float) -> Tensor:
        """g(c) with this share of the margin, for a warm-up."""
        margin = factor * self.angular_margin
        angles = torch.arccos(cosines.clamp(-1.0, 1.0))
        shifted = torch.cos((angles + margin).clamp(max=math.pi))
        if not self.monotone:
            return shifted
        return torch.where(angles > math.pi - margin, cosines - margin * math.sin(margin), shifted)


@dataclass(frozen=True)
class MultiplicativeAngularMargin:
    """g(c) = (-1)^k cos(m theta) - 2k with k = floor(m theta / pi) (SphereFace, CVPR 2017; eq. 3.14)."""

    multiplicative_margin: float = 1.2

    def margin_cosine(self, cosines: Tensor, factor: float) -> Tensor:
        """g(c); ``factor`` leads from 1 (no margin) to the full multiple."""
        multiple = 1.0 + factor * (self.multiplicative_margin - 1.0)
        multiplied = multiple * torch.arccos(cosines.clamp(-1.0, 1.0))
        turns = torch.floor(multiplied / math.pi)
        sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
        return sign * torch.cos(multiplied) - 2.0 * turns


@dataclass(frozen=True)
class LogitMargin:
    """The target *logit* minus logit_margin (SM-Softmax, ICONIP 2017; eq. 3.13)."""

    logit_margin: float = 0.3


AnyMargin = CosineMargin | AngularMargin | MultiplicativeAngularMargin | LogitMargin


def with_background(output: OpenSetOutput, labels: Tensor) -> tuple[OpenSetOutput, Tensor]:
    """The background center as class C: radii and logits with its column, and labels without negatives, (N,)."""
    assert output.all_radii is not None
    assert output.all_logits is not None
    extended = output._replace(radii=output.all_radii, logits=output.all_logits)
    background = torch.full_like(labels, output.logits.shape[1])
    return extended, torch.where(is_known(labels), labels, background)


def margin_logits(
    output: OpenSetOutput,
    labels: Tensor,
    margin: AnyMargin | None,
    *,
    factor: float = 1.0,
    detach_radial: bool = False,
) -> Tensor:
    """Logits with the margin on the target entry of knowns.

    Args:
        output: of the head, (N, C) each.
        labels: class of knowns, negative for all others, (N,).
        margin: None leaves the logits as they are.
        factor: share of the margin, 0..1, for a warm-up.
        detach_radial: keep the margin out of the radius' gradient too: dz_y/da = c instead of g(c).

    Returns:
        New tensor, (N, C). Rows of negatives and non-target entries are unchanged.
    """
    if margin is None:
        return output.logits
    own = labels.clamp(min=0)[:, None]
    is_foreign = ~is_known(labels)[:, None]
    if isinstance(margin, LogitMargin):
        change = torch.full_like(output.logits[:, :1], -factor * margin.logit_margin)
        return output.logits.scatter_add(1, own, change.masked_fill(is_foreign, 0.0))
    radius = output.radii if output.radii.shape[1] == 1 else output.radii.gather(1, own)
    # The step g(c) - c is a constant for the gradient: the angle's derivative stays that of the plain cosine.
    cosine = geometry.cosines(output.logits.detach().gather(1, own), radius.detach())
    step = (margin.margin_cosine(cosine, factor) - cosine).masked_fill(is_foreign, 0.0)
    if detach_radial:
        radius = radius.detach()
    return output.logits.scatter_add(1, own, radius * step)
