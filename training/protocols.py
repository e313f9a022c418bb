"""The open-set protocols: which classes are known, negative and unknown.

``folders`` is no published one: its classes are those of the tree that it is given (``training.folders``).
``p1`` to ``p3`` are the second published version of the ImageNet protocols (Palechor, Bhoumik, Günther, WACV 2023).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

DIGITS = tuple("0123456789")
# Letters without G, I, L, O: they look like 9, 1, 1 and 0.
NEGATIVE_LETTERS = tuple("ABCDEFHJKMN")
UNKNOWN_LETTERS = tuple("PQRSTUVWXYZ")

FOLDERS = "folders"
PUBLISHED = ("glyphs", "toy", "toy_vis", "p1", "p2", "p3")
PROTOCOLS = (*PUBLISHED, FOLDERS)
# Those with a choice of where the knowns are from: MNIST or EMNIST.
WITH_DIGITS = ("toy", "toy_vis")


@dataclass(frozen=True)
class Protocol:
    """Class lists of a protocol.

    Attributes:
        name: entry of ``PROTOCOLS``.
        kind: "characters" (28x28 grey), "imagenet" (photographs) or "folders" (photographs; the tree says the classes,
            and the lists here are empty).
        known: identifiers of known classes; a class's label is its rank here.
        negative: identifiers of classes shown in training without a label.
        unknown: identifiers of classes shown in the test only.
        class_names: identifier -> name for people.
    """

    name: str
    kind: str
    known: tuple[str, ...]
    negative: tuple[str, ...]
    unknown: tuple[str, ...]
    class_names: dict[str, str]

    @property
    def is_of_characters(self) -> bool:
        """Are the images characters, and no photographs?"""
        return self.kind == "characters"

    def short_name(self, class_id: str) -> str:
        """The first of a class' names; a class without a name for people keeps its identifier."""
        return self.class_names.get(class_id, class_id).partition(",")[0]


def _read_list(name: str) -> dict[str, Any]:
    folder = resources.files("training") / "protocol_lists"
    content = (folder / f"{name}.json").read_bytes()
    lines = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = {file: digest for digest, file in lines}
    if hashlib.sha256(content).hexdigest() != sums[f"{name}.json"]:
        raise ValueError(
            f"training/protocol_lists/{name}.json does not match its checksum; restore the file from the repository"
        )
    parsed: dict[str, Any] = json.loads(content)
    return parsed


@cache
def get_protocol(name: str) -> Protocol:
    """Look a protocol up.

    Raises:
        ValueError: unknown name, or a damaged class list.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {name!r}")
    if name == FOLDERS:
        return Protocol(name, FOLDERS, (), (), (), {})
    if name in ("glyphs", "toy", "toy_vis"):
        everything = DIGITS + NEGATIVE_LETTERS + UNKNOWN_LETTERS
        return Protocol(
            name,
            "characters",
            DIGITS,
            NEGATIVE_LETTERS,
            UNKNOWN_LETTERS,
            {character: character for character in everything},
        )
    lists, names = _read_list(name), _read_list("names")
    groups = {group: tuple(lists[group]) for group in ("known", "negative", "unknown")}
    present = {wnid: str(names[wnid]) for group in groups.values() for wnid in group}
    return Protocol(name, "imagenet", class_names=_distinct(present), **groups)


def _distinct(names: dict[str, str]) -> dict[str, str]:
    """Two classes of ImageNet may share a name (crane, maillot); those carry their identifier too."""
    values = list(names.values())
    return {
        wnid: name if values.count(name) == 1 else f"{name} ({wnid})"
        for wnid, name in names.items()
    }
