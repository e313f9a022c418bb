"""Data of a protocol: three parts with labels and groups, and the batches of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openset.labels import NEGATIVE, UNKNOWN, is_known
from openset.preprocessing import Preprocessing
from training.decoded import CachedImages, DecodedImages
from training.files import ImageFiles, Photographs, file_loader

PARTS = ("train", "validation", "test")

SCORE_SELECTION_SHARE = 0.2
CHECKPOINT_SELECTION_SHARE = 0.5
_VALIDATION_SPLIT_SEED = 20231
_SUBSET_SEED = 20234


class MissingClasses(ValueError):
    """The data set lacks classes of the protocol."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a protocol.

    Attributes:
        images: uint8 (N, channels, H, W) in evaluation form, or photographs decoded before, or files.
        labels: 0..C-1, NEGATIVE or UNKNOWN, (N,) int64.
        groups: class identifier of each sample, (N,) str.
        sample_ids: (N,) str.
    """

    images: Tensor | CachedImages | ImageFiles
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    sample_ids: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: NDArray[Any]) -> Split:
        """The samples at ``indices``, in that order."""
        images = self.images
        chosen = (
            images[torch.as_tensor(indices)] if isinstance(images, Tensor) else images.take(indices)
        )
        return Split(chosen, self.labels[indices], self.groups[indices], self.sample_ids[indices])

    def counts(self) -> dict[str, int]:
        """How many samples each group of labels holds."""
        return {
            "known": int(is_known(self.labels).sum()),
            "negative": int((self.labels == NEGATIVE).sum()),
            "unknown": int((self.labels == UNKNOWN).sum()),
        }

    def batches(
        self, batch_size: int, preprocessing: Preprocessing, *, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """All samples in order: uint8 images in evaluation form, labels (n,), indices (n,)."""
        order = np.arange(len(self))
        chunks = [order[start : start + batch_size] for start in range(0, len(self), batch_size)]
        if isinstance(self.images, Tensor):
            for chunk in chunks:
                part = slice(chunk[0], chunk[-1] + 1)
                yield self.images[part], torch.from_numpy(self.labels[part]), chunk
            return
        if isinstance(self.images, CachedImages):
            for chunk in chunks:
                readable = self.images.readable(chunk)
                if len(readable):
                    images = self.images.evaluation_form(readable, preprocessing)
                    yield images, torch.from_numpy(self.labels[readable]), readable
            return
        loader = file_loader(
            Photographs(self.images, preprocessing), chunks, workers, self.images.on_unreadable
        )
        for images, indices in loader:
            if len(indices):
                yield images, torch.from_numpy(self.labels[indices]), indices


@dataclass(frozen=True, eq=False)
class ProtocolData:
    """A protocol's data, ready for training and evaluation.

    Attributes:
        name: of the protocol.
        class_ids: known classes that are present, index = label.
        class_names: for people.
        preprocessing: evaluation transform.
        train: knowns and negatives.
        validation: knowns and negatives.
        test: knowns, negatives and unknowns.
        notes: what a reader of any result must be told.
        counts: samples by part and group.
    """

    name: str
    class_ids: list[str]
    class_names: list[str]
    preprocessing: Preprocessing
    train: Split
    validation: Split
    test: Split
    notes: list[str]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def load_protocol(
    name: str,
    *,
    data: Path | None = None,
    digits: str = "emnist",
    seed: int = 4242,
    allow_missing_classes: bool = False,
    image_size: int | None = None,
    on_unreadable: str = "fail",
    download: bool = False,
    size: str = "full",
    cache_dir: Path = Path(".cache"),
    image_cache: Path | None = None,
    parts: Sequence[str] = PARTS,
) -> ProtocolData:
    """Load a protocol.

    Args:
        name: entry of ``training.protocols.PROTOCOLS``.
        data: root of EMNIST (toy), of an ImageNet tree (p1-p3) or of own classes (folders); not used by glyphs.
        digits: "emnist" or "mnist", the toy protocol's knowns.
        seed: of the split into training and validation (folders: and test); 4242 gives the published files of p1-p3.
        allow_missing_classes: restrict p1-p3 to the classes that are there, and say so.
        image_size: side of the model's input for p1-p3 and folders; default 224.
        on_unreadable: "fail" or "skip".
        download: let torchvision fetch EMNIST or MNIST into ``data``.
        size: "full" or "small", of glyphs.
        cache_dir: where rendered glyphs are kept.
        image_cache: where photographs are kept decoded (``training.cache``); None reads the files every time.
        parts: what to load; parts left out are empty.

    Raises:
        MissingClasses: classes are missing and that was not allowed.
        FileNotFoundError: the data set is not there; says where it was looked for.
        ValueError: an option out of range.
    """
    # Imported here: the readers need Split, and each protocol needs one of them only.
    from training import characters, folders, glyphs, imagenet
    from training.protocols import FOLDERS, get_protocol

    protocol = get_protocol(name)
    if on_unreadable not in ("fail", "skip"):
        raise ValueError(f'on_unreadable must be "fail" or "skip", got {on_unreadable!r}')
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts must be among {PARTS}, got {sorted(unknown)}")
    if name == "glyphs":
        loaded = glyphs.load(protocol, size=size, seed=seed, cache_dir=cache_dir)
    elif protocol.is_of_characters:
        loaded = characters.load(protocol, data=data, digits=digits, seed=seed, download=download)
    elif protocol.kind == FOLDERS:
        loaded = folders.load(
            data=data, seed=seed, image_size=image_size or 224, on_unreadable=on_unreadable
        )
    else:
        loaded = imagenet.load(
            protocol,
            data=data,
            seed=seed,
            allow_missing_classes=allow_missing_classes,
            image_size=image_size or 224,
            on_unreadable=on_unreadable,
        )
    if not protocol.is_of_characters and image_cache is not None and data is not None:
        loaded = _decoded_once(loaded, image_cache, data, parts)
    counts = {part: getattr(loaded, part).counts() for part in PARTS}
    empty = {
        part: getattr(loaded, part).subset(np.arange(0)) for part in PARTS if part not in parts
    }
    return replace(loaded, counts=counts, **empty)


def _decoded_once(
    loaded: ProtocolData, folder: Path, root: Path, parts: Sequence[str]
) -> ProtocolData:
    """Photographs from the cache; one cache holds all files of a tree, however they are split."""
    from training.cache import open_cache

    for tree in (("train", "validation"), ("test",)):
        files = {part: getattr(loaded, part).images for part in tree}
        if not set(tree) & set(parts):
            continue
        paths = sorted(path for images in files.values() for path in images.paths)
        on_unreadable = files[tree[0]].on_unreadable
        decoded = open_cache(
            folder,
            paths,
            root=root,
            preprocessing=loaded.preprocessing,
            on_unreadable=on_unreadable,
        )
        row_of = {path: row for row, path in enumerate(paths)}
        for part, images in files.items():
            rows = np.array([row_of[path] for path in images.paths], dtype=np.int64)
            cached = CachedImages(decoded, rows, on_unreadable)
            loaded = replace(loaded, **{part: replace(getattr(loaded, part), images=cached)})
    return loaded


def on_device(splits: Sequence[Split], device: torch.device) -> list[Split]:
    """The same samples with their images where the device reads them fastest; files stay files.

    Decoded images that splits share are moved once.
    """
    moved: dict[int, DecodedImages] = {}
    placed = []
    for split in splits:
        images = split.images
        if isinstance(images, Tensor):
            images = images.to(device)
        elif isinstance(images, CachedImages):
            key = id(images.decoded)
            if key not in moved:
                moved[key] = images.decoded.on(device)
            images = replace(images, decoded=moved[key])
        placed.append(replace(split, images=images))
    return placed


def at_most(split: Split, per_class: int | None) -> Split:
    """A fixed random choice of at most ``per_class`` samples of every class; all of them for None."""
    if per_class is None:
        return split
    random = np.random.default_rng(_SUBSET_SEED)
    chosen = [
        random.permutation(np.flatnonzero(split.groups == group))[:per_class]
        for group in np.unique(split.groups)
    ]
    return split.subset(np.sort(np.concatenate(chosen)))


def stratified_split(
    groups: NDArray[Any], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of a random ``share`` of every group, and of the rest; both ascending."""
    random = np.random.default_rng(seed)
    first = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        first.append(random.permutation(members)[: round(share * len(members))])
    chosen = np.zeros(len(groups), dtype=bool)
    chosen[np.concatenate(first)] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


