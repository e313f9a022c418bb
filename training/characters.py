"""The toy protocol: digits known, letters foreign, from EMNIST (and MNIST) files."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import datasets

from openset.labels import NEGATIVE, UNKNOWN
from openset.preprocessing import Preprocessing
from training.data import ProtocolData, Split, stratified_split
from training.durable import locked_file
from training.protocols import Protocol

CHARACTER_PREPROCESSING = Preprocessing(
    mode="L", image_size=28, resize=28, polarity="light_on_dark"
)
_OFFICIAL_LETTERS_TEST = 800

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def load(
    protocol: Protocol, *, data: Path | None, digits: str, seed: int, download: bool
) -> ProtocolData:
    """Load the toy protocol; see ``training.data.load_protocol``."""
    if digits not in ("emnist", "mnist"):
        raise ValueError(f'digits must be "emnist" or "mnist", got {digits!r}')
    if data is None:
        raise FileNotFoundError(
            "the toy protocol needs DATA=<folder>, holding EMNIST as torchvision keeps it (EMNIST/raw/...) or the "
            "official .gz files in emnist/; OPTIONS=download=true fetches it there"
        )
    letters = {
        part: _read(data, "letters", part == "train", download) for part in ("train", "test")
    }
    known = {part: _read(data, digits, part == "train", download) for part in ("train", "test")}
    development = _assemble(
        protocol, known["train"], letters["train"], "train", with_unknowns=False
    )
    test = _assemble(protocol, known["test"], letters["test"], "test", with_unknowns=True)
    train_indices, validation_indices = stratified_split(development.groups, 0.8, seed)
    notes = [f"digits: {digits.upper()}, letters: EMNIST"]
    counts = {letter: int((test.groups == letter).sum()) for letter in protocol.unknown}
    short = [
        f"{letter} {count}" for letter, count in counts.items() if count != _OFFICIAL_LETTERS_TEST
    ]
    if short:
        notes.append(
            f"the letters test file does not hold the official {_OFFICIAL_LETTERS_TEST} images of: {', '.join(short)}"
        )
    return ProtocolData(
        name=protocol.name,
        class_ids=list(protocol.known),
        class_names=list(protocol.known),
        preprocessing=CHARACTER_PREPROCESSING,
        train=development.subset(train_indices),
        validation=development.subset(validation_indices),
        test=test,
        notes=notes,
    )


def _assemble(
    protocol: Protocol, digits: Arrays, letters: Arrays, part: str, *, with_unknowns: bool
) -> Split:
    images, labels, groups = [digits[0]], [digits[1]], [digits[1].astype(str)]
    chosen = [(protocol.negative, NEGATIVE)]
    if with_unknowns:
        chosen.append((protocol.unknown, UNKNOWN))
    names = np.array([chr(ord("A") + index - 1) for index in letters[1]])
    for characters, label in chosen:
        mask = np.isin(names, characters)
        images.append(letters[0][mask])
        labels.append(np.full(int(mask.sum()), label, dtype=np.int64))
        groups.append(names[mask])
    all_groups = np.concatenate(groups)
    return Split(
        torch.from_numpy(np.concatenate(images))[:, None].contiguous(),
        np.concatenate(labels),
        all_groups,
        np.array([f"{part}/{group}/{index}" for index, group in enumerate(all_groups)]),
    )


def _read(data: Path, name: str, train: bool, download: bool) -> Arrays:
    """Upright images (N, 28, 28) and labels (N,) of "letters" (1..26), "emnist" or "mnist" (0..9)."""
    split = {"letters": "emnist-letters", "emnist": "emnist-mnist", "mnist": ""}[name]
    folder = "mnist" if name == "mnist" else "emnist"
    prefix = f"{split}-{'train' if train else 'test'}" if split else ("train" if train else "t10k")
    packed = data / folder / f"{prefix}-images-idx3-ubyte.gz"
    if packed.is_file():
        images = _read_idx(packed)
        labels = _read_idx(data / folder / f"{prefix}-labels-idx1-ubyte.gz")
    else:
        read: Callable[[], datasets.MNIST] = (
            (lambda: datasets.MNIST(str(data), train=train, download=download))
            if name == "mnist"
            else (
                lambda: datasets.EMNIST(
                    str(data), split.removeprefix("emnist-"), train=train, download=download
                )
            )
        )
        try:
            with _alone_at(data) if download else nullcontext():
                dataset = read()
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{name} was not found: expected {data}/{folder.upper()}/raw/ (torchvision's layout) or {packed}; "
                "OPTIONS=download=true fetches it"
            ) from error
        images, labels = dataset.data.numpy(), dataset.targets.numpy()
    if name != "mnist":
        images = images.transpose(0, 2, 1)  # EMNIST arrays are stored with height and width swapped
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _alone_at(data: Path) -> AbstractContextManager[None]:
    """Two processes would write into one and the same download; where nothing can be written there is none."""
    data.mkdir(parents=True, exist_ok=True)
    return locked_file(data / ".download.lock") if os.access(data, os.W_OK) else nullcontext()


def _read_idx(file: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes (magic 0x08), gzipped."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise FileNotFoundError(f"{file} is missing or damaged: {error}") from error
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if content[2] != 8 or array.size != int(np.prod(shape)):
        raise ValueError(f"{file} is not an idx file of bytes with shape {shape}; fetch it again")
    return array.reshape(shape)
