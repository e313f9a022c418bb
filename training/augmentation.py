"""Random changes of training images; a pure function of the image and a random generator."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor

from openset.preprocessing import Preprocessing

AUGMENTATIONS = ("thesis", "modern")

_MODERN_AREA = (0.25, 1.0)
_MODERN_ASPECT = (3 / 4, 4 / 3)


def augment(
    image: Image.Image, preprocessing: Preprocessing, name: str, random: np.random.Generator
) -> Tensor:
    """A random view of a photograph, uint8 (channels, H, W).

    Args:
        image: in the model's mode, any size.
        preprocessing: gives crop size, resize and interpolation.
        name: "thesis" (resize, random crop, flip) or "modern" (random resized crop, flip).
        random: consumed in a fixed order, so that equal generators give equal views.
    """
    size = preprocessing.image_size
    if name == "thesis":
        image = preprocessing.resized(image)
        left = int(random.integers(0, image.width - size + 1))
        top = int(random.integers(0, image.height - size + 1))
        image = image.crop((left, top, left + size, top + size))
    elif name == "modern":
        image = image.resize(
            (size, size), Image.Resampling.BILINEAR, box=_random_box(image.size, random)
        )
    else:
        raise ValueError(f"augmentation must be one of {AUGMENTATIONS}, got {name!r}")
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return preprocessing.to_tensor(image)


def _random_box(
    size: tuple[int, int], random: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box of random area and aspect inside the image (Szegedy et al. 2015)."""
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(*_MODERN_AREA)
        aspect = math.exp(random.uniform(math.log(_MODERN_ASPECT[0]), math.log(_MODERN_ASPECT[1])))
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            left, top = random.uniform(0, width - box_width), random.uniform(0, height - box_height)
            return left, top, left + box_width, top + box_height
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
