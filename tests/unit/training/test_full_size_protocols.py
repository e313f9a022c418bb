"""P1 and P2 with as many images as ImageNet has, and P3 with a tenth, their names alone: counts, split, order as published."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from openset.labels import NEGATIVE, UNKNOWN, is_known
from tests.factories import image_bytes
from training.data import load_protocol
from training.files import ImageFiles
from training.protocols import get_protocol

# Known and negative images that train and validate together, and images by part (science reference, section 5).
# P1's and P2's as published; all of P3's 315,906 would take longer than the other two together, so that it has a tenth.
TRAINING_IMAGES = {"p1": (145_273, 87_100), "p2": (36_119, 39_743), "p3": (19_315, 12_275)}
TRAIN_AND_VALIDATION = {"p1": (185_898, 46_475), "p2": (60_689, 15_173), "p3": (25_272, 6_318)}
TEST = {"p1": (5_800, 3_350, 8_300), "p2": (1_500, 1_550, 2_750), "p3": (7_550, 4_850, 8_200)}


def folder_of(pool: Path, count: int) -> Path:
    """So many names of one image; classes with as many share the folder."""
    folder = pool / str(count)
    if not folder.exists():
        folder.mkdir()
        for number in range(count):
            (folder / f"image_{number * 37 + 9}.JPEG").symlink_to(pool / "one.jpeg")
    return folder


def full_size_tree(root: Path, name: str) -> Path:
    """Every class of a protocol, the training images dealt out evenly."""
    pool, tree, protocol = root / "pool", root / "tree", get_protocol(name)
    for folder in (pool, tree / "train", tree / "val"):
        folder.mkdir(parents=True)
    (pool / "one.jpeg").write_bytes(image_bytes(format="JPEG"))
    for wnids, total in zip(
        (protocol.known, protocol.negative), TRAINING_IMAGES[name], strict=True
    ):
        each, more = divmod(total, len(wnids))
        for number, wnid in enumerate(wnids):
            (tree / "train" / wnid).symlink_to(folder_of(pool, each + (number < more)))
    for wnid in (*protocol.known, *protocol.negative, *protocol.unknown):
        (tree / "val" / wnid).symlink_to(folder_of(pool, 50))
    return tree


@pytest.mark.parametrize("name", ["p1", "p2", "p3"])
def test_parts_of_a_protocol_are_split_and_ordered_as_published(name: str, tmp_path: Path) -> None:
    tree, protocol = full_size_tree(tmp_path, name), get_protocol(name)
    data = load_protocol(name, data=tree)
    assert (len(data.train), len(data.validation)) == TRAIN_AND_VALIDATION[name]
    labels = data.test.labels
    counts = tuple(
        int(np.sum(mask)) for mask in (is_known(labels), labels == NEGATIVE, labels == UNKNOWN)
    )
    assert counts == TEST[name]
    assert data.class_ids == sorted(protocol.known)
    # Four fifths of every class train, but for one image that is rounded.
    trained, validated = (Counter(part.groups.tolist()) for part in (data.train, data.validation))
    assert set(trained) == {*protocol.known, *protocol.negative}
    assert all(abs(n - 0.8 * (n + validated[wnid])) < 1 for wnid, n in trained.items())
    label_of = dict(
        zip(data.validation.groups.tolist(), data.validation.labels.tolist(), strict=True)
    )
    assert label_of == dict.fromkeys(protocol.negative, NEGATIVE) | {
        wnid: label for label, wnid in enumerate(protocol.known)
    }
    # Sorted knowns, then sorted negatives, names as texts; seed 4242.
    wnids = [*sorted(protocol.known), *sorted(protocol.negative)]
    files = [sorted(path.name for path in (tree / "train" / wnid).iterdir()) for wnid in wnids]
    listed = [f"train/{wnid}/{file}" for wnid, of in zip(wnids, files, strict=True) for file in of]
    classes = np.repeat(wnids, [len(of) for of in files])
    expected = train_test_split(listed, train_size=0.8, stratify=classes, random_state=4242)
    for part, paths in zip((data.train, data.validation), expected, strict=True):
        assert part.sample_ids.tolist() == paths
        assert isinstance(part.images, ImageFiles)
        assert part.images.paths[-1] == str(tree / paths[-1])