@dataclass(frozen=True)
class ValidationParts:
    """Indices into the validation part; disjoint."""

    selection: NDArray[np.int64]
    verification: NDArray[np.int64]
    calibration: NDArray[np.int64]

    def within(self, kept: NDArray[np.str_], of: NDArray[np.str_]) -> ValidationParts:
        """The same parts as indices into ``kept``, the sample ids that are left of ``of`` (unreadable ones are not)."""
        return ValidationParts(
            *(
                np.flatnonzero(np.isin(kept, of[part]))
                for part in (self.selection, self.verification, self.calibration)
            )
        )


def split_validation(
    groups: NDArray[np.str_], *, verify_share: float, best: bool
) -> ValidationParts:
    """Who selects, who verifies, who calibrates; stratified by class and fixed for all runs.

    The selection part of ``best=False`` is not used by training: only export chooses the score type with it.

    Args:
        groups: class of each validation sample, (N,).
        verify_share: share of the rest after selection that is kept out of the calibration.
        best: the checkpoint is chosen among the epochs by validation confidence; that choice and the score's share one
            half of the data, the other half is never looked at before calibration (science reference, section 9).
    """
    share = CHECKPOINT_SELECTION_SHARE if best else SCORE_SELECTION_SHARE
    selection, rest = stratified_split(groups, share, _VALIDATION_SPLIT_SEED)
    verification, calibration = stratified_split(
        groups[rest], verify_share, _VALIDATION_SPLIT_SEED + 1
    )
    return ValidationParts(selection, rest[verification], rest[calibration])


def batch_count(split: Split, batch_size: int) -> int:
    """How many batches ``Split.batches`` yields."""
    return math.ceil(len(split) / batch_size)
