"""Negatives made of knowns: what is done to which image, and that no foreign image is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openset.labels import NEGATIVE, UNKNOWN
from training import composition
from training.composition import with_composed_negatives
from training.data import ProtocolData, Split, load_protocol
from training.engine import Trainer
from training.runs import make_config


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> ProtocolData:
    return load_protocol("glyphs", size="small", cache_dir=tmp_path_factory.mktemp("cache"))


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def drawn(count: int, seed: int) -> torch.Tensor:
    """Images without a dark pixel, (count, 1, 28, 28)."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, 1, 28, 28), generator=made).to(torch.uint8)


def pixels(split: Split) -> torch.Tensor:
    assert isinstance(split.images, torch.Tensor)
    return split.images


def changed(before: Split, after: Split) -> np.ndarray[Any, Any]:
    return np.asarray((pixels(before) != pixels(after)).flatten(1).any(dim=1))


def test_a_share_of_the_negatives_is_composed_and_nothing_else_changes(
    glyphs: ProtocolData,
) -> None:
    train = glyphs.train
    kept = pixels(train).clone()
    half = with_composed_negatives(train, 0.5, 1)
    assert torch.equal(pixels(train), kept)
    for name in ("labels", "groups", "sample_ids"):
        assert np.array_equal(getattr(half, name), getattr(train, name))
    negative = train.labels == NEGATIVE
    assert not changed(train, half)[~negative].any()
    assert changed(train, half)[negative].mean() == pytest.approx(0.5, abs=0.06)
    assert with_composed_negatives(train, 0.0, 1) is train


def test_at_a_share_of_one_no_foreign_image_has_a_say(glyphs: ProtocolData) -> None:
    train = glyphs.train
    others = pixels(train).clone()
    others[torch.from_numpy(train.labels == NEGATIVE)] = 77
    made = [
        pixels(with_composed_negatives(split, 1.0, 1))
        for split in (train, replace(train, images=others))
    ]
    assert torch.equal(*made)


