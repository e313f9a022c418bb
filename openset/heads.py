"""Heads: from deep features to cosines, radii and logits. A head knows no labels and no margin.

All heads fit ``logits = radii * cosines`` (van den Bergh 2023, eq. 3.7-3.9). Linear and soft logits are computed as the
plain matrix product: dividing by the magnitude and multiplying again would be a needless risk at magnitude zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openset import geometry

NORMALIZATIONS = ("none", "soft", "hard")
CENTER_NORMS = ("differentiable", "projected")


class OpenSetOutput(NamedTuple):
    """What a head says of N samples.

    Attributes:
        features: deep features, (N, D), float32.
        cosines: similarity to each class center, (N, C), in [-1, 1].
        radii: what multiplies the cosines: magnitudes (N, 1) for soft, the constant scale (N, 1) for hard,
            magnitude times center length (N, C) for linear heads.
        logits: (N, C), never with a margin.
        background_cosines: similarity to the background center, (N,); None for heads without one.
        background_logits: (N,), or None.
    """

    features: Tensor
    cosines: Tensor
    radii: Tensor
    logits: Tensor
    background_cosines: Tensor | None = None
    background_logits: Tensor | None = None


def _initial_centers(num_classes: int, feature_dim: int) -> Tensor:
    centers = torch.empty(num_classes, feature_dim)
    return nn.init.normal_(
        centers, std=math.sqrt(2.0 / (num_classes + feature_dim))
    )  # Xavier normal


class LinearHead(nn.Module):
    """Free centers without bias: ``logits = features @ centers.T``.

    Args:
        num_classes: C, known classes only.
        feature_dim: D.
        background: add a center of its own for everything foreign.
    """

    normalization = "none"
    scale: float | None = None

    def __init__(self, num_classes: int, feature_dim: int, *, background: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_initial_centers(num_classes, feature_dim))
        self.background = (
            nn.Parameter(_initial_centers(num_classes, feature_dim)[:1]) if background else None
        )

    @property
    def centers(self) -> Tensor:
        """Class centers, (C, D), of any length."""
        return self.weight

    def forward(self, features: Tensor) -> OpenSetOutput:
        """Compute the output of N features, (N, D), in float32."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float() if features.dtype != torch.float64 else features
            weight = self.weight.to(features.dtype)
            lengths = geometry.magnitudes(weight)
            radii = geometry.magnitudes(features)[:, None] * lengths[None, :]
            cosines = geometry.cosines(features, weight)
            output = OpenSetOutput(features, cosines, radii, features @ weight.T)
            if self.background is None:
                return output
            center = self.background.to(features.dtype)
            return output._replace(
                background_cosines=geometry.cosines(features, center)[:, 0],
                background_logits=(features @ center.T)[:, 0],
            )


class NormalizedHead(nn.Module):
    """Unit centers; the radius is the feature's magnitude ("soft") or a constant scale ("hard").

    Args:
        num_classes: C, known classes only.
        feature_dim: D.
        normalization: "soft" (logits = magnitude * cosine) or "hard" (logits = scale * cosine).
        scale: radius s of the hard kind; for the soft kind the target magnitude, kept for the model card.
        center_norm: "differentiable" normalizes inside the forward pass (eq. 3.9); "projected" overwrites the stored
            parameter by its unit vector before each training forward, outside autograd, as the author's code did.
        background: add a unit center of its own for everything foreign.
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        normalization: str,
        scale: float | None = None,
        center_norm: str = "differentiable",
        background: bool = False,
    ) -> None:
        super().__init__()
        if normalization not in ("soft", "hard"):
            raise ValueError(f'normalization must be "soft" or "hard", got {normalization!r}')
        if center_norm not in CENTER_NORMS:
            raise ValueError(f"center_norm must be one of {CENTER_NORMS}, got {center_norm!r}")
        if normalization == "hard" and not (scale is not None and scale > 0):
            raise ValueError(f"a hard head needs a positive scale, got {scale!r}")
        self.normalization = normalization
        self.scale = None if scale is None else float(scale)
        self.center_norm = center_norm
        self.weight = nn.Parameter(geometry.normalize(_initial_centers(num_classes, feature_dim)))
        self.background = (
            nn.Parameter(geometry.normalize(_initial_centers(num_classes, feature_dim)[:1]))
            if background
            else None
        )

    @property
    def centers(self) -> Tensor:
        """Unit class centers, (C, D)."""
        return geometry.normalize(self.weight)

    def forward(self, features: Tensor) -> OpenSetOutput:
        """Compute the output of N features, (N, D), in float32."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float() if features.dtype != torch.float64 else features
            cosines, logits = self._similarities(features, self.weight)
            if self.normalization == "hard":
                assert self.scale is not None
                radii = features.new_full((features.shape[0], 1), self.scale)
            else:
                radii = geometry.magnitudes(features)[:, None]
            output = OpenSetOutput(features, cosines, radii, logits)
            if self.background is None:
                return output
            cosines, logits = self._similarities(features, self.background)
            return output._replace(background_cosines=cosines[:, 0], background_logits=logits[:, 0])

    def _similarities(self, features: Tensor, weight: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Cosines and logits of N features with M stored centers, (N, M) each."""
        # A projected center is unit already in training; its gradient keeps the radial part on purpose.
        keeps_stored = self.center_norm == "projected" and self.training
        if keeps_stored:
            with torch.no_grad():
                weight.copy_(geometry.normalize(weight))
        stored = weight.to(features.dtype)
        centers = stored if keeps_stored else geometry.normalize(stored)
        cosines = (geometry.normalize(features) @ centers.T).clamp(-1.0, 1.0)
        if self.normalization == "hard":
            assert self.scale is not None
            return cosines, self.scale * cosines
        return cosines, features @ centers.T


Head = LinearHead | NormalizedHead


def build_head(
    normalization: str,
    *,
    num_classes: int,
    feature_dim: int,
    scale: float | None = None,
    center_norm: str = "differentiable",
    background: bool = False,
) -> Head:
    """Build the head that a model card or a loss recipe asks for.

    Raises:
        ValueError: unknown normalization or a hard head without a scale.
    """
    if normalization == "none":
        return LinearHead(num_classes, feature_dim, background=background)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    return NormalizedHead(
        num_classes,
        feature_dim,
        normalization=normalization,
        scale=scale,
        center_norm=center_norm,
        background=background,
    )
