"""Scores with a state: class statistics or directions, fitted on training data and kept in the artifact.

The state is a set of named tensors. It is fitted once, on deep features of known *training* samples; negatives,
validation and test data never enter it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openset import geometry
from openset.heads import OpenSetOutput
from openset.scores import SCORES, Score, largest_logit

# Below this a spread or a distance is none.
_TINY = 1e-12


class Ghost(nn.Module):
    """GHOST: the largest logit over the feature's distance, in standard deviations, from its class (AAAI 2025).

    score = z_max / sum_d |phi_d - mean_cd| / deviation_cd with c the predicted class; dimensions in which a class does
    not vary are ignored. A negative largest logit, possible in linear heads alone, divides like any other.

    Args:
        means: by class and feature dimension, (C, D).
        deviations: standard deviations, (C, D).
    """

    means: Tensor
    deviations: Tensor

    def __init__(self, means: Tensor, deviations: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("deviations", deviations)

    @classmethod
    def fit(cls, features: Tensor, predictions: Tensor, labels: Tensor, num_classes: int) -> Ghost:
        """Statistics of the correctly classified samples of each class; of all its samples where fewer than two are.

        Raises:
            ValueError: a class has fewer than two samples.
        """
        means, deviations = [], []
        for label in range(num_classes):
            own = labels == label
            correct = own & (predictions == label)
            chosen = features[correct if int(correct.sum()) >= 2 else own].double()
            if len(chosen) < 2:
                raise ValueError(
                    f"the score ghost needs at least 2 training samples of every class, got {len(chosen)} of class {label}"
                )
            means.append(chosen.mean(dim=0))
            deviations.append(chosen.std(dim=0))
        return cls(torch.stack(means).float(), torch.stack(deviations).float())

    def forward(self, output: OpenSetOutput) -> Tensor:
        """Scores, (N,)."""
        largest, predicted = output.logits.max(dim=1)
        deviations = self.deviations[predicted]
        distances = (output.features - self.means[predicted]).abs() / deviations.clamp(min=_TINY)
        total = torch.where(deviations > _TINY, distances, torch.zeros_like(distances)).sum(dim=1)
        return largest / total.clamp(min=_TINY)


class Neco(nn.Module):
    """NECO: the share of the feature that lies in the knowns' principal subspace, times the largest logit (ICLR 2024).

    score = |P phi| / |phi| * z_max, P the projection on the leading principal directions of the known training
    features. There are min(C, D) - 1 of them: C centers differ in C - 1 directions, and what is common to all of
    them is where negatives of the entropic losses lie.

    Args:
        directions: orthonormal rows, (M, D).
    """

    directions: Tensor

    def __init__(self, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("directions", directions)

    @classmethod
    def fit(cls, features: Tensor, predictions: Tensor, labels: Tensor, num_classes: int) -> Neco:
        """Principal directions of the known samples' features, centered at their mean.

        Raises:
            ValueError: fewer samples than directions.
        """
        known = features[labels >= 0].double()
        count = max(1, min(num_classes, known.shape[1]) - 1)
        if len(known) <= count:
            raise ValueError(
                f"the score neco needs more than {count} known training samples, got {len(known)}"
            )
        centered = known - known.mean(dim=0)
        # Eigenvectors of the (D, D) covariance: cheaper than decomposing N samples; ascending, so the last are leading.
        _, vectors = torch.linalg.eigh(centered.T @ centered / (len(known) - 1))
        return cls(vectors[:, -count:].T.flip(0).contiguous().float())

    def forward(self, output: OpenSetOutput) -> Tensor:
        """Scores, (N,)."""
        inside = geometry.magnitudes(output.features @ self.directions.T)
        share = inside / geometry.magnitudes(output.features).clamp(min=_TINY)
        return share * largest_logit(output)


FITTED_SCORES: dict[str, type[Ghost] | type[Neco]] = {"ghost": Ghost, "neco": Neco}

ALL_SCORES = (*SCORES, *FITTED_SCORES)


def parse_scores(text: str) -> list[str]:
    """Names of scores, comma-separated; "all" for every one.

    Raises:
        ValueError: a name that is no score.
    """
    names = list(ALL_SCORES) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in ALL_SCORES]:
        raise ValueError(
            f'scores must be "all" or among {", ".join(ALL_SCORES)}, got {", ".join(unknown)}'
        )
    return names


def choose_scores(names: list[str], fitted: dict[str, nn.Module]) -> dict[str, Score]:
    """The scores of a classifier, by name.

    Args:
        names: entries of ``SCORES`` or ``FITTED_SCORES``.
        fitted: the fitted ones among them.

    Raises:
        ValueError: unknown name, or a score whose state is missing.
    """
    if unknown := [name for name in names if name not in ALL_SCORES]:
        raise ValueError(f"score must be one of {', '.join(ALL_SCORES)}, got {', '.join(unknown)}")
    if missing := [name for name in names if name in FITTED_SCORES and name not in fitted]:
        raise ValueError(
            f"the score {', '.join(missing)} needs its state, fitted on training data; export the run again with it"
        )
    return {name: fitted[name] if name in FITTED_SCORES else SCORES[name] for name in names}
