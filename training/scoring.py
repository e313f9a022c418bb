"""Runs a classifier over one part of the data; evaluation, export and calibration share it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from openset.calibration import ScoreSet
from openset.classifier import OpenSetClassifier
from openset.preprocessing import Preprocessing
from training.data import Split, batch_count
from training.stored_arrays import loaded

_BATCH_SIZE = 256


@dataclass(frozen=True, eq=False)
class Scored:
    """What a classifier says of N samples; what is stored to make reports without the model.

    Attributes:
        features: (N, D) float32.
        logits: (N, C) float32.
        cosines: (N, C) float32.
        scores: by score type, (N,) float32 each.
        predictions: (N,) int64.
        labels: (N,) int64.
        groups: (N,) str.
        sample_ids: (N,) str.
        centers: class centers, (C, D) float32.
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    cosines: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]]
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    sample_ids: NDArray[np.str_]
    centers: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: NDArray[Any]) -> Scored:
        """The samples at ``indices``."""
        values = {
            item.name: getattr(self, item.name)[indices]
            for item in fields(self)
            if item.name not in ("scores", "centers")
        }
        scores = {name: values_of[indices] for name, values_of in self.scores.items()}
        return Scored(**values, scores=scores, centers=self.centers)

    def score_set(self, path: str) -> ScoreSet:
        """The part that travels in an artifact."""
        return ScoreSet(
            path, self.scores, self.predictions, self.labels, self.groups, self.sample_ids
        )

    def save(self, file: Path) -> None:
        """Write to an npz file."""
        arrays = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "scores"
        }
        arrays |= {f"scores/{name}": values for name, values in self.scores.items()}
        np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, file: Path) -> Scored:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        with loaded(file) as content:
            names = [item.name for item in fields(cls) if item.name != "scores"]
            scores = {
                name.removeprefix("scores/"): content[name]
                for name in content.files
                if name.startswith("scores/")
            }
            return cls(**{name: content[name] for name in names}, scores=scores)


def left_out(split: Split, scored: Scored) -> list[str]:
    """What a reader must be told of samples that could not be read; else nothing."""
    missing = len(split) - len(scored)
    return [f"{missing} of {len(split)} images were unreadable and left out"] * (missing > 0)


def require_device(device: str) -> str:
    """The device, if this machine has it.

    Raises:
        ValueError: CUDA was asked for and torch finds none.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for, but this machine offers no CUDA device to torch; "
            "run this on a machine that has one, or with --device cpu (DEVICE=cpu)"
        )
    return device


def score_split(
    classifier: OpenSetClassifier,
    split: Split,
    preprocessing: Preprocessing,
    *,
    workers: int = 0,
    description: str = "scoring",
    show_progress: bool = True,
) -> Scored:
    """Score every readable sample of a part, in order."""
    parts: dict[str, list[NDArray[Any]]] = {}
    indices = []
    batches = split.batches(_BATCH_SIZE, preprocessing, workers=workers)
    for images, _, index in tqdm(
        batches,
        total=batch_count(split, _BATCH_SIZE),
        desc=description,
        disable=None if show_progress else True,  # None: no bar where nobody watches
        leave=False,
    ):
        prediction = classifier.predict(images)
        output = prediction.output
        columns = {
            "features": output.features, "logits": output.logits, "cosines": output.cosines,
            "predictions": prediction.predictions, **prediction.scores,
        }  # fmt: skip
        for name, values in columns.items():
            parts.setdefault(name, []).append(values.cpu().numpy())
        indices.append(index)
    if not indices:
        raise ValueError(f"{description}: there is no sample to score")
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    order = np.concatenate(indices)
    return Scored(
        features=joined["features"],
        logits=joined["logits"],
        cosines=joined["cosines"],
        scores={name: joined[name] for name in classifier.scores},
        predictions=joined["predictions"],
        labels=split.labels[order],
        groups=split.groups[order],
        sample_ids=split.sample_ids[order],
        centers=classifier.head.centers.detach().float().cpu().numpy(),
    )
