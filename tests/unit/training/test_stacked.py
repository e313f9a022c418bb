"""Runs side by side learn what each learns alone, and survive kills and each other. On rendered glyphs, tiny."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from training import stacked
from training.data import load_protocol
from training.losses.criterion import OpenSetCriterion
from training.runs import Run, TrainConfig, make_config
from training.stacked import StackedTrainer, can_share, train_stack
from training.train import train


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small glyphs protocol, cut to 330 training images: ten batches of 32 and a rest."""
    data = load_protocol("glyphs", size="small", cache_dir=tmp_path_factory.mktemp("cache"))
    choice = np.random.default_rng(0).permutation(len(data.train))[:330]
    validation = np.random.default_rng(1).permutation(len(data.validation))[:100]
    return dataclasses.replace(
        data, train=data.train.subset(choice), validation=data.validation.subset(validation)
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config_for(loss: str, seed: int, *, device: str = "cpu", **options: Any) -> TrainConfig:
    name = f"{loss}-{seed}"
    return make_config(
        "glyphs", loss, seed=seed, epochs=2, device=device, options=options, name=name
    )


# Softmax sees no negatives: its epochs are shorter than those of the others.
CONFIGS = [
    config_for("cos_eos", 1),
    config_for("cos_eos", 2),
    config_for("softmax", 3),
    config_for("arc_os", 1, as_published=True, margin_warmup_epochs=2),
    config_for("eos", 4, turned_negatives=0.875, composed_negatives=0.5),
]


@pytest.fixture(scope="module")
def alone(few: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each configuration trained by itself."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    for config in CONFIGS:
        train(config, runs=folder, data=few, show_progress=False)
    return folder


def stack(folder: Path, data: Any, configs: list[TrainConfig] | None = None) -> dict[str, Any]:
    return train_stack(configs or CONFIGS, runs=folder, data=data, show_progress=False)


def assert_same_runs(left: Path, right: Path, configs: list[TrainConfig] | None = None) -> None:
    for config in configs or CONFIGS:
        for file in ("config.json", "history.json"):
            assert (left / config.name / file).read_text() == (
                right / config.name / file
            ).read_text()
        for which in ("last", "best"):
            one, other = (
                Run(folder / config.name).load_checkpoint(which) for folder in (left, right)
            )
            assert one.keys() == other.keys()
            assert one["progress"] == other["progress"]
            assert one["schedule"] == other["schedule"]
            for name, value in one["model"].items():
                assert torch.equal(value, other["model"][name]), (config.name, which, name)
            for number, state in one["optimizer"]["state"].items():
                buffer = other["optimizer"]["state"][number]["momentum_buffer"]
                assert torch.equal(state["momentum_buffer"], buffer)


class Killed(BaseException):
    """Stands for a kill: nothing of ours may catch it."""


def test_runs_side_by_side_end_as_each_does_alone(few: Any, alone: Path, tmp_path: Path) -> None:
    assert stack(tmp_path, few) == {}
    assert_same_runs(alone, tmp_path)
    # The comparison would notice two runs that had changed places.
    first, second = (Run(alone / config.name).load_checkpoint()["model"] for config in CONFIGS[:2])
    assert not torch.allclose(first["head.weight"], second["head.weight"], atol=1e-3)
    # Networks for serving load from a stacked run as from any other.
    Run(tmp_path / CONFIGS[0].name).load_model("best")


@pytest.mark.parametrize("epoch", [1, 2])
def test_stack_killed_after_some_epochs_goes_on_where_each_run_stood(
    few: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    finish = StackedTrainer._finish_epoch

    def killed(self: StackedTrainer, *arguments: Any) -> None:
        finish(self, *arguments)
        if self.config.loss == "cos_eos" and self.progress.epoch == epoch:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StackedTrainer, "_finish_epoch", killed)
        with pytest.raises(Killed):
            stack(tmp_path, few)
    # Softmax, whose epochs are shorter, is ahead of the others; one of these has finished the epoch and the rest has not.
    epochs = [
        Run(tmp_path / config.name).trained_epochs() if (tmp_path / config.name / "last.pt").exists() else 0
        for config in CONFIGS
    ]  # fmt: skip
    assert epochs == [epoch, epoch - 1, min(epoch, 2), epoch - 1, epoch - 1]
    assert stack(tmp_path, few) == {}
    assert_same_runs(alone, tmp_path)


def test_interrupt_in_a_step_saves_every_run_after_a_whole_step(
    few: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = OpenSetCriterion.forward

    def interrupted(self: OpenSetCriterion, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4 * len(CONFIGS) + 2:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(OpenSetCriterion, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stack(tmp_path, few)
    assert signal.getsignal(signal.SIGINT) is before
    progress = [Run(tmp_path / config.name).load_checkpoint()["progress"] for config in CONFIGS]
    assert [(one["epoch"], one["step"]) for one in progress] == [(0, 5)] * len(CONFIGS)
    # They may go on apart, too.
    for config in CONFIGS[:2]:
        train(config, runs=tmp_path, data=few, show_progress=False)
    assert stack(tmp_path, few) == {}
    assert_same_runs(alone, tmp_path)


def test_interrupt_saves_every_run_that_can_be_saved_and_names_those_that_cannot(
    few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, steps = StackedTrainer.save, StackedTrainer._next_step
    full = {CONFIGS[0].name, CONFIGS[2].name}

    def saved(self: StackedTrainer, *name: str) -> None:
        if self.config.name in full:
            raise OSError(f"no room for {self.config.name}")
        save(self, *name)

    def interrupted(self: StackedTrainer) -> None:
        if self.config.name == CONFIGS[1].name and self.progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        steps(self)

    monkeypatch.setattr(StackedTrainer, "save", saved)
    monkeypatch.setattr(StackedTrainer, "_next_step", interrupted)
    with pytest.raises(
        OSError, match=rf"no room for {CONFIGS[0].name}; no room for {CONFIGS[2].name}"
    ):
        stack(tmp_path, few)
    for config in CONFIGS:
        assert (tmp_path / config.name / "last.pt").is_file() is (config.name not in full)


def test_run_that_diverges_is_named_and_does_not_touch_the_others(
    few: Any, alone: Path, tmp_path: Path
) -> None:
    wild = dataclasses.replace(config_for("eos", 5, learning_rate=1e30), name="wild")
    diverged = stack(tmp_path, few, [CONFIGS[0], wild, *CONFIGS[1:]])
    assert list(diverged) == ["wild"]
    assert "smaller learning_rate" in str(diverged["wild"])
    assert not (tmp_path / "wild/last.pt").exists()
    assert_same_runs(alone, tmp_path)


class Recording:
    """Stands for a CUDA graph: it repeats what the host had decided when it was made, and knows nothing newer."""

    made: ClassVar[list[int]] = []  # at which step of its epoch

    def __init__(self, trainer: StackedTrainer) -> None:
        self.made.append(trainer.progress.step)
        self.trainer, self.margin_factor = trainer, trainer.criterion.margin_factor
        self.progress = dataclasses.replace(trainer.progress)

    def replay(self) -> None:
        trainer, criterion = self.trainer, self.trainer.criterion
        now, factor = trainer.progress, criterion.margin_factor
        trainer.progress, criterion.margin_factor = self.progress, self.margin_factor
        trainer._whole_batch()
        trainer.progress, criterion.margin_factor = now, factor


def test_recorded_step_depends_on_nothing_that_the_host_changes(
    few: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "made", [])

    def recorded(self: StackedTrainer) -> Recording:
        self._graph_margin = self.criterion.margin_factor
        return Recording(self)

    class Recorded(StackedTrainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._uses_graphs = True

    monkeypatch.setattr(stacked, "StackedTrainer", Recorded)
    monkeypatch.setattr(StackedTrainer, "_recorded", recorded)
    assert stack(tmp_path, few) == {}
    assert_same_runs(alone, tmp_path)
    # Once a run, and once more where the margin had grown; each time ordinary steps come first, which may compile.
    assert Recording.made == [3] * (len(CONFIGS) + 1)


ON_CUDA = [("cuda", True), ("cuda", False)] if torch.cuda.is_available() else []


@pytest.mark.parametrize(("device", "graphs"), [("cpu", True), *ON_CUDA])
def test_runs_side_by_side_on_each_device_learn_what_each_learns_alone(
    few: Any, tmp_path: Path, device: str, graphs: bool
) -> None:
    # On a CPU, where there are no graphs and the first test sees equal bits, two show what a GPU is asked of all.
    chosen = CONFIGS[1:3] if device == "cpu" else CONFIGS
    configs = [dataclasses.replace(config, device=device) for config in chosen]
    for config in configs:
        train(config, runs=tmp_path / "alone", data=few, show_progress=False)
    folder = tmp_path / "stack"
    assert train_stack(configs, runs=folder, data=few, graphs=graphs, show_progress=False) == {}
    for config in configs:
        one, other = (
            json.loads((tmp_path / name / config.name / "history.json").read_text())
            for name in ("alone", "stack")
        )
        for left, right in zip(one, other, strict=True):
            assert right["train_loss"] == pytest.approx(left["train_loss"], rel=0.02)
            assert right["confidence"] == pytest.approx(left["confidence"], abs=0.05)


# Dynamo looks at .grad of the features it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_runs_are_compiled_for_their_whole_batches_alone(
    few: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of an epoch and the validation have other sizes; with a compiler that needs no C++."""
    sizes: list[int] = []
    compile_module = torch.nn.Module.compile

    def counted(graph: Any, inputs: list[Any]) -> Any:
        sizes.extend(
            len(value) for value in inputs if isinstance(value, torch.Tensor) and value.ndim == 4
            and value.shape[1:] == (1, 28, 28)
        )  # fmt: skip
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend=counted)
    )
    torch.compiler.reset()
    compiled = [config_for("cos_eos", 1, compile=True), config_for("cos_eos", 2, compile=True)]
    assert stack(tmp_path / "stack", few, compiled) == {}
    assert sizes == [32]  # once for both
    for config in compiled:
        train(config, runs=tmp_path / "alone", data=few, show_progress=False)
    assert sizes == [32]
    assert_same_runs(tmp_path / "alone", tmp_path / "stack", compiled)
    for config in compiled:
        one, other = (
            json.loads((folder / config.name / "history.json").read_text())
            for folder in (alone, tmp_path / "stack")
        )
        for left, right in zip(one, other, strict=True):
            assert right["train_loss"] == pytest.approx(left["train_loss"], rel=1e-3)
            assert right["confidence"] == pytest.approx(left["confidence"], abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"preset": "modern"}, {"options": {"scale": "adacos_dynamic"}}, {"options": {"schedule": "cosine"}},
     {"options": {"split_seed": 7}}, {"data": "elsewhere"}],
)  # fmt: skip
def test_runs_whose_steps_or_images_differ_in_kind_are_refused(
    few: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    other = make_config("glyphs", "cos_eos", device="cpu", **options)
    assert not can_share(CONFIGS[0], other)
    with pytest.raises(ValueError, match="side by side"):
        stack(tmp_path, few, [CONFIGS[0], other])
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_name_are_refused(few: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        stack(tmp_path, few, [CONFIGS[0], CONFIGS[0]])
