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


class _Products(torch.autograd.Function):
    """See ``products``: one node, with half of the passes that autograd's own gradient of normalized vectors takes."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, centers: Tensor, length: float | None, unit: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.length, ctx.unit = length, unit
        vectors, divisors, radii = _at_length(features, length)
        if length is not None:
            ctx.mark_non_differentiable(radii)
        sizes = centers
        if not unit:
            sizes = torch.linalg.vector_norm(centers, dim=1, keepdim=True).clamp(min=TINY)
            centers = centers / sizes
        ctx.save_for_backward(vectors, divisors, centers, sizes)
        return vectors @ centers.T, radii

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_products: Tensor, of_radii: Tensor) -> tuple[Tensor | None, ...]:
        vectors, divisors, centers, sizes = ctx.saved_tensors
        of_vectors, of_centers = of_products @ centers, of_products.T @ vectors
        if ctx.length is None:
            of_features = of_vectors.addcmul_(vectors, of_radii / divisors)
        else:
            of_features = _across(of_vectors, vectors, divisors, ctx.length)
        if not ctx.unit:
            of_centers = _across(of_centers, centers, sizes, 1.0)
        return of_features, of_centers, None, None


def _at_length(vectors: Tensor, length: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors at a length (None: at their own), what they were divided by, and the lengths they then have."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    divisors = lengths.clamp(min=TINY)
    if length is None:
        return vectors, divisors, lengths
    divisors = divisors / length
    return vectors / divisors, divisors, torch.full_like(lengths, length)


def _across(gradient: Tensor, scaled: Tensor, divisors: Tensor, length: float) -> Tensor:
    """Gradient of v from that of r v / |v|: r (g - (g.u) u / r^2) / |v|; the first argument is overwritten."""
    along = (gradient * scaled).sum(dim=1, keepdim=True)
    return gradient.addcmul_(along, scaled, value=-1.0 / length**2).div_(divisors)


def products(
    features: Tensor, centers: Tensor, *, length: float | None = None, unit: bool = False
) -> tuple[Tensor, Tensor]:
    """Dot products of features with centers of unit length, and the features' lengths.

    Differentiable once: there is no gradient of its gradient. That is finite where a feature or center is zero.

    Args:
        features: (N, D).
        centers: (M, D).
        length: put features at this length first; None leaves them at their own.
        unit: centers are unit already, and their gradient keeps its radial part.

    Returns:
        Products, (N, M), and the lengths that features have in them, (N, 1).
    """
    if torch.is_grad_enabled():
        dots, radii = _Products.apply(features, centers, length, unit)
        return dots, radii
    # Without gradients nothing needs the node, which TorchScript's tracer cannot take.
    vectors, _, radii = _at_length(features, length)
    return vectors @ (centers if unit else normalize(centers)).T, radii


def normalize(vectors: Tensor) -> Tensor:
    """Rows scaled to unit length, (M, D) -> (M, D); a zero row stays zero and has a finite gradient."""
    return torch.nn.functional.normalize(vectors, dim=1, eps=TINY)


def cosines(products: Tensor, lengths: Tensor) -> Tensor:
    """Cosines in [-1, 1] from dot products, (N, C), and the products of both vectors' lengths, (N, C) or (N, 1).

    A zero vector has cosine 0 with all others.
    """
    return (products / lengths.clamp(min=TINY)).clamp(-1.0, 1.0)


def angles(cosines: Tensor) -> Tensor:
    """Angles in radians, [0, pi], same shape, of cosines in [-1, 1] as ``cosines`` makes them.

    Not for use where a gradient is needed: it is infinite at 0 and pi.
    """
    return torch.arccos(cosines)
