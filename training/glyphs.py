"""The embedded protocol: characters rendered from the fonts inside matplotlib's wheel. No download.

Digits are known, the toy protocol's letters negative and unknown. The fonts of the test are never seen in training, so
that calibration and test differ in style, as in life.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from openset.labels import NEGATIVE, UNKNOWN
from training.characters import CHARACTER_PREPROCESSING
from training.data import ProtocolData, Split
from training.protocols import Protocol

logger = logging.getLogger(__name__)

TRAINING_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "cmr10", "cmss10", "cmb10",
)  # fmt: skip
TEST_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmtt10")

# Images per class: (train known, train negative, validation known, validation negative, test).
SIZES = {"full": (1500, 1300, 400, 560, 400), "small": (120, 100, 60, 120, 50)}

_VERSION = 1
_BASE = 64  # side of a rendered template, pixels
_SIDE = 28
_CHUNK = 500


def load(protocol: Protocol, *, size: str, seed: int, cache_dir: Path) -> ProtocolData:
    """Render, or read from the cache, the three parts; see ``training.data.load_protocol``."""
    if size not in SIZES:
        raise ValueError(f"size of glyphs must be one of {sorted(SIZES)}, got {size!r}")
    counts = SIZES[size]
    plan: dict[str, list[tuple[tuple[str, ...], int]]] = {
        "train": [(protocol.known, counts[0]), (protocol.negative, counts[1])],
        "validation": [(protocol.known, counts[2]), (protocol.negative, counts[3])],
        "test": [
            (protocol.known, counts[4]),
            (protocol.negative, counts[4]),
            (protocol.unknown, counts[4]),
        ],
    }
    settings = {
        "version": _VERSION,
        "plan": plan,
        "seed": seed,
        "fonts": [TRAINING_FONTS, TEST_FONTS],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    file = cache_dir / "glyphs" / f"{size}-{digest}.npz"
    if not file.is_file():
        logger.info("rendering the glyphs protocol (%s) into %s ...", size, file)
        _store(file, {part: _render_part(part, classes, seed) for part, classes in plan.items()})
    label_of = {character: label for label, character in enumerate(protocol.known)}
    label_of |= dict.fromkeys(protocol.negative, NEGATIVE) | dict.fromkeys(
        protocol.unknown, UNKNOWN
    )
    with np.load(file, allow_pickle=False) as stored:
        train, validation, test = (
            _split(stored, part, label_of) for part in ("train", "validation", "test")
        )
    return ProtocolData(
        name=protocol.name,
        class_ids=list(protocol.known),
        class_names=list(protocol.known),
        preprocessing=CHARACTER_PREPROCESSING,
        notes=[
            "rendered characters; the fonts of the test are never seen in training or calibration"
        ],
        train=train,
        validation=validation,
        test=test,
    )


def _split(stored: Any, part: str, label_of: dict[str, int]) -> Split:
    groups, fonts = stored[f"{part}/groups"], stored[f"{part}/fonts"]
    return Split(
        torch.from_numpy(stored[f"{part}/images"])[:, None],
        np.array([label_of[group] for group in groups], dtype=np.int64),
        groups,
        np.array(
            [
                f"{part}/{group}/{font}/{i}"
                for i, (group, font) in enumerate(zip(groups, fonts, strict=True))
            ]
        ),
    )


def _store(file: Path, parts: dict[str, dict[str, NDArray[Any]]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    arrays = {
        f"{part}/{key}": value for part, content in parts.items() for key, value in content.items()
    }
    with partial.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    os.replace(partial, file)


def _render_part(
    part: str, classes: list[tuple[tuple[str, ...], int]], seed: int
) -> dict[str, NDArray[Any]]:
    fonts = TEST_FONTS if part == "test" else TRAINING_FONTS
    characters = [
        character for group, count in classes for character in group for _ in range(count)
    ]
    number = {"train": 0, "validation": 1, "test": 2}[part]
    random = torch.Generator().manual_seed(1_000_003 * seed + number)
    distinct = sorted(set(characters))
    templates = torch.stack(
        [
            _template(character, font, stroke)
            for character in distinct
            for font in fonts
            for stroke in (0, 1, 2)
        ]
    )
    character_index = torch.tensor([distinct.index(character) for character in characters])
    font_index = torch.randint(len(fonts), (len(characters),), generator=random)
    stroke_index = torch.randint(3, (len(characters),), generator=random)
    chosen = (character_index * len(fonts) + font_index) * 3 + stroke_index
    images = torch.cat([_distort(templates[chunk], random) for chunk in chosen.split(_CHUNK)])
    return {
        "images": images.numpy(),
        "groups": np.array(characters),
        "fonts": np.array([fonts[index] for index in font_index]),
    }


def _template(character: str, font: str, stroke: int) -> Tensor:
    """One character, light on dark, its ink centered, (64, 64) float in [0, 1]."""
    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(str(path), 40)
    image = Image.new("L", (_BASE, _BASE), 0)
    left, top, right, bottom = drawn.getbbox(character, stroke_width=stroke)
    position = ((_BASE - left - right) / 2, (_BASE - top - bottom) / 2)
    ImageDraw.Draw(image).text(position, character, fill=255, font=drawn, stroke_width=stroke)
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def _uniform(count: int, low: float, high: float, random: torch.Generator) -> Tensor:
    return torch.rand(count, generator=random) * (high - low) + low


def _distort(templates: Tensor, random: torch.Generator) -> Tensor:
    """Random rotation, shear, scale, shift, blur, contrast and noise: (n, 64, 64) -> uint8 (n, 28, 28)."""
    n = len(templates)
    angle = _uniform(n, -0.22, 0.22, random)
    shear = _uniform(n, -0.18, 0.18, random)
    # An image of side 28 shows the template's whole 64 pixels at scale 1; letters then stand about 14 pixels high.
    scale_x, scale_y = (_uniform(n, 0.58, 0.85, random) for _ in range(2))
    shift = torch.stack([_uniform(n, -0.11, 0.11, random) for _ in range(2)], dim=1)
    cosine, sine = angle.cos(), angle.sin()
    matrix = torch.stack(
        [
            torch.stack([scale_x * cosine, scale_x * (shear * cosine - sine), shift[:, 0]], dim=1),
            torch.stack([scale_y * sine, scale_y * (shear * sine + cosine), shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    # Two samples per pixel and side, averaged: thin strokes would alias otherwise.
    grid = functional.affine_grid(matrix, [n, 1, 2 * _SIDE, 2 * _SIDE], align_corners=False)
    fine = functional.grid_sample(templates[:, None], grid, align_corners=False)
    images = functional.avg_pool2d(fine, 2)
    images = _blur(images, _uniform(n, 0.25, 0.9, random))
    images = images * _uniform(n, 0.65, 1.0, random)[:, None, None, None]
    noise = (
        torch.randn(images.shape, generator=random)
        * _uniform(n, 0.0, 0.08, random)[:, None, None, None]
    )
    return ((images + noise).clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1)


def _blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Separable Gaussian blur with a sigma (pixels) per image, (n, 1, H, W)."""
    n = len(images)
    offsets = torch.arange(-2.0, 3.0)
    kernels = torch.exp(-0.5 * (offsets[None] / sigmas[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    stacked = images.transpose(0, 1)
    stacked = functional.conv2d(stacked, kernels[:, None, None, :], padding=(0, 2), groups=n)
    stacked = functional.conv2d(stacked, kernels[:, None, :, None], padding=(2, 0), groups=n)
    return stacked.transpose(0, 1)
