"""Own classes from a folder tree: ``known/<class>/*``, ``negative/<class>/*``, ``unknown/<class>/*``.

Images that lie directly in ``negative/`` or ``unknown/`` form one group, named after that folder. Classes are the sorted
folder names: the rank is the label, the folder's name the class's name. ``negative/`` and ``unknown/`` may be missing.
"""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np

from openset.labels import NEGATIVE, UNKNOWN, UNKNOWN_LABEL
from openset.preprocessing import Preprocessing
from training.data import MissingClasses, ProtocolData, Split
from training.files import SUFFIXES, ImageFiles, image_names
from training.protocols import FOLDERS

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
# Of the two validation images one judges the epochs, the other calibrates.
_FEWEST = {"test": 1, "validation": 2, "train": 2}
FEWEST_IMAGES = sum(_FEWEST.values())
_GROUPS = ("known", "negative", "unknown")


def load(*, data: Path | None, seed: int, image_size: int, on_unreadable: str) -> ProtocolData:
    """Load a tree of own classes; see ``training.data.load_protocol``.

    Known and negative images are split 60 : 20 : 20 into train, validation and test by a hash of the path below ``data``
    (``parts_of_class``), so that an image keeps its part when files are added. Unknown images are all in the test.

    Raises:
        FileNotFoundError: no such tree, or a class without an image.
        MissingClasses: fewer than two known classes.
        ValueError: a class in two groups, a class named "unknown", an image without a class, or too few images of a class.
    """
    if data is None or not (data / "known").is_dir():
        raise FileNotFoundError(
            f"protocol {FOLDERS} needs DATA=<folder> with known/<class>/ (and negative/, unknown/), got {data}"
        )
    classes = {group: _classes(data, group) for group in _GROUPS}
    _check_classes(data, classes)
    members: dict[str, list[tuple[str, str, int]]] = {"train": [], "validation": [], "test": []}
    for group in _GROUPS:
        for rank, (name, paths) in enumerate(classes[group].items()):
            label = {"known": rank, "negative": NEGATIVE, "unknown": UNKNOWN}[group]
            parts = (
                {"test": paths}
                if group == "unknown"
                else parts_of_class(paths, seed=seed, name=f"{group}/{name}")
            )
            for part, chosen in parts.items():
                members[part] += [(path, name, label) for path in chosen]

    def split(part: str) -> Split:
        return Split(
            ImageFiles([str(data / path) for path, _, _ in members[part]], on_unreadable),
            np.array([label for _, _, label in members[part]], dtype=np.int64),
            np.array([name for _, name, _ in members[part]]),
            np.array([path for path, _, _ in members[part]]),
        )

    names = list(classes["known"])
    return ProtocolData(
        name=FOLDERS,
        class_ids=names,
        class_names=names,
        preprocessing=Preprocessing(
            mode="RGB", image_size=image_size, resize=round(image_size * 256 / 224)
        ),
        train=split("train"),
        validation=split("validation"),
        test=split("test"),
        notes=_notes(data, classes),
    )


def parts_of_class(paths: list[str], *, seed: int, name: str) -> dict[str, list[str]]:
    """Deal the images of one class out to train, validation and test, each in the order of ``paths``.

    A hash of seed and path, read as a number in [0, 1), decides: below 0.2 test, below 0.4 validation, else train. It asks
    for no other file, so adding files moves none. Only where a part of a small class stays below its least number do the
    training images with the smallest hashes stand in for it, the test first, until added files fill it. Adding files
    therefore never brings an image that an earlier run trained on into validation or test, nor one that it validated
    with into the test. Renaming an image or its folder deals it out anew.

    Args:
        paths: of the images, relative to the tree, with "/".
        seed: of the split; another one makes another split.
        name: of the class, for messages.

    Raises:
        ValueError: too few images, or too few of them for training.
    """
    if len(paths) < FEWEST_IMAGES:
        raise ValueError(
            f"{name} holds {len(paths)} images; a class needs at least {FEWEST_IMAGES} ({_FEWEST['train']} to train, "
            f"{_FEWEST['validation']} to validate and calibrate, {_FEWEST['test']} to test), better tens of them"
        )
    place = {path: _place(path, seed) for path in paths}
    order = sorted(paths, key=lambda path: (place[path], path))
    test = [path for path in order if place[path] < TEST_SHARE]
    validation = [
        path for path in order if TEST_SHARE <= place[path] < TEST_SHARE + VALIDATION_SHARE
    ]
    train = order[len(test) + len(validation) :]
    for part, least in ((test, _FEWEST["test"]), (validation, _FEWEST["validation"])):
        wanted = max(0, least - len(part))
        part += train[:wanted]
        train = train[wanted:]
    if len(train) < _FEWEST["train"]:
        raise ValueError(
            f"{name}: {len(paths)} images are so few that the split by hashed paths leaves {len(train)} to train with; "
            "add images (with ten or more this hardly happens) or choose another split (OPTIONS=split_seed=1)"
        )
    dealt = {"train": set(train), "validation": set(validation), "test": set(test)}
    return {part: [path for path in paths if path in chosen] for part, chosen in dealt.items()}


def _place(path: str, seed: int) -> float:
    # File systems differ in how they compose accented letters.
    text = f"{seed}/{unicodedata.normalize('NFC', path)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _classes(data: Path, group: str) -> dict[str, list[str]]:
    """Class -> its images relative to ``data``, both sorted; empty where the group is not there."""
    root = data / group
    if not root.is_dir():
        return {}
    folders = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    found = {}
    if loose := image_names(root):
        if group == "known":
            raise ValueError(
                f"{root} holds {len(loose)} images without a class, e.g. {loose[0]}; move them into {root}/<class>/"
            )
        found[group] = [f"{group}/{name}" for name in loose]
    for folder in folders:
        names = image_names(root / folder)
        if not names:
            raise FileNotFoundError(
                f"{root / folder} holds no image (expected files ending in {', '.join(SUFFIXES)}); "
                "put images directly into it, or remove it"
            )
        # A class folder may be named like its group, beside images without a folder.
        found.setdefault(folder, []).extend(f"{group}/{folder}/{name}" for name in names)
    return dict(sorted(found.items()))


def _check_classes(data: Path, classes: dict[str, dict[str, list[str]]]) -> None:
    if len(classes["known"]) < 2:
        raise MissingClasses(
            f"at least 2 known classes are needed, {data / 'known'} holds {len(classes['known'])}"
        )
    if UNKNOWN_LABEL in classes["known"]:
        raise ValueError(
            f'{data / "known" / UNKNOWN_LABEL}: a known class may not be named "{UNKNOWN_LABEL}", which is the answer for '
            "rejected images; rename the folder"
        )
    for first, second in (("known", "negative"), ("known", "unknown"), ("negative", "unknown")):
        if both := sorted(classes[first].keys() & classes[second].keys()):
            raise ValueError(
                f"{data}: {', '.join(both)} in {first}/ and in {second}/; a class belongs to one of them, "
                "remove or rename one folder"
            )


def _notes(data: Path, classes: dict[str, dict[str, list[str]]]) -> list[str]:
    notes = []
    if not classes["negative"]:
        notes.append("no negatives: the model cannot be exported before DATA holds negative/")
    if not classes["unknown"]:
        notes.append(
            "no unknowns: nothing here measures how new kinds of foreign images are rejected"
        )
    others = sorted(
        entry.name
        for entry in data.iterdir()
        if entry.is_dir() and entry.name not in _GROUPS and not entry.name.startswith(".")
    )
    if others:
        notes.append(f"not read, only known/, negative/ and unknown/ are: {', '.join(others)}")
    return notes
