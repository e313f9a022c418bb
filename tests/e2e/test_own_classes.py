"""Own classes, from a folder of coloured images to an archive, with the commands that a user runs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision

from serving import archive
from tests.factories import fill_with_images
from training import calibrate, evaluate, export, train
from training.runs import Run


def test_own_classes_from_images_to_an_archive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, runs = tmp_path / "tree", tmp_path / "runs"
    fill_with_images(tree / "known/ant", 16, (220, 30, 30))
    fill_with_images(tree / "known/bee", 16, (30, 200, 40))
    fill_with_images(tree / "negative/moss", 16, (30, 40, 220))
    fill_with_images(tree / "unknown", 5, (200, 200, 30))
    weights = tmp_path / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), weights)

    words = ["--protocol", "folders", "--loss", "cos_eos", "--data", str(tree), "--epochs", "1", "--image-size", "32",
             "--device", "cpu", "--runs", str(runs), "--quiet", "--cache", str(tmp_path / "cache")]  # fmt: skip
    assert train.main([*words, "-o", f"initial_weights={weights}", "-o", "batch_size=16"]) == 0
    assert "normalize_images=true" in caplog.text
    [folder] = runs.iterdir()
    run = ["--run", str(folder)]
    assert export.main(run) == 1
    assert "Choose --fpr" in caplog.text  # the rate that so few negatives can certify
    assert export.main([*run, "--fpr", "0.9"]) == 0
    assert calibrate.main(run) == 0
    assert evaluate.main(run) == 0
    store = tmp_path / "store"
    assert (
        archive.main(
            ["--artifact", str(Run(folder).artifact), "--name", "own", "--out", str(store)]
        )
        == 0
    )

    report = json.loads((folder / "report.json").read_text())
    assert set(report["scores"]["softmax"]) == {"negative", "unknown"}
    assert report["factory"]["realised_fpr"]["unknown"]["count"] == 5
    with zipfile.ZipFile(store / "own.mar") as packed:
        card = json.loads(packed.read("model_card.json"))
    assert card["class_names"] == ["ant", "bee"]
    assert card["training"]["epochs"] == 1
    # Foreign weights may have seen the unknown classes: every reader is told.
    for notes in (report["notes"], card["training"]["notes"]):
        assert any("resnet50.pth" in note for note in notes)
