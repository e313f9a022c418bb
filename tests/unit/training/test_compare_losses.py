"""The comparison of losses: one loss that fails must not cost the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from openset.labels import UNKNOWN
from tests.factories import character_data
from training import compare_losses
from training.engine import TrainingDiverged


@pytest.fixture
def _instant_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config, **_):
        if config.loss == "arc_os":
            raise TrainingDiverged("the loss of arc_os is nan")
        return SimpleNamespace(folder=Path(config.name))

    cells = {f"{target:g}": {"value": None} for target in compare_losses.FPR_TARGETS}
    cells["0.1"] = {"value": 0.75}
    report = {
        "scores": {"softmax": {"unknown": {"ccr_at_fpr": cells}}},
        "accuracy": {"value": 0.9},
    }
    data = character_data(train=(0,), validation=(0,), test=(0, UNKNOWN), count=1)
    monkeypatch.setattr("training.runs.load_protocol", lambda *_, **__: data)
    monkeypatch.setattr(compare_losses, "train", train)
    monkeypatch.setattr(compare_losses, "evaluate", lambda *_, **__: report)


@pytest.mark.usefixtures("_instant_training")
def test_diverged_loss_has_its_row_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--runs", str(tmp_path), "--losses", "eos,arc_os,cos_os"]
    assert compare_losses.main(arguments) == 1
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["loss"] for row in written["rows"]] == ["eos", "arc_os", "cos_os"]
    assert written["rows"][1]["diverged"] == "the loss of arc_os is nan"
    assert written["rows"][2]["ccr_at_fpr"]["0.1"] == 0.75
    table = capsys.readouterr().out
    assert "0.7500" in table
    assert "diverged" in table


@pytest.mark.usefixtures("_instant_training")
def test_all_means_every_loss_of_the_table(tmp_path: Path) -> None:
    compare_losses.main(["--runs", str(tmp_path)])
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["loss"] for row in written["rows"]] == list(compare_losses.THESIS_LOSSES)
    assert len(written["rows"]) == 20


def test_misspelt_loss_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_losses, "train", lambda *_, **__: pytest.fail("trained"))
    assert compare_losses.main(["--runs", str(tmp_path), "--losses", "eos,cosos"]) == 1
