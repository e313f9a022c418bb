"""Magnitudes, directions and angles of deep features."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this length a vector has no direction; it is treated as the zero vector.
TINY = 1e-12


def magnitudes(features: Tensor) -> Tensor:
    """Euclidean length of every feature, (N, D) -> (N,); its gradient at zero is zero."""
    lengths: Tensor = torch.linalg.vector_norm(features, dim=1)
    return lengths


def normalize(vectors: Tensor) -> Tensor:
    """Rows scaled to unit length, (M, D) -> (M, D); a zero row stays zero and has a finite gradient."""
    return torch.nn.functional.normalize(vectors, dim=1, eps=TINY)


def cosines(features: Tensor, centers: Tensor) -> Tensor:
    """Cosine of every feature with every class center, (N, D), (C, D) -> (N, C) in [-1, 1].

    A zero feature has cosine 0 with all centers. Lengths of the centers do not matter.
    """
    return (normalize(features) @ normalize(centers).T).clamp(-1.0, 1.0)


def angles(cosines: Tensor) -> Tensor:
    """Angles in radians, [0, pi], same shape. Not for use where a gradient is needed: it is infinite at 0 and pi."""
    return torch.arccos(cosines.clamp(-1.0, 1.0))
