"""What ``LOSS=recommended`` trains can be served as it is: its score is the artifact's, in the archive and in what loads it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from openset.artifact import load_artifact
from serving import archive
from tests.factories import emnist_files
from training import export, train
from training.recommendations import recommendation
from training.runs import Run


@pytest.mark.parametrize(
    ("protocol", "digits"), [("glyphs", None), ("toy", "emnist"), ("toy", "mnist")]
)
def test_recommended_goes_from_training_to_an_archive_with_its_score(
    tmp_path: Path, protocol: str, digits: str | None
) -> None:
    chosen = recommendation(protocol, digits)
    words = [
        "--protocol",
        protocol,
        "--loss",
        "recommended",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--quiet",
    ]
    data = str(emnist_files(tmp_path / "data"))
    more = ["-o", "size=small"] if digits is None else ["--data", data, "--digits", digits]
    assert train.main([*words, *more, "--runs", str(tmp_path / "runs")]) == 0
    [folder] = (tmp_path / "runs").iterdir()
    config = Run(folder).config
    assert (config.loss, config.preset) == (chosen.loss, chosen.preset)
    assert config.training.turned_negatives == chosen.options.get("turned_negatives", 0.0)
    assert config.scores == list(chosen.scores)
    assert export.main(["--run", str(folder), "--fpr", "0.5"]) == 0
    artifact = Run(folder).artifact
    store = tmp_path / "store"
    assert archive.main(["--artifact", str(artifact), "--name", "m", "--out", str(store)]) == 0

    with zipfile.ZipFile(store / "m.mar") as packed:
        card = json.loads(packed.read("model_card.json"))
    assert card["default_score"] == chosen.scores[0]
    classifier = load_artifact(artifact)
    size = card["preprocessing"]["image_size"]
    answers = classifier.predict(torch.zeros(2, 1, size, size, dtype=torch.uint8))
    assert set(answers.scores) >= set(chosen.scores)
