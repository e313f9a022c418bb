"""One transform for evaluation, calibration and serving: from any upload to the image the model was taught on."""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from openset.image_headers import (
    FORMATS,
    MAX_EXIF_BYTES,
    MAX_PIXELS,
    ImageFacts,
    UnreadableImage,
    read_header,
)

# Longer images lose their ends before they are resized.
MAX_ASPECT = 16

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def _open(data: bytes | bytearray) -> tuple[Image.Image, ImageFacts]:
    facts = read_header(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"the image declares too many pixels (at most {MAX_PIXELS})"
        ) from error
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise UnreadableImage(f"the image header is broken ({type(error).__name__})") from error
    if image.size != (facts.width, facts.height):
        raise UnreadableImage("the image header is broken: it states two sizes")
    _require_little_exif(image)
    return image, facts


def _require_little_exif(image: Image.Image) -> None:
    """Pillow reads EXIF data only when asked for it: here it is bytes, or the hexadecimal text that ImageMagick puts in a PNG."""
    exif, text = image.info.get("exif", b""), image.info.get("Raw profile type exif", "")
    digits = "".join(
        text.split("\n")[3:]
    )  # as Pillow reads it: behind an empty line, a name and a length
    if len(exif) > MAX_EXIF_BYTES or len(digits) > 2 * MAX_EXIF_BYTES:
        raise UnreadableImage(f"the image has more than {MAX_EXIF_BYTES} bytes of EXIF data")


_STRIP_PIXELS = 1_000_000


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; strip by strip, since three RGBA copies of a large image would be four times its decoded size."""
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        background = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(background, strip).convert("RGB"), (0, top))
    return result


def _upper_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey, its transparent value white. Pillow's own conversion clips at 255 instead."""
    array = np.asarray(image)
    grey = (array >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[array == transparent] = 255
    return Image.fromarray(grey)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Transparency on white, every stored mode to "L" or "RGB"."""
    if image.mode == "I;16":
        image = _upper_byte(image)
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    return image if image.mode == mode else image.convert(mode)


@dataclass(frozen=True)
class Preprocessing:
    """How any image becomes the model's input.

    Attributes:
        mode: "L" (grey) or "RGB".
        image_size: side of the square center crop, pixels.
        resize: length of the short side before the crop, pixels.
        interpolation: "nearest", "bilinear" or "bicubic" (antialiased, Pillow's kernels).
        mean: per channel, subtracted after scaling to [0, 1]; None for the thesis' preset.
        std: per channel, divided by.
        polarity: "light_on_dark" for characters: what the page must draw; None where it has no meaning.
    """

    mode: str
    image_size: int
    resize: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    polarity: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("L", "RGB"):
            raise ValueError(f'preprocessing mode must be "L" or "RGB", got {self.mode!r}')
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {sorted(_INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        if not 0 < self.image_size <= self.resize:
            raise ValueError(
                f"need 0 < image_size <= resize, got {self.image_size} and {self.resize}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both or neither")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                if len(values) != self.channels:
                    raise ValueError(
                        f"{name} must have {self.channels} values for mode {self.mode}, got {len(values)}"
                    )
                object.__setattr__(self, name, tuple(float(value) for value in values))

    @property
    def channels(self) -> int:
        """1 for "L", 3 for "RGB"."""
        return 1 if self.mode == "L" else 3

    def decode(self, data: bytes) -> Image.Image:
        """Decode an upload to a PIL image of ``mode``: EXIF orientation applied, alpha on white, first frame only.

        Raises:
            UnreadableImage: empty, another format, too large, truncated or broken.
        """
        return self.decode_with_facts(data)[0]

    def decode_with_facts(self, data: bytes | bytearray) -> tuple[Image.Image, ImageFacts]:
        """``decode``, and what was sent.

        Raises:
            UnreadableImage: see ``decode``.
            MemoryError: a sound image may be too large for what is free now.
        """
        image, facts = _open(data)
        try:
            image.load()
            _require_little_exif(image)  # again: in a PNG it may stand behind the pixels
            image = _upright(image)
            return _to_mode(image, self.mode), facts
        except (MemoryError, UnreadableImage):
            raise
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise UnreadableImage(
                f"the image does not decode ({type(error).__name__}: {error})"
            ) from error

    def open(self, path: Path | str) -> Image.Image:
        """Decode an image file; the same rules as for an upload."""
        try:
            return self.decode(Path(path).read_bytes())
        except UnreadableImage as error:
            raise UnreadableImage(f"{os.fspath(path)}: {error}") from error

    def transform(self, image: Image.Image) -> Tensor:
        """Short side to ``resize``, center crop to ``image_size``: PIL image -> uint8 (channels, H, W)."""
        image = self.resized(image)
        # torchvision's rounding, so that both give the same crop.
        left = round((image.width - self.image_size) / 2.0)
        top = round((image.height - self.image_size) / 2.0)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return self.to_tensor(image)

    def resized(self, image: Image.Image) -> Image.Image:
        """Short side to ``resize``, as torchvision's ``Resize`` does it on PIL images."""
        width, height = image.size
        short = min(width, height)
        if max(width, height) > MAX_ASPECT * short:
            # The crop keeps the middle alone; a 1x30000 image must not become a 28x840000 one on the way.
            half_width, half_height = (
                min(width, MAX_ASPECT * short) / 2,
                min(height, MAX_ASPECT * short) / 2,
            )
            left, top = int(width / 2 - half_width), int(height / 2 - half_height)
            image = image.crop((left, top, left + int(2 * half_width), top + int(2 * half_height)))
            width, height = image.size
        size = (
            (self.resize, int(self.resize * height / width))
            if width <= height
            else (int(self.resize * width / height), self.resize)
        )
        return (
            image if size == image.size else image.resize(size, _INTERPOLATIONS[self.interpolation])
        )

    def to_tensor(self, image: Image.Image) -> Tensor:
        """PIL image of ``mode`` -> uint8 (channels, H, W), no resizing."""
        array = np.asarray(image)
        planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return torch.from_numpy(planes.copy())

    def from_array(self, array: NDArray[np.uint8]) -> Tensor:
        """The same transform for pixels that are in memory: uint8 (H, W) or (H, W, 3) -> uint8 (channels, H, W)."""
        return self.transform(_to_mode(Image.fromarray(array), self.mode))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (N, channels, H, W) -> float32 in [0, 1], then mean and std where the model has them."""
        floats = images.float().div_(255.0)
        if self.mean is None or self.std is None:
            return floats
        mean = floats.new_tensor(self.mean)[None, :, None, None]
        std = floats.new_tensor(self.std)[None, :, None, None]
        return (floats - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the model card."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Preprocessing:
        """Read back what ``to_dict`` wrote (lists become tuples)."""
        values = dict(content)
        for name in ("mean", "std"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    def identity(self) -> str:
        """Names the transform and the libraries that carry it out; scores of another identity are not comparable."""
        return f"{sorted(self.to_dict().items())}|pillow-{PIL.__version__}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image
