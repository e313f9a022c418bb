"""Magnitudes, directions and angles of deep features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this length a vector has no direction; it is treated as the zero vector.
TINY = 1e-12


def magnitudes(features: Tensor) -> Tensor:
    """Euclidean length of every feature, (N, D) -> (N,); its gradient at zero is zero."""
    lengths: Tensor = torch.linalg.vector_norm(features, dim=1)
    return lengths


class _Normalize(torch.autograd.Function):
    """u = r v / |v| with its gradient in closed form, r (g - (g.u) u / r^2) / |v|: half of what autograd's own takes."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, length: float) -> Tensor:
        divisors = magnitudes(vectors)[:, None].clamp(min=TINY) / length
        scaled: Tensor = vectors / divisors
        ctx.save_for_backward(scaled, divisors)
        ctx.length = length
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scaled, divisors = ctx.saved_tensors
        along = (gradient * scaled).sum(dim=1, keepdim=True)
        across: Tensor = torch.addcmul(gradient, along, scaled, value=-1.0 / ctx.length**2)
        return across.div_(divisors), None


def normalize(vectors: Tensor, *, length: float = 1.0) -> Tensor:
    """Rows scaled to a length, (M, D) -> (M, D); a zero row stays zero and has a finite gradient.

    Differentiable once: there is no gradient of its gradient.
    """
    scaled: Tensor = _Normalize.apply(vectors, length)
    return scaled


def cosines(products: Tensor, lengths: Tensor) -> Tensor:
    """Cosines in [-1, 1] from dot products, (N, C), and the products of both vectors' lengths, (N, C) or (N, 1).

    A zero vector has cosine 0 with all others.
    """
    return (products / lengths.clamp(min=TINY)).clamp(-1.0, 1.0)


def angles(cosines: Tensor) -> Tensor:
    """Angles in radians, [0, pi], same shape. Not for use where a gradient is needed: it is infinite at 0 and pi."""
    return torch.arccos(cosines.clamp(-1.0, 1.0))
