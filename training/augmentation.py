"""Random views of training images; a pure function of the image's size and a random generator."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openset.labels import is_negative
from openset.preprocessing import Preprocessing

AUGMENTATIONS = ("thesis", "modern")

_MODERN_AREA = (0.25, 1.0)
_MODERN_ASPECT = (3 / 4, 4 / 3)
# A stream of random numbers of its own, beside the order of the epoch.
_TURNS = 1
# No box of "modern" is longer than this many short sides of its image.
LONGEST_BOX = _MODERN_ASPECT[1]


Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels


class View(NamedTuple):
    """The box of an image that is shown, in its pixels, and whether left and right are swapped."""

    left: float
    top: float
    right: float
    bottom: float
    flipped: bool

    @property
    def box(self) -> Box:
        """Left, top, right and bottom."""
        return self[:4]


def draw_view(
    name: str, width: int, height: int, image_size: int, random: np.random.Generator
) -> View:
    """Draw a view.

    Args:
        name: "thesis" (random crop of ``image_size``, flip) or "modern" (random box to be resized, flip).
        width: of the image, pixels; for "thesis" after the evaluation's resize.
        height: likewise.
        image_size: side of the model's input, pixels.
        random: consumed in a fixed order, so that equal generators give equal views.
    """
    if name == "thesis":
        left = int(random.integers(0, width - image_size + 1))
        top = int(random.integers(0, height - image_size + 1))
        box: Box = (left, top, left + image_size, top + image_size)
    elif name == "modern":
        box = _random_box(width, height, random)
    else:
        raise ValueError(f"augmentation must be one of {AUGMENTATIONS}, got {name!r}")
    return View(*box, bool(random.random() < 0.5))


def augment(
    image: Image.Image, preprocessing: Preprocessing, name: str, random: np.random.Generator
) -> Tensor:
    """A random view of a decoded photograph, uint8 (channels, H, W); see ``draw_view``."""
    size = preprocessing.image_size
    if name == "thesis":
        image = preprocessing.resized(image)
    view = draw_view(name, image.width, image.height, size, random)
    image = (
        image.crop(view.box)
        if name == "thesis"
        else image.resize((size, size), Image.Resampling.BILINEAR, box=view.box)
    )
    if view.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return preprocessing.to_tensor(image)


class TurnedNegatives:
    """Turns and mirrors some negative characters, which makes foreign shapes of more kinds than there are letters.

    Each of the seven ways in which a square falls on itself is as likely. A mirrored E may look like a 3: a few knowns are
    lost for it. What becomes of a sample is a function of (seed, epoch, sample) alone.

    Args:
        labels: of the training part, (n,).
        seed: of the run.
        epoch: from 0.
        share: of the negatives that are changed.
        device: of the images.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        *,
        seed: int,
        epoch: int,
        share: float,
        device: torch.device,
    ) -> None:
        self._labels, self._seed, self._share = labels, seed, share
        # One way for each sample: bits for swapped axes, upside down and mirrored.
        self._ways = torch.zeros(len(labels), dtype=torch.uint8, device=device)
        self.start_epoch(epoch)

    def start_epoch(self, epoch: int) -> None:
        """Draw anew, into the same memory: a recorded step goes on reading there."""
        random = np.random.default_rng([self._seed, epoch, _TURNS])
        chosen = is_negative(self._labels) & (random.random(len(self._labels)) < self._share)
        ways = random.integers(1, 8, len(self._labels)) * chosen
        self._ways.copy_(torch.from_numpy(ways.astype(np.uint8)))

    def __call__(self, images: Tensor, samples: Tensor) -> Tensor:
        """Square images (m, channels, H, H), and which samples they are, (m,) -> the images as they are shown."""
        return turned(images, self._ways.index_select(0, samples))


def turned(images: Tensor, ways: Tensor) -> Tensor:
    """Square images (m, channels, H, H), each as its way says, (m,): bits for swapped axes (4), upside down (2), mirrored (1)."""
    ways = ways[:, None, None, None]
    images = torch.where((ways & 4) != 0, images.transpose(2, 3), images)
    images = torch.where((ways & 2) != 0, images.flip(2), images)
    return torch.where((ways & 1) != 0, images.flip(3), images)


def _random_box(width: int, height: int, random: np.random.Generator) -> Box:
    """A box of random area and aspect inside the image (Szegedy et al. 2015)."""
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


def resample(windows: Tensor, boxes: Tensor, limits: Tensor, size: int) -> Tensor:
    """Resize a box of each image to a square: Pillow's antialiased bilinear kernel as two batched matrix products.

    Agrees with ``Image.resize(..., BILINEAR, box=...)`` up to one level in places, where the weights' rounding differs.

    Args:
        windows: uint8 (n, channels, H, W).
        boxes: left, top, right, bottom within the windows, pixels, float64 (4, n).
        limits: columns and rows of each window that belong to the image, (2, n).
        size: of the square, pixels.

    Returns:
        uint8 (n, channels, size, size).
    """
    left, top, right, bottom = boxes
    across = _kernel(left, right, limits[0], windows.shape[3], size)
    down = _kernel(top, bottom, limits[1], windows.shape[2], size)
    # Pillow keeps bytes between the passes too.
    rows = _to_bytes(windows.float() @ across.transpose(1, 2)[:, None])
    return _to_bytes(down[:, None] @ rows).to(torch.uint8)


def _kernel(start: Tensor, end: Tensor, limit: Tensor, length: int, size: int) -> Tensor:
    """Share of each input pixel in each output pixel along one axis, (n, size, length) float32."""
    scale = ((end - start) / size)[:, None, None]
    reach = scale.clamp(min=1.0)
    outputs = torch.arange(size, device=start.device, dtype=start.dtype)[None, :, None]
    inputs = torch.arange(length, device=start.device, dtype=start.dtype)[None, None, :]
    centers = start[:, None, None] + (outputs + 0.5) * scale
    weights = (1.0 - ((inputs + 0.5 - centers) / reach).abs()).clamp(min=0.0)
    weights = weights * (inputs < limit[:, None, None])
    return (weights / weights.sum(dim=2, keepdim=True)).float()


def _to_bytes(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0.0, 255.0)
