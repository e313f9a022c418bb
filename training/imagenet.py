"""Protocols P1 to P3 on an ImageNet tree: ``train/<wnid>/*``, ``val/<wnid>/*``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from openset.labels import NEGATIVE, UNKNOWN
from openset.preprocessing import Preprocessing
from training.data import MissingClasses, ProtocolData, Split
from training.files import SUFFIXES, ImageFiles, image_names
from training.protocols import Protocol


def load(
    protocol: Protocol,
    *,
    data: Path | None,
    seed: int,
    allow_missing_classes: bool,
    image_size: int,
    on_unreadable: str,
) -> ProtocolData:
    """Load p1, p2 or p3; see ``training.data.load_protocol``."""
    if data is None or not (data / "train").is_dir() or not (data / "val").is_dir():
        raise FileNotFoundError(
            f"protocol {protocol.name} needs DATA=<folder> with train/<wnid>/ and val/<wnid>/ (ImageNet layout), got {data}"
        )
    notes = []
    groups = {group: getattr(protocol, group) for group in ("known", "negative", "unknown")}
    missing = {
        group: [wnid for wnid in wnids if not _is_present(data, wnid, group)]
        for group, wnids in groups.items()
    }
    if any(missing.values()):
        if not allow_missing_classes:
            raise MissingClasses(_missing_text(protocol, data, missing))
        groups = {
            group: tuple(wnid for wnid in wnids if wnid not in missing[group])
            for group, wnids in groups.items()
        }
        sizes = ", ".join(
            f"{len(groups[group])} of {len(getattr(protocol, group))} {group}" for group in groups
        )
        notes.append(f"protocol {protocol.name} restricted to the classes present: {sizes}")
        if len(groups["known"]) < 2:
            raise MissingClasses(
                f"at least 2 known classes are needed, {data} holds {len(groups['known'])}"
            )
    label_of = {wnid: label for label, wnid in enumerate(groups["known"])}
    label_of |= dict.fromkeys(groups["negative"], NEGATIVE) | dict.fromkeys(
        groups["unknown"], UNKNOWN
    )

    # The published rule: known then negative classes, file names sorted as strings, one stratified split.
    paths = [
        path
        for wnid in groups["known"] + groups["negative"]
        for path in _files(data / "train" / wnid)
    ]
    wnids = [Path(path).parent.name for path in paths]
    per_class = Counter(wnids)
    fewest = min(per_class.values())
    if fewest < 2 or len(paths) - int(0.8 * len(paths)) < len(per_class):
        scarce = [wnid for wnid, count in per_class.items() if count == fewest]
        raise ValueError(
            "a fifth of the training images validates and must hold one of each class, which has two at least; the known and "
            f"negative classes in {data / 'train'} have {len(paths)} images of {len(per_class)} classes, the fewest "
            f"({fewest}) in {', '.join(scarce[:5])}{' and others' if len(scarce) > 5 else ''}"
        )
    train, validation = train_test_split(paths, train_size=0.8, stratify=wnids, random_state=seed)
    test = [
        path for group in groups.values() for wnid in group for path in _files(data / "val" / wnid)
    ]

    def split(files: list[str]) -> Split:
        identifiers = [Path(path).parent.name for path in files]
        return Split(
            ImageFiles(files, on_unreadable),
            np.array([label_of[wnid] for wnid in identifiers], dtype=np.int64),
            np.array(identifiers),
            np.array([str(Path(path).relative_to(data)) for path in files]),
        )

    return ProtocolData(
        name=protocol.name,
        class_ids=list(groups["known"]),
        class_names=[protocol.class_names[wnid] for wnid in groups["known"]],
        preprocessing=Preprocessing(
            mode="RGB", image_size=image_size, resize=round(image_size * 256 / 224)
        ),
        train=split(train),
        validation=split(validation),
        test=split(test),
        notes=notes,
    )


def _is_present(data: Path, wnid: str, group: str) -> bool:
    needed = ["val"] if group == "unknown" else ["train", "val"]
    return all((data / part / wnid).is_dir() for part in needed)


def _files(folder: Path) -> list[str]:
    names = image_names(folder)
    if not names:
        raise FileNotFoundError(
            f"{folder} holds no image (expected files ending in {', '.join(SUFFIXES)})"
        )
    return [str(folder / name) for name in names]


def _missing_text(protocol: Protocol, data: Path, missing: dict[str, list[str]]) -> str:
    lines = [f"{data} lacks classes of protocol {protocol.name}:"]
    lines += [
        f"  {len(wnids)} {group}: " + ", ".join(wnids) for group, wnids in missing.items() if wnids
    ]
    lines.append(
        "complete the tree, or restrict the protocol to what is there with --allow-missing-classes "
        "(OPTIONS=allow_missing_classes=true; make cures, make recommend: ALLOW_MISSING_CLASSES=1); every report will say so"
    )
    return "\n".join(lines)
