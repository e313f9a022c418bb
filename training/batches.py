"""The batches of an epoch: shuffled, augmented, and dealt out to the processes of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openset.labels import is_known
from openset.preprocessing import Preprocessing
from training.augmentation import TurnedNegatives
from training.data import Split
from training.decoded import CachedImages, to_device
from training.files import Photographs, file_loader

_AHEAD = 2  # batches


@dataclass(frozen=True)
class Share:
    """What one process of ``count`` takes of every batch: samples rank, rank + count, rank + 2 count, ..."""

    rank: int = 0
    count: int = 1

    def of(self, chunk: NDArray[Any]) -> NDArray[Any]:
        """This process' part; never empty: a process that would stand idle repeats the first sample (see ``gather_rows``)."""
        own = chunk[self.rank :: self.count]
        return own if len(own) else chunk[:1]


ALONE = Share()
CPU = torch.device("cpu")


def epoch_order(
    split: Split, *, seed: int, epoch: int, include_negatives: bool = True
) -> NDArray[np.int64]:
    """Indices of an epoch's samples in the order they are shown, (n,); arguments as of ``training_loader``."""
    candidates = (
        np.arange(len(split)) if include_negatives else np.flatnonzero(is_known(split.labels))
    )
    order: NDArray[np.int64] = np.random.default_rng([seed, epoch]).permutation(candidates)
    return order


def training_loader(
    split: Split,
    *,
    preprocessing: Preprocessing,
    augmentation: str,
    batch_size: int,
    seed: int,
    epoch: int,
    workers: int = 0,
    include_negatives: bool = True,
    skip_batches: int = 0,
    device: torch.device = CPU,
    share: Share = ALONE,
    turned_negatives: float = 0.0,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Shuffled batches of one epoch; the last may be smaller.

    Order and augmentation are a function of (seed, epoch, sample) alone: a resumed run, or one with another number of
    workers or processes, sees the same data. Of characters only negatives are augmented.

    Args:
        split: the training part, its images where ``on_device`` puts them.
        preprocessing: the evaluation's.
        augmentation: of photographs, see ``training.augmentation``.
        batch_size: of all processes together.
        seed: of order and augmentation.
        epoch: from 0.
        workers: processes that decode files.
        include_negatives: whether samples without a class are shown.
        skip_batches: how many were done before.
        device: of the labels, and of the images unless they are files.
        share: which samples of each batch this process takes.
        turned_negatives: share of negative characters that are turned or mirrored.

    Yields:
        Images of this process, uint8 (m, channels, H, W), and labels of the whole batch, (n,) int64; both are empty where
        none of the batch's files could be read, so that batches can be counted.
    """
    order = epoch_order(split, seed=seed, epoch=epoch, include_negatives=include_negatives)
    starts = range(skip_batches * batch_size, len(order), batch_size)
    chunks = [order[start : start + batch_size] for start in starts]
    labels = torch.from_numpy(split.labels).to(device)
    if isinstance(split.images, Tensor):
        # The whole order goes to the device at once: a batch then costs no transfer at all.
        ordered = torch.from_numpy(order).to(device)
        turned = (
            TurnedNegatives(
                split.labels, seed=seed, epoch=epoch, share=turned_negatives, device=device
            )
            if turned_negatives
            else None
        )
        for start in starts:
            chosen = ordered[start : start + batch_size]
            own = chosen[share.rank :: share.count] if len(chosen) > share.rank else chosen[:1]
            images = split.images[own]
            yield images if turned is None else turned(images, own), labels[chosen]
    elif isinstance(split.images, CachedImages):
        made = _from_cache(
            split.images, chunks, labels, preprocessing, augmentation, (seed, epoch), share
        )
        yield from _ahead(made, device)
    else:
        if share.count > 1 and split.images.on_unreadable == "skip":
            raise ValueError(
                "several processes cannot leave out unreadable files on the way, since each knows of its own alone; "
                "repair the files, or decode them once (CACHE=<folder>)"
            )
        photographs = Photographs(split.images, preprocessing, augmentation, (seed, epoch))
        own_chunks = [share.of(chunk) for chunk in chunks]
        loaded = file_loader(photographs, own_chunks, workers, split.images.on_unreadable)
        if share.count > 1:
            for (images, _), chunk in zip(loaded, chunks, strict=True):
                yield images, labels[to_device(chunk, device)]
            return
        for images, indices in loaded:
            yield images, labels[to_device(indices, device)]


def _from_cache(
    images: CachedImages,
    chunks: list[NDArray[np.int64]],
    labels: Tensor,
    preprocessing: Preprocessing,
    augmentation: str,
    seeds: tuple[int, int],
    share: Share,
) -> Iterator[tuple[Tensor, Tensor]]:
    for chunk in chunks:
        readable = images.readable(chunk)
        if not len(readable):
            yield torch.empty(0, dtype=torch.uint8), labels[:0]
            continue
        own = share.of(readable)
        views = images.views(own, preprocessing, augmentation, seeds, labels.device)
        yield views, labels[to_device(readable, labels.device)]


def _ahead(
    batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, made by a thread while earlier ones are trained on."""

    def start() -> None:
        # A property of each thread, which starts with GPU 0; "cuda" without a number is that one, and torch refuses it here.
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, initializer=start) as thread:
        waiting = [thread.submit(next, batches, None) for _ in range(_AHEAD)]
        while (batch := waiting.pop(0).result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch
