"""The contact sheet shows the right images with the right words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from openset.labels import NEGATIVE, UNKNOWN
from training.characters import CHARACTER_PREPROCESSING
from training.contact_sheet import SHEET, draw_contact_sheet, write_contact_sheet
from training.data import ProtocolData, Split
from training.scoring import Scored


def sample(foreign: tuple[tuple[int, str], ...] = ((UNKNOWN, "P"), (NEGATIVE, "A"))):
    """Image i is all of grey value i; the score of image i is i; two knowns, then three of each foreign class."""
    groups = np.array(["0", "1"] + [name for _, name in foreign for _ in range(3)])
    labels = np.array([0, 1] + [label for label, _ in foreign for _ in range(3)])
    count = len(labels)
    scores = np.arange(count, dtype=np.float32)
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    ids = np.array([f"test/{index}" for index in range(count)])
    split = Split(images.contiguous(), labels, groups, ids)
    empty = split.subset(np.arange(0))
    digits = list("0123456789")
    data = ProtocolData(
        "toy", digits, digits, CHARACTER_PREPROCESSING, empty, empty, split, notes=[]
    )
    logits = np.zeros((count, 10), np.float32)
    scored = Scored(
        logits, logits, logits, {"softmax": scores, "logit": -scores}, np.full(count, 7), labels, groups, ids,
        np.eye(10, dtype=np.float32),
    )  # fmt: skip
    return scored, data


def shown(figure) -> list[tuple[int, str]]:
    """Grey value and words of each image."""
    return [
        (int(axes.images[0].get_array()[0, 0]), axes.get_title())
        for axes in figure.get_axes()
        if axes.images
    ]


def test_foreign_images_are_shown_best_first_unknowns_before_negatives() -> None:
    figure = draw_contact_sheet(*sample(), title="t")
    assert shown(figure) == [
        (4, "P\n→ 7\n4.00"), (3, "P\n→ 7\n3.00"), (2, "P\n→ 7\n2.00"),
        (7, "A\n→ 7\n7.00"), (6, "A\n→ 7\n6.00"), (5, "A\n→ 7\n5.00"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "ranking", "best"),
    [
        (["logit", "softmax"], "softmax", 4),
        (["logit"], "logit", 2),
        (["energy", "logit"], "energy", 4),
    ],
)
def test_softmax_ranks_or_the_first_score_that_was_evaluated(
    kept: list[str], ranking: str, best: int
) -> None:
    scored, data = sample()
    values = scored.scores | {"energy": scored.scores["softmax"]}
    scored = dataclasses.replace(scored, scores={name: values[name] for name in kept})
    figure = draw_contact_sheet(scored, data, title="t")
    assert shown(figure)[0][0] == best
    headings = [block.get_suptitle() for block in figure.subfigs]
    assert headings == [
        f"{kind} with the highest {ranking} scores" for kind in ("unknowns", "negatives")
    ]


def test_images_are_found_by_their_id_where_unreadable_ones_were_left_out() -> None:
    scored, data = sample()
    kept = np.array([0, 1, 2, 4, 6])
    figure = draw_contact_sheet(scored.subset(kept), data, title="t")
    assert [image for image, _ in shown(figure)] == [4, 2, 6]


def test_without_foreign_images_there_is_no_sheet(tmp_path: Path) -> None:
    scored, data = sample(foreign=())
    write_contact_sheet(scored, data, tmp_path, title="t")
    assert not (tmp_path / SHEET).exists()


@pytest.mark.parametrize("are_decoded", [False, True])
def test_photographs_are_shown_as_the_model_sees_them(tmp_path: Path, are_decoded: bool) -> None:
    from PIL import Image

    from openset.preprocessing import Preprocessing
    from training.cache import open_cache
    from training.decoded import CachedImages
    from training.files import ImageFiles

    scored, data = sample()
    paths = []
    for index in range(len(scored)):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.new("RGB", (80, 60), (index, 200, 9)).save(paths[-1])
    form = Preprocessing(mode="RGB", image_size=32, resize=36)
    images: ImageFiles | CachedImages = ImageFiles(paths)
    if are_decoded:
        backwards = paths[::-1]
        decoded = open_cache(
            tmp_path / "cache", backwards, root=tmp_path, preprocessing=form, show_progress=False
        )
        images = CachedImages(decoded, np.arange(len(paths))[::-1].copy())
    test = dataclasses.replace(data.test, images=images)
    data = dataclasses.replace(data, preprocessing=form, test=test)
    figure = draw_contact_sheet(scored, data, title="t")
    first = next(axes for axes in figure.get_axes() if axes.images).images[0].get_array()
    assert first.shape == (32, 32, 3)
    assert first[0, 0].tolist() == [4, 200, 9]
