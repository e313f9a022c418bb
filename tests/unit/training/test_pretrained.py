"""Files of ResNet-50 weights: both formats, no last layer, and refusals that name what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from openset.labels import NEGATIVE, UNKNOWN
from openset.networks import build_network
from tests.factories import begun_run, character_data
from training.checkpoints import read_checkpoint, write_checkpoint
from training.engine import Trainer
from training.evaluation import evaluate
from training.pretrained import is_weights_file, load_backbone
from training.runs import PRETRAINING_NOTES, Run, TrainConfig, make_config
from training.train import main

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> State:
    torch.manual_seed(1)
    return dict(torchvision.models.resnet50(weights=None).state_dict())


@pytest.fixture
def network() -> nn.Module:
    return build_network("resnet50", feature_dim=3)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_all_but_the_last_layer_is_taken_over(
    weights: State, network: nn.Module, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, file)
    last = network.state_dict()["fc.weight"].clone()
    load_backbone(network, file)
    state = network.state_dict()
    assert all(torch.equal(state[n], v) for n, v in weights.items() if not n.startswith("fc."))
    assert torch.equal(state["fc.weight"], last)


def test_older_files_lack_a_counter(weights: State, network: nn.Module, tmp_path: Path) -> None:
    older = {name: value for name, value in weights.items() if "num_batches" not in name}
    torch.save(older, tmp_path / "w.pth")
    load_backbone(network, tmp_path / "w.pth")
    assert torch.equal(network.state_dict()["conv1.weight"], weights["conv1.weight"])


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "conv1.weight"), "lacks conv1.weight"),
        (lambda w: w | {"layer5.weight": w["bn1.weight"]}, r"has also layer5\.weight"),
        (lambda w: w | {"bn1.bias": torch.zeros(3)}, r"bn1\.bias \(3,\) instead of \(64,\)"),
        (lambda w: {"model": w, "epoch": 3}, "not a state dict"),
        (lambda w: torchvision.models.resnet18(weights=None).state_dict(), "does not hold torchvision's ResNet-50"),
    ],
)  # fmt: skip
def test_other_weights_are_refused_and_leave_the_network_alone(
    weights: State, network: nn.Module, tmp_path: Path, change: Callable[[State], object], message: str
) -> None:  # fmt: skip
    torch.save(change(weights), tmp_path / "w.pth")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_backbone(network, tmp_path / "w.pth")
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_file_is_refused(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone(network, file)


class Harmful:
    """Runs a command when it is unpickled by a reader that executes."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_file_that_would_execute_something_is_refused(network: nn.Module, tmp_path: Path) -> None:
    file, mark = tmp_path / "w.pth", tmp_path / "executed"
    torch.save({"conv1.weight": Harmful(mark)}, file)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone(network, file)
    assert not mark.exists()


def test_absent_file_and_other_networks_are_refused(
    weights: State, network: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_backbone(network, tmp_path / "w.pth")
    torch.save(weights, tmp_path / "w.pth")
    arguments = [
        "--protocol",
        "glyphs",
        "--loss",
        "softmax",
        "--option",
        "size=small",
        "--runs",
        str(tmp_path),
    ]
    assert main([*arguments, "--option", f"initial_weights={tmp_path / 'w.pth'}"]) == 1
    assert "trains lenet_plus_plus" in caplog.text


def test_suffix_tells_a_file_from_a_run() -> None:
    assert is_weights_file("somewhere/resnet50-11ad3fa6.PTH")
    assert not is_weights_file("runs/p1-cos_os-thesis-s42-0.35")


def test_run_that_goes_on_from_a_pretrained_one_tells_too(tmp_path: Path) -> None:
    def config_from(source: str) -> TrainConfig:
        return make_config("folders", "softmax", device="cpu", options={"initial_weights": source})

    first, folder = config_from("elsewhere/resnet50.pth"), tmp_path / "first"
    begun_run(folder, first)
    [note] = config_from(str(folder)).pretraining_notes
    assert note == first.pretraining_notes[0]
    assert "resnet50.pth" in note
    [unknown] = config_from("runs/first").pretraining_notes
    assert unknown.startswith("started from runs/first, which is not here")


DATA = character_data(
    train=(0, 1, NEGATIVE), validation=(0, NEGATIVE), test=(0, NEGATIVE, UNKNOWN), count=20
)


def second_of(tmp_path: Path) -> Trainer:
    """A run that starts from one that started from a file."""
    first = make_config("glyphs", "softmax", device="cpu", name="first")
    begun_run(tmp_path / "first", first)
    Trainer(first, DATA, tmp_path / "first", show_progress=False).save()
    begun_run(tmp_path / "first", replace(first, initial_weights="elsewhere/resnet50.pth"))
    forget_notes(tmp_path / "first")
    second = replace(first, name="second", initial_weights=str(tmp_path / "first"))
    begun_run(tmp_path / "second", second)
    return Trainer(second, DATA, tmp_path / "second", show_progress=False)


def forget_notes(folder: Path) -> None:
    """As a checkpoint of an earlier release."""
    state = read_checkpoint(folder / "last.pt")
    del state[PRETRAINING_NOTES]
    write_checkpoint(folder / "last.pt", state)


def told_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Notes of the report and of the model card."""
    monkeypatch.setattr(Run, "protocol_data", lambda self, parts=(): DATA)
    run = Run(folder)
    card = run.model_card(DATA, run.load_model()[1])
    return [evaluate(run, show_progress=False)["notes"], card.training["notes"]]


def test_run_tells_of_pretrained_weights_when_what_it_started_from_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = second_of(tmp_path)
    trainer.save()
    shutil.rmtree(tmp_path / "first")
    for notes in told_by(trainer.folder, monkeypatch):
        assert any("resnet50.pth" in note for note in notes)
    resumed = Trainer(trainer.config, DATA, trainer.folder, show_progress=False)
    assert resumed.resume()
    resumed.save()
    assert "resnet50.pth" in " ".join(Run(trainer.folder).pretraining_notes())


def test_run_of_an_earlier_release_keeps_what_is_known_or_says_that_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = second_of(tmp_path)
    trainer.save()
    forget_notes(trainer.folder)
    trainer.resume()
    trainer.save()
    assert "resnet50.pth" in read_checkpoint(trainer.folder / "last.pt")[PRETRAINING_NOTES][0]
    forget_notes(trainer.folder)
    shutil.rmtree(tmp_path / "first")
    for notes in told_by(trainer.folder, monkeypatch):
        assert any(
            "whether pretrained weights are behind it is not known" in note for note in notes
        )
