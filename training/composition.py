"""Negatives made of known characters, in the places of foreign ones: what a model reaches that is shown few of these or none.

What is done to knowns keeps their strokes and mostly takes away their class, as in negative data augmentation (Sinha et al.,
ICLR 2021). Some still look like a digit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openset.labels import is_known, is_negative
from training.augmentation import turned
from training.data import Split

# In the seed beside the run's. The order of epoch 2 is drawn from the same stream, for quite other ends.
_COMPOSED = 2
# Digits that are sure to remain digits: whatever is done to them, upside down, by a half turn.
_SYMMETRIC = ("0", "1", "8")
_UPSIDE_DOWN = ("3",)
_HALF_TURN = ("6", "9")
# Where two characters meet, and how far one is blotted out: shares of the image's side.
_MIDDLE = (0.4, 0.65)
_BLOT = (0.36, 0.68)
# How far two characters that lie on each other are apart, share of the side along each axis.
_APART = 0.11


def with_composed_negatives(split: Split, share: float, seed: int, *, turn: bool = True) -> Split:
    """The same samples, some negatives of which show what was made of the split's own knowns.

    One of four things, as likely each: a known turned or mirrored (but 0, 1, 8, an upside-down 3, a half-turned 6 or 9); the
    halves of two of different classes; two of different classes on each other; a known with a third to two thirds of the
    image blotted out. Labels, groups and identifiers stay, so that a composed negative counts for the class in whose place it
    stands. They are made once, and are the same in every epoch.

    Args:
        split: characters, light on dark, uint8 (N, 1, H, H); its images are left as they are.
        share: of the negatives, 0..1; at 1 no foreign image is left.
        seed: of the choice; equal ones give equal images.
        turn: whether knowns are turned; not where negatives are turned afterwards, which would set some upright again.

    Raises:
        ValueError: knowns of one class alone, of which no two can be put together.
    """
    negatives = np.flatnonzero(is_negative(split.labels))
    random = np.random.default_rng([seed, _COMPOSED])
    chosen = negatives[random.random(len(negatives)) < share]
    if not len(chosen):
        return split
    assert isinstance(split.images, Tensor)
    known = np.flatnonzero(is_known(split.labels))
    if len(np.unique(split.labels[known])) < 2:
        raise ValueError(
            "negatives are composed of knowns of two classes, and this part holds fewer"
        )
    kinds = random.integers(0 if turn else 1, 4, size=len(chosen))
    first, second = _of_two_classes(split.labels, known, len(chosen), random)
    turnable = known[~np.isin(split.groups[known], _SYMMETRIC)]
    if len(turnable):
        first = np.where(kinds == 0, random.choice(turnable, len(chosen)), first)
    else:
        kinds[kinds == 0] = 1
    images = split.images.clone()
    for kind in range(4):
        rows = kinds == kind
        one, other = (_at(split.images, samples[rows]) for samples in (first, second))
        if kind == 0:
            made = _turned(one, split.groups[first[rows]], random)
        elif kind == 1:
            made = _halves(one, other, random)
        elif kind == 2:
            made = _overlaid(one, other, random)
        else:
            made = _blotted(one, random)
        images[torch.as_tensor(chosen[rows], device=images.device)] = made
    return replace(split, images=images)


def _at(images: Tensor, samples: NDArray[np.int64]) -> Tensor:
    return images[torch.as_tensor(samples, device=images.device)]


def _of_two_classes(
    labels: NDArray[np.int64], known: NDArray[np.int64], count: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random pairs of knowns whose classes differ, two times (count,)."""
    first, second = random.choice(known, count), random.choice(known, count)
    while (same := labels[first] == labels[second]).any():
        second[same] = random.choice(known, int(same.sum()))
    return first, second


def _turned(images: Tensor, digits: NDArray[np.str_], random: np.random.Generator) -> Tensor:
    """Each in one of the ways of ``training.augmentation.turned`` that leave no digit for sure."""
    ways = random.integers(1, 8, len(images))
    while (
        same := (np.isin(digits, _UPSIDE_DOWN) & (ways == 2))
        | (np.isin(digits, _HALF_TURN) & (ways == 3))
    ).any():
        ways[same] = random.integers(1, 8, int(same.sum()))
    return turned(images, torch.as_tensor(ways, device=images.device))


def _halves(one: Tensor, other: Tensor, random: np.random.Generator) -> Tensor:
    """The upper or left half of one beside the rest of the other."""
    side = one.shape[-1]
    cut = _column(side * random.uniform(*_MIDDLE, len(one)), one)
    return torch.where(_places(one, random.random(len(one)) < 0.5) < cut, one, other)


def _overlaid(one: Tensor, other: Tensor, random: np.random.Generator) -> Tensor:
    """Both on one image, somewhat apart."""
    side = one.shape[-1]
    most = round(_APART * side)
    steps = np.arange(side)
    rows, columns = (
        torch.as_tensor(
            steps[None] - random.integers(-most, most + 1, (len(one), 1)), device=one.device
        )
        for _ in range(2)
    )
    inside = ((rows >= 0) & (rows < side))[:, None, :, None] & ((columns >= 0) & (columns < side))[
        :, None, None, :
    ]
    sample = torch.arange(len(one), device=one.device)[:, None, None]
    moved = other[
        sample, 0, rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]
    ][:, None]
    return torch.maximum(one, torch.where(inside, moved, 0).to(one.dtype))


def _blotted(images: Tensor, random: np.random.Generator) -> Tensor:
    """One side dark."""
    side = images.shape[-1]
    depth = _column(side * random.uniform(*_BLOT, len(images)), images)
    places = _places(images, random.random(len(images)) < 0.5)
    from_end = _column(random.random(len(images)) < 0.5, images)
    return torch.where(torch.where(from_end, side - 1 - places, places) < depth, 0, images)


def _places(images: Tensor, along_height: NDArray[np.bool_]) -> Tensor:
    """Each pixel's row where that is asked for, else its column: (n, 1, H, H)."""
    steps = torch.arange(images.shape[-1], device=images.device)
    return torch.where(_column(along_height, images), steps[:, None], steps[None])


def _column(values: NDArray[np.generic], images: Tensor) -> Tensor:
    """One value for each image, (n, 1, 1, 1)."""
    return torch.as_tensor(values, device=images.device)[:, None, None, None]
