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
        radii: what multiplies the cosines: magnitudes (N, 1) for soft, the constant scale (N, 1) for hard,
            magnitude times center length (N, C) for linear heads.
        logits: (N, C), never with a margin.
        all_radii: the radii with that of the background center as a last column, (N, 1) or (N, C + 1); None for heads
            without one.
        all_logits: likewise, (N, C + 1). Whoever replaces radii or logits replaces these too.
    """

    features: Tensor
    radii: Tensor
    logits: Tensor
    all_radii: Tensor | None = None
    all_logits: Tensor | None = None

    @property
    def cosines(self) -> Tensor:
        """Similarity to each class center, (N, C), in [-1, 1]; made when asked for: training needs the labels' alone."""
        return geometry.cosines(self.logits, self.radii)


def _initial_centers(num_classes: int, feature_dim: int) -> Tensor:
    centers = torch.empty(num_classes, feature_dim)
    return nn.init.normal_(
        centers, std=math.sqrt(2.0 / (num_classes + feature_dim))
    )  # Xavier normal


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _joined(weight: Tensor, background: Tensor | None) -> Tensor:
    """One matrix product for all centers, the background's last."""
    return weight if background is None else torch.cat([weight, background])


def _background_apart(output: OpenSetOutput) -> OpenSetOutput:
    """The last column is the background's; views, nothing is copied."""
    classes = output.logits.shape[1] - 1
    return OpenSetOutput(
        output.features,
        output.radii[:, :classes],
        output.logits[:, :classes],
        output.radii,
        output.logits,
    )


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
            features = _at_least_float32(features)
            weight = _joined(self.weight, self.background).to(features.dtype)
            radii = geometry.magnitudes(features)[:, None] * geometry.magnitudes(weight)
            output = OpenSetOutput(features, radii, features @ weight.T)
            return output if self.background is None else _background_apart(output)


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
            features = _at_least_float32(features)
            # A projected center is unit already in training; its gradient keeps the radial part on purpose.
            is_projected = self.center_norm == "projected" and self.training
            if is_projected:
                with torch.no_grad():
                    for weight in self.parameters():
                        weight.copy_(geometry.normalize(weight))
            centers = _joined(self.weight, self.background).to(features.dtype)
            length = self.scale if self.normalization == "hard" else None
            logits, radii = geometry.products(features, centers, length=length, unit=is_projected)
            output = OpenSetOutput(features, radii, logits)
            return output if self.background is None else _background_apart(output)


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
