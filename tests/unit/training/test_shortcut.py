"""The probe sees values and no shape, and says so where they give the foreign images away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openset.labels import NEGATIVE, UNKNOWN, is_known
from tests.factories import character_data, write_idx
from training import shortcut
from training.data import ProtocolData, Split
from training.shortcut import BINS, probe, value_histograms, warnings


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


def kept(data: ProtocolData, target: str = "0.01") -> dict[tuple[str, str], float]:
    rows = probe(data, title="t").rows()
    return {
        (row["fitted_on"], row["against"]): row["kept_at_fpr"][target]["value"] or 0.0
        for row in rows
    }


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


def test_images_of_one_source_cannot_be_told_apart() -> None:
    found = kept(data_with(), "0.1")
    assert set(found) == {
        (fit, group)
        for fit in ("knowns and negatives", "knowns alone")
        for group in ("negative", "unknown")
    }
    assert max(found.values()) < 0.3
    assert warnings(probe(data_with(), title="t").rows()) == []


def test_images_of_another_source_are_given_away_and_a_warning_says_so() -> None:
    plain = data_with()
    data = replace(plain, train=of_another_source(plain.train), test=of_another_source(plain.test))
    rows = probe(data, title="scans").rows()
    for row in rows:
        assert row["kept_at_fpr"]["0.1"]["value"] > 0.7
        if row["fitted_on"] == "knowns and negatives":
            assert row["auroc"] > 0.999
    [warning] = warnings(rows)
    assert warning.startswith("scans: histograms alone tell")


def test_without_negatives_knowns_alone_are_fitted() -> None:
    data = data_with()
    train = data.train.subset(np.flatnonzero(is_known(data.train.labels)))
    rows = probe(replace(data, train=train), title="t").rows()
    assert {row["fitted_on"] for row in rows} == {"knowns alone"}


def test_unknowns_of_the_test_teach_nothing() -> None:
    data = data_with()
    images = data.test.images.clone()
    images[torch.from_numpy(data.test.labels == UNKNOWN)] = 7
    other = replace(data, test=replace(data.test, images=images))
    known = is_known(data.test.labels)
    for fit, scores in probe(data, title="t").scores.items():
        np.testing.assert_array_equal(scores[known], probe(other, title="t").scores[fit][known])


def test_data_without_foreign_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no foreign image in the test part"):
        probe(data_with(test=tuple(range(10))), title="t")


def toy_tree(root: Path) -> Path:
    """EMNIST's values are multiples of 16, MNIST's are any."""
    random = np.random.default_rng(0)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        digits, letters = np.repeat(np.arange(10), 20), np.repeat(np.arange(1, 27), 20)
        for folder, name, labels, step in (
            ("emnist", f"emnist-mnist-{part}", digits, 16),
            ("emnist", f"emnist-letters-{part}", letters, 16),
            ("mnist", prefix, digits, 1),
        ):
            images = random.integers(0, 256, (len(labels), 28, 28)) // step * step
            write_idx(root / folder / f"{name}-images-idx3-ubyte.gz", images)
            write_idx(root / folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return root


def test_command_shows_both_sources_of_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, picture = tmp_path / "out" / "toy.json", tmp_path / "out" / "toy.png"
    code = shortcut.main(
        ["--protocol", "toy", "--data", str(toy_tree(tmp_path)), "--json", str(target), "--figure", str(picture)]
    )  # fmt: skip
    assert code == 0
    content = json.loads(target.read_text())
    shares = {
        row["data"]: row["kept_at_fpr"]["0.01"]["value"] or 0.0
        for row in content["rows"]
        if (row["fitted_on"], row["against"]) == ("knowns and negatives", "unknown")
    }
    assert shares["MNIST's digits"] == 1.0
    assert shares["EMNIST's digits"] < 0.2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "MNIST's digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--protocol", "toy"], "DATA=<folder>"),
        (["--protocol", "toy", "--data", ".", "--per-class", "0"], "per-class must be at least 1"),
    ],
)
def test_command_refuses_in_a_sentence(
    arguments: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert shortcut.main(arguments) == 1
    assert said in caplog.text
