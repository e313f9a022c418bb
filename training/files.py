"""Photographs on disk, decoded while training or evaluation goes on: the path without a cache."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openset.image_headers import UnreadableImage
from openset.preprocessing import Preprocessing
from training.augmentation import augment

logger = logging.getLogger(__name__)

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
HOW_TO_GO_ON = "repair or remove the file, or pass on_unreadable=skip to leave such files out"


def image_names(folder: Path) -> list[str]:
    """Names of the images that lie in a folder, by their suffix, sorted; files whose name begins with "." are none."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


@dataclass(frozen=True)
class ImageFiles:
    """Photographs on disk.

    Attributes:
        paths: one file per sample.
        on_unreadable: "fail" stops at a broken file, "skip" leaves it out, names and counts it.
    """

    paths: list[str]
    on_unreadable: str = "fail"

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: NDArray[Any]) -> ImageFiles:
        """The samples at ``indices``."""
        return replace(self, paths=[self.paths[index] for index in indices])


class Photographs(Dataset[tuple[Tensor | str, int]]):
    """Decodes one file: its evaluation form, or a random view if an augmentation is named."""

    def __init__(
        self,
        files: ImageFiles,
        preprocessing: Preprocessing,
        augmentation: str | None = None,
        seeds: tuple[int, int] = (0, 0),
    ) -> None:
        self.files, self.preprocessing = files, preprocessing
        self.augmentation, self.seeds = augmentation, seeds

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        try:
            image = self.preprocessing.open(self.files.paths[index])
        except UnreadableImage as error:
            return str(error), index
        if self.augmentation is None:
            return self.preprocessing.transform(image), index
        random = np.random.default_rng([*self.seeds, index])
        return augment(image, self.preprocessing, self.augmentation, random), index


def _collate(
    samples: list[tuple[Tensor | str, int]],
) -> tuple[Tensor, NDArray[np.int64], list[str]]:
    good = [(image, index) for image, index in samples if isinstance(image, Tensor)]
    bad = [image for image, _ in samples if isinstance(image, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, np.array([index for _, index in good], dtype=np.int64), bad


def file_loader(
    dataset: Photographs, chunks: list[NDArray[np.int64]], workers: int, on_unreadable: str
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """One batch for each chunk: decoded images, uint8 (n, channels, H, W), and the samples they are of, (n,).

    A chunk of which no file could be read gives an empty batch.

    Raises:
        UnreadableImage: a file is broken and ``on_unreadable`` is "fail".
    """
    loader = DataLoader(
        dataset,
        batch_sampler=[chunk.tolist() for chunk in chunks],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    skipped: Counter[str] = Counter()
    for images, indices, unreadable in loader:
        if unreadable and on_unreadable == "fail":
            raise UnreadableImage(f"{unreadable[0]}; {HOW_TO_GO_ON}")
        for message in unreadable:
            skipped[message] += 1
            logger.warning("left out: %s", message)
        yield images, indices
    if skipped:
        logger.warning("%d unreadable images were left out of %d", skipped.total(), len(dataset))