def test_the_seed_alone_says_what_is_composed(glyphs: ProtocolData) -> None:
    first, again, other = (
        pixels(with_composed_negatives(glyphs.train, 0.5, seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_trains_and_what_chooses_the_epoch_are_composed(
    glyphs: ProtocolData, tmp_path: Path
) -> None:
    """Else "without negatives" would still choose its epoch by foreign images."""

    def parts(data: ProtocolData) -> list[Any]:
        config = make_config(
            "glyphs", "cos_eos", device="cpu", epochs=1, options={"composed_negatives": 1.0}
        )
        trainer = Trainer(config, data, tmp_path / "run", show_progress=False)
        return [trainer.training_part.images, trainer.validation.images]

    blank = {}
    for part in ("train", "validation"):
        split = getattr(glyphs, part)
        images = split.images.clone()
        images[torch.from_numpy(split.labels == NEGATIVE)] = 0
        blank[part] = replace(split, images=images)
    assert all(map(torch.equal, parts(glyphs), parts(replace(glyphs, **blank))))


def test_two_characters_that_are_put_together_are_of_two_classes() -> None:
    labels = np.array([0] * 97 + [1] * 3 + [NEGATIVE, UNKNOWN])
    first, second = composition._of_two_classes(labels, np.arange(100), 500, random())
    assert (labels[first] != labels[second]).all()
    assert max(first.max(), second.max()) < 100


@pytest.mark.parametrize(
    ("digit", "never"),
    [("3", {2}), ("6", {3}), ("9", {3}), ("5", set[int]())],
)
def test_a_digit_is_not_turned_into_itself_or_another(digit: str, never: set[int]) -> None:
    image = drawn(1, 0)
    turned = composition._turned(image.expand(400, 1, 28, 28), np.full(400, digit), random())
    found = set()
    for way in range(8):
        shown = image.transpose(2, 3) if way & 4 else image
        shown = shown.flip(2) if way & 2 else shown
        shown = shown.flip(3) if way & 1 else shown
        if (turned == shown).flatten(1).all(dim=1).any():
            found.add(way)
    assert found == set(range(1, 8)) - never


def test_digits_that_turning_leaves_digits_are_not_turned(
    glyphs: ProtocolData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    turned = composition._turned

    def note(images: torch.Tensor, digits: Any, random: np.random.Generator) -> torch.Tensor:
        seen.extend(digits)
        return turned(images, digits, random)

    monkeypatch.setattr(composition, "_turned", note)
    with_composed_negatives(glyphs.train, 1.0, 1)
    assert set(seen) == set("2345679")


@pytest.mark.parametrize("share", [0.0, 0.875])
def test_no_known_is_turned_where_negatives_are_turned_afterwards(
    share: float, glyphs: ProtocolData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of eight would stand upright again, a known among the negatives."""
    calls: list[int] = []
    turned = composition._turned
    monkeypatch.setattr(
        composition, "_turned", lambda *given: (calls.append(len(given[0])), turned(*given))[1]
    )
    options = {"composed_negatives": 1.0, "turned_negatives": share}
    config = make_config("glyphs", "cos_eos", device="cpu", epochs=1, options=options)
    Trainer(config, glyphs, tmp_path / "run", show_progress=False)
    assert bool(sum(calls)) == (share == 0)


def test_halves_are_of_one_and_of_the_other() -> None:
    one, other = drawn(200, 1), drawn(200, 2)
    made = composition._halves(one, other, random())
    ways = set()
    for image, first, second in zip(made[:, 0], one[:, 0], other[:, 0], strict=True):
        is_first, is_second = image == first, image == second
        assert (is_first | is_second).all()
        rows, columns = is_first.all(dim=1), is_first.all(dim=0)
        along = rows if rows.any() else columns
        count = int(along.sum())
        assert along[:count].all()
        assert 11 < count <= 19
        ways.add(rows.any().item())
    assert ways == {True, False}


def test_characters_on_each_other_keep_all_their_strokes() -> None:
    one = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    other = torch.zeros_like(one)
    one[:, 0, 5, 5], other[:, 0, 14, 14] = 100, 200
    made = composition._overlaid(one, other, random())
    assert (made[:, 0, 5, 5] == 100).all()
    places = {tuple((image == 200).nonzero()[0].tolist()) for image in made[:, 0]}
    assert len(places) > 30
    assert {abs(place - 14) for pair in places for place in pair} == {0, 1, 2, 3}
    # What is moved over an edge does not come in at the other.
    other[:, 0, 14, 14], other[:, 0, 0, 0] = 0, 200
    edges = composition._overlaid(one, other, random())[:, 0]
    assert (edges[:, 5:] < 200).all()
    assert (edges[:, :, 5:] < 200).all()


def test_a_blot_takes_one_side_and_leaves_the_rest() -> None:
    images = drawn(300, 3)
    made = composition._blotted(images, random())
    sides = set()
    for image, before in zip(made[:, 0], images[:, 0], strict=True):
        dark = image == 0
        assert torch.equal(image[~dark], before[~dark])
        rows, columns = dark.all(dim=1), dark.all(dim=0)
        along = rows if rows.any() else columns
        assert along.sum() * 28 == dark.sum()
        assert 10 < along.sum() <= 20
        sides.add((rows.any().item(), along[0].item()))
    assert len(sides) == 4


def test_knowns_of_one_class_cannot_be_put_together() -> None:
    split = Split(
        drawn(4, 0), np.array([2, 2, 2, NEGATIVE]), np.array([*"222A"]), np.array([*"abcd"])
    )
    with pytest.raises(ValueError, match="knowns of two classes"):
        with_composed_negatives(split, 1.0, 1)


def test_without_a_digit_to_turn_the_other_ways_are_taken() -> None:
    split = Split(
        drawn(40, 0), np.array([0, 1] + [NEGATIVE] * 38), np.array([*"01", *"A" * 38]),
        np.arange(40).astype(str),
    )  # fmt: skip
    made = with_composed_negatives(split, 1.0, 1)
    assert changed(split, made).sum() == 38
