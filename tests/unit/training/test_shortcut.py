"""The probe sees values and no shape, and doubts are raised where those give the foreign images away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openset.labels import NEGATIVE, UNKNOWN, is_known
from tests.factories import character_data, write_idx
from training import shortcut
from training.data import ProtocolData, Split
from training.histogram_probe import BINS, Probe, doubts, draw, probe, value_histograms


def data_with(test: tuple[int, ...] = (*range(10), NEGATIVE, UNKNOWN)) -> ProtocolData:
    """Every image from one distribution, whatever it shows."""
    return character_data(
        train=(*range(10), NEGATIVE), validation=(*range(10), NEGATIVE), test=test, count=40
    )


def of_another_source(split: Split) -> Split:
    """The foreign images with every value rounded to a multiple of 16, the knowns as they were."""
    images = split.images.clone()
    foreign = torch.from_numpy(~is_known(split.labels))
    images[foreign] = images[foreign] // 16 * 16
    return replace(split, images=images)


def rows_of(data: ProtocolData) -> list[dict[str, Any]]:
    return probe(data, title="scans", show_progress=False).rows(rule="inclusive")


def test_histogram_counts_every_pixel_in_its_range_and_channel() -> None:
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[1, 2] = [[0, 3], [4, 255]]
    counts = value_histograms(images).reshape(2, 3, BINS)
    assert (counts.sum(axis=2) == 4).all()
    assert counts[0, 0].tolist() == [4] + [0] * (BINS - 1)
    assert counts[1, 2].tolist() == [2, 1] + [0] * (BINS - 3) + [1]


def test_histogram_does_not_see_where_pixels_are() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 1, 28, 28), dtype=np.uint8)
    shuffled = random.permuted(images.reshape(4, -1), axis=1).reshape(images.shape)
    np.testing.assert_array_equal(value_histograms(images), value_histograms(shuffled))


def test_images_of_one_source_cannot_be_told_apart_and_raise_no_doubt() -> None:
    rows = rows_of(data_with())
    assert [(row["fitted_on"], row["against"]) for row in rows] == [
        ("knowns and negatives", "negative"), ("knowns and negatives", "unknown"),
        ("knowns alone", "negative"), ("knowns alone", "unknown"),
    ]  # fmt: skip
    for row in rows:
        assert 0.3 < row["auroc"] < 0.7
        assert row["kept_at_fpr"]["0.1"]["value"] < 0.3
        assert (row["known_count"], row["foreign_count"]) == (400, 40)
    assert doubts(rows) == []


def test_images_of_another_source_are_given_away_and_doubted() -> None:
    plain = data_with()
    rows = rows_of(
        replace(plain, train=of_another_source(plain.train), test=of_another_source(plain.test))
    )
    for row in rows:
        assert row["kept_at_fpr"]["0.1"]["value"] > 0.7
        if row["fitted_on"] == "knowns and negatives":
            assert row["auroc"] > 0.999
    first, second = doubts(rows)
    assert first.startswith(
        "scans: a histogram of values, fitted on knowns and negatives, tells negatives"
    )
    assert "tells unknowns" in second


def row_with(*, auroc: float, share: float, least: float | None) -> dict[str, Any]:
    interval = None if least is None else (least, 1.0)
    return {
        "data": "d", "fitted_on": "knowns alone", "against": "unknown", "auroc": auroc,
        "kept_at_fpr": {"0.01": {"value": share, "interval": interval}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "doubted"),
    [
        (row_with(auroc=0.91, share=0.0, least=None), True),
        (row_with(auroc=0.89, share=0.0, least=None), False),
        # Part of the knowns are of the foreign images' source: the others are given away.
        (row_with(auroc=0.80, share=0.6, least=0.3), True),
        (row_with(auroc=0.80, share=0.6, least=0.02), False),
        (row_with(auroc=0.80, share=0.6, least=None), True),
    ],
)
def test_doubt_is_raised_by_auroc_or_by_what_is_surely_kept(row: Any, doubted: bool) -> None:
    assert bool(doubts([row])) == doubted


def test_one_doubtful_fit_of_two_is_enough() -> None:
    [doubt] = doubts(
        [row_with(auroc=0.85, share=0.0, least=None), row_with(auroc=0.80, share=0.6, least=0.3)]
    )
    assert "AUROC 0.800, 60.0 % of the knowns kept" in doubt


def test_without_negatives_knowns_alone_are_fitted() -> None:
    data = data_with()
    train = data.train.subset(np.flatnonzero(is_known(data.train.labels)))
    assert {row["fitted_on"] for row in rows_of(replace(data, train=train))} == {"knowns alone"}


def test_test_part_teaches_nothing() -> None:
    data = data_with()
    images = data.test.images.clone()
    images[torch.from_numpy(~is_known(data.test.labels))] = 7
    other = replace(data, test=replace(data.test, images=images))
    known = is_known(data.test.labels)
    first, second = (probe(d, title="t", show_progress=False).scores for d in (data, other))
    for fit in ("knowns and negatives", "knowns alone"):
        np.testing.assert_array_equal(first[fit][known], second[fit][known])


def test_data_without_foreign_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no foreign image in the test part"):
        rows_of(data_with(test=tuple(range(10))))


def test_data_without_known_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no known image in the test part"):
        rows_of(data_with(test=(NEGATIVE, UNKNOWN)))


def test_figure_is_drawn_against_what_is_there() -> None:
    found = probe(data_with(test=(0, 1, NEGATIVE)), title="t", show_progress=False)
    assert isinstance(found, Probe)
    assert [axes.get_xlabel() for axes in draw([found]).axes] == [
        "value of a pixel",
        "FPR on negatives",
    ]


def toy_tree(root: Path, sources: Sequence[str] = ("emnist", "mnist")) -> Path:
    """EMNIST's values are multiples of 16, MNIST's are any."""
    random = np.random.default_rng(0)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        digits, letters = np.repeat(np.arange(10), 20), np.repeat(np.arange(1, 27), 20)
        for source, folder, name, labels, step in (
            ("emnist", "emnist", f"emnist-mnist-{part}", digits, 16),
            ("letters", "emnist", f"emnist-letters-{part}", letters, 16),
            ("mnist", "mnist", prefix, digits, 1),
        ):
            if source in (*sources, "letters"):
                images = random.integers(0, 256, (len(labels), 28, 28)) // step * step
                write_idx(root / folder / f"{name}-images-idx3-ubyte.gz", images)
                write_idx(root / folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return root


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    target, picture = tmp_path / "out" / "found.json", tmp_path / "out" / "found.png"
    code = shortcut.main([*arguments, "--json", str(target), "--figure", str(picture)])
    if code:
        return code, {}
    assert picture.read_bytes().startswith(b"\x89PNG")
    return code, json.loads(target.read_text())


@pytest.mark.parametrize("protocol", ["toy", "toy_vis"])
def test_command_shows_both_sources_of_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    code, content = run(tmp_path, "--protocol", protocol, "--data", str(toy_tree(tmp_path)))
    assert code == 0
    aurocs = {
        row["data"]: row["auroc"]
        for row in content["rows"]
        if (row["fitted_on"], row["against"]) == ("knowns and negatives", "unknown")
    }
    assert aurocs[f"{protocol}, MNIST's digits"] == 1.0
    assert 0.3 < aurocs[f"{protocol}, EMNIST's digits"] < 0.7
    assert content["rule"] == "strict"
    assert set(content["notes"]) == set(aurocs)
    assert "MNIST's digits" in capsys.readouterr().out


def test_source_of_digits_that_is_not_there_is_left_out_unless_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("--protocol", "toy", "--data", str(toy_tree(tmp_path, ["emnist"])))
    code, content = run(tmp_path, *arguments)
    assert code == 0
    assert {row["data"] for row in content["rows"]} == {"toy, EMNIST's digits"}
    assert "toy, MNIST's digits is left out" in caplog.text
    assert run(tmp_path, *arguments, "--digits", "mnist")[0] == 1
    assert "error: mnist was not found" in caplog.text


def test_command_takes_photographs_and_leaves_broken_ones_out(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for place, level in (("known/cat", 0), ("known/dog", 0), ("negative", 90)):
        folder = tmp_path / "photos" / place
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(level, level + 120, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / "broken.png").write_bytes(b"no image")
    code, content = run(
        tmp_path, "--protocol", "folders", "--data", str(tmp_path / "photos"), "--image-size", "32"
    )
    assert code == 0
    assert content["rule"] == "inclusive"
    assert content["options"]["image_size"] == 32
    # One group of negatives has no classes to draw from.
    for row in content["rows"]:
        assert row["against"] == "negative"
        assert {one["interval"] for one in row["kept_at_fpr"].values()} == {None}
        assert row["auroc"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--protocol", "toy"], "DATA=<folder>"),
        (["--per-class", "0"], "per-class must be at least 1, got 0"),
        (["--digits", "mnist"], "glyphs has no choice of digits, got 'mnist'"),
        (["--image-size", "64"], "glyphs has images of one size, got image-size 64"),
    ],
)
def test_command_refuses_in_a_sentence(
    arguments: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert shortcut.main(arguments) == 1
    assert said in caplog.text
