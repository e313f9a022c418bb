"""Decoded photographs in memory: equally large windows of many images at once, and the views made of them.

The evaluation's crop and the crops of "thesis" are the very bytes that the on-line path gives. The boxes of "modern" are
drawn in the resized image instead of the original one, and resized by ``resample``.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openset.image_headers import UnreadableImage
from openset.preprocessing import Preprocessing
from training.augmentation import LONGEST_BOX, draw_view, resample
from training.files import HOW_TO_GO_ON

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

# What a ResNet-50 step of 256 images of 224 px in bfloat16 needs beside the cache, bytes.
DEVICE_RESERVE = 24 * 2**30


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """Images of any size, one behind another.

    Attributes:
        pixels: rows of columns of channels of each image, uint8 (bytes,), on the device or the host.
        offsets: first byte of each image, (N,).
        heights: rows of each image, (N,); 0 for a file that could not be read.
        widths: columns of each image, (N,).
        channels: 1 or 3.
        unreadable: image -> why it could not be read.
    """

    pixels: Tensor
    offsets: Integers
    heights: Integers
    widths: Integers
    channels: int
    unreadable: dict[int, str]

    def __len__(self) -> int:
        return len(self.offsets)

    def windows(
        self, rows: Integers, tops: Integers, lefts: Integers, height: int, width: int
    ) -> Tensor:
        """Equally large parts of images, uint8 (n, channels, height, width), where ``pixels`` are.

        Args:
            rows: which images, (n,).
            tops: first row of each window, (n,).
            lefts: first column of each window, (n,).
            height: of the windows; what they hold beyond an image's edge is undefined.
            width: likewise.
        """
        gather = self._by_slices if self.pixels.device.type == "cpu" else self._by_index
        return gather(rows, tops, lefts, height, width).permute(0, 3, 1, 2)

    def _by_slices(
        self, rows: Integers, tops: Integers, lefts: Integers, height: int, width: int
    ) -> Tensor:
        shape = (len(rows), height, width, self.channels)
        # Pinned where a GPU is there, so that the way to it is asynchronous.
        result = torch.zeros(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        target, source = result.numpy(), self.pixels.numpy()
        for number, (row, top, left) in enumerate(zip(rows, tops, lefts, strict=True)):
            image_shape = (int(self.heights[row]), int(self.widths[row]), self.channels)
            start = int(self.offsets[row])
            image = source[start : start + int(np.prod(image_shape))].reshape(image_shape)
            part = image[top : top + height, left : left + width]
            target[number, : part.shape[0], : part.shape[1]] = part
        return result

    def _by_index(
        self, rows: Integers, tops: Integers, lefts: Integers, height: int, width: int
    ) -> Tensor:
        device = self.pixels.device
        geometry = np.stack(
            [
                self.offsets[rows] // self.channels,
                self.heights[rows],
                self.widths[rows],
                tops,
                lefts,
            ]
        )
        starts, heights, widths, top, left = to_device(geometry, device)[:, :, None]
        y = (top + torch.arange(height, device=device)).minimum(heights - 1)
        x = (left + torch.arange(width, device=device)).minimum(widths - 1)
        index = (starts + y * widths)[:, :, None] + x[:, None, :]
        return self.pixels.view(-1, self.channels)[index]

    def on(self, device: torch.device) -> DecodedImages:
        """The same images where a GPU reads them fastest: its own memory, else pinned memory, else as they are."""
        if device.type != "cuda":
            return self
        size = self.pixels.numel()
        free = torch.cuda.mem_get_info(device)[0]
        # Every process of this machine pins a copy of its own.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        host = _available_host_memory() // 2 // processes
        place = residence(size, free - DEVICE_RESERVE, host)
        logger.info("decoded images: %.1f GB, kept in %s", size / 1e9, place)
        if place == "GPU memory":
            return replace(self, pixels=self.pixels.to(device))
        return replace(self, pixels=self.pixels.pin_memory()) if place == "pinned memory" else self


def residence(size: int, device_bytes: int, host_bytes: int) -> str:
    """Where ``size`` bytes of images go, given what is free beside the network and on the host."""
    if size <= device_bytes:
        return "GPU memory"
    return "pinned memory" if size <= host_bytes else "the memory map"


def _available_host_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small array on the device, without making the host wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True, eq=False)
class CachedImages:
    """Samples whose images are decoded.

    Attributes:
        decoded: the images of a whole tree.
        rows: image of each sample, (N,).
        on_unreadable: "fail" stops at a file that could not be read, "skip" leaves it out, names and counts it.
    """

    decoded: DecodedImages
    rows: Integers
    on_unreadable: str = "fail"

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: NDArray[Any]) -> CachedImages:
        """The samples at ``indices``."""
        return replace(self, rows=self.rows[indices])

    def readable(self, indices: Integers) -> Integers:
        """Those of ``indices`` whose files could be read; what is left out is named.

        Raises:
            UnreadableImage: one could not, and ``on_unreadable`` is "fail".
        """
        missing = self.decoded.heights[self.rows[indices]] == 0
        for index in indices[missing]:
            message = self.decoded.unreadable[int(self.rows[index])]
            if self.on_unreadable == "fail":
                raise UnreadableImage(f"{message}; {HOW_TO_GO_ON}")
            logger.warning("left out: %s", message)
        readable: Integers = indices[~missing]
        return readable

    def evaluation_form(self, indices: Integers, preprocessing: Preprocessing) -> Tensor:
        """What ``preprocessing.transform`` gives of each file, bit for bit, uint8 (n, channels, H, W)."""
        rows, size = self.rows[indices], preprocessing.image_size
        # numpy rounds halves to even as ``round`` does there.
        lefts = np.rint((self.decoded.widths[rows] - size) / 2.0).astype(np.int64)
        tops = np.rint((self.decoded.heights[rows] - size) / 2.0).astype(np.int64)
        return self.decoded.windows(rows, tops, lefts, size, size)

    def views(
        self,
        indices: Integers,
        preprocessing: Preprocessing,
        augmentation: str,
        seeds: tuple[int, int],
        device: torch.device,
    ) -> Tensor:
        """A random view of each sample, uint8 (n, channels, H, W) on ``device``.

        Each is a function of (seed, epoch, sample) alone.
        """
        rows, size = self.rows[indices], preprocessing.image_size
        heights, widths = self.decoded.heights[rows], self.decoded.widths[rows]
        drawn = np.array(
            [
                draw_view(augmentation, int(w), int(h), size, np.random.default_rng([*seeds, i]))
                for w, h, i in zip(widths, heights, indices, strict=True)
            ]
        ).T
        boxes, flipped = drawn[:4], to_device(drawn[4] > 0, device)
        if augmentation == "thesis":
            lefts, tops = boxes[:2].astype(np.int64)
            images = self.decoded.windows(rows, tops, lefts, size, size)
            images = images.to(device, non_blocking=True)
        else:
            # As wide as any window may become, so that a sample's view does not depend on its neighbours.
            longest = LONGEST_BOX * preprocessing.resize
            side = int(np.ceil(longest + 2 * max(1.0, longest / size) + 2))
            reach = np.maximum(1.0, (boxes[2:] - boxes[:2]) / size)
            lefts, tops = np.floor(np.maximum(boxes[:2] - reach, 0.0)).astype(np.int64)
            windows = self.decoded.windows(rows, tops, lefts, side, side)
            corner = np.stack([lefts, tops, lefts, tops])
            images = resample(
                windows.to(device, non_blocking=True),
                to_device(boxes - corner, device),
                to_device(np.stack([widths - lefts, heights - tops]), device),
                size,
            )
        return torch.where(flipped[:, None, None, None], images.flip(3), images)
