"""Angles between deep features and class centers: histograms by group, and the probability that a loss gives to an angle."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from training.intervals import Floats
from training.report import group_masks, own_or_nearest_angle
from training.runs import TrainConfig
from training.scoring import Scored

# Radians; the last bin ends beyond pi, so that pi lies inside one.
EDGES = np.linspace(0, math.pi + math.pi / 100, 100)


@dataclass(frozen=True)
class ProbabilityCurve:
    """P(theta) for a fixed radius and the other centers at a right angle (thesis eq. 3.10).

    Attributes:
        scale: the radius s.
        num_centers: C, one more with a background class; all but the own are rivals.
        exact: the head's radius is s for every image; a soft head's is the feature's magnitude, only pulled to s.
        cosine_margin: taken from the cosine in training; NaN where there is none.
        angular_margin: added to the angle in training, radians; NaN where there is none.
    """

    scale: float
    num_centers: int
    exact: bool
    cosine_margin: float = math.nan
    angular_margin: float = math.nan

    def without_margin(self, theta: Floats) -> Floats:
        """The probability in use. (N,) of angles in radians (N,)."""
        return self._at(np.cos(theta))

    def with_margin(self, theta: Floats) -> Floats | None:
        """The probability in training. (N,) of angles in radians (N,); None for a loss without a margin."""
        if not math.isnan(self.cosine_margin):
            return self._at(np.cos(theta) - self.cosine_margin)
        if not math.isnan(self.angular_margin):
            return self._at(np.cos(np.minimum(theta + self.angular_margin, math.pi)))
        return None

    def _at(self, cosine: Floats) -> Floats:
        result: Floats = 1 / (1 + (self.num_centers - 1) * np.exp(-self.scale * cosine))
        return result

    def packed(self) -> Floats:
        """As numbers, (5,)."""
        return np.array(astuple(self), dtype=np.float64)

    @classmethod
    def unpacked(cls, numbers: Floats) -> ProbabilityCurve:
        """What ``packed`` made."""
        scale, num_centers, exact, *margins = numbers.tolist()
        return cls(scale, int(num_centers), bool(exact), *margins)


@dataclass(frozen=True, eq=False)
class Angles:
    """What a figure of the angles shows.

    Attributes:
        counts: images in each bin of ``EDGES``, (99,), by group ("known", "negative", "unknown"; those that there are).
            Knowns by the angle to their own class's center, foreign ones to the nearest.
        curve: the loss's probability of an angle; None for one with free centers.
    """

    counts: dict[str, NDArray[np.int64]]
    curve: ProbabilityCurve | None


def angles_of(scored: Scored, config: TrainConfig) -> Angles:
    """The angles of a scored part."""
    angles = own_or_nearest_angle(scored)
    return Angles(
        {
            group: np.histogram(angles[mask], EDGES)[0].astype(np.int64)
            for group, mask in group_masks(scored.labels).items()
        },
        _curve_of(scored, config),
    )


def _curve_of(scored: Scored, config: TrainConfig) -> ProbabilityCurve | None:
    num_classes = scored.logits.shape[1]
    # Only what kind they are is wanted: a figure draws no random numbers.
    with torch.random.fork_rng(devices=[]):
        head, criterion = config.head_and_criterion(num_classes)
    if head.normalization == "none":
        return None  # an angle to a center of free length has no probability of its own
    scale = config.loss_options["scale"]
    if isinstance(scale, str):
        # A rule made it, perhaps during training: the factor between cosines and logits tells it.
        scale = float((scored.logits * scored.cosines).sum() / np.square(scored.cosines).sum())
    exact = np.allclose(scored.logits, scale * scored.cosines, atol=1e-3)
    margins = {
        name: float(getattr(criterion.spec.margin, name, math.nan))
        for name in ("cosine_margin", "angular_margin")
    }
    num_centers = num_classes + (head.background is not None)
    return ProbabilityCurve(float(scale), num_centers, exact, **margins)
