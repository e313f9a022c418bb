"""Training: resume is exact, checkpoints are whole, refusals are clear. On rendered glyphs, tiny."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

import training.engine as engine
from openset.labels import NEGATIVE
from tests.factories import begun_run
from training.engine import Trainer, TrainingDiverged, is_useless, useless_accuracy
from training.losses import LOSSES
from training.precision import fast_convolutions
from training.run_folder import RunInUse, check_folder, locked_run
from training.runs import Run, TrainConfig, make_config
from training.stacked import StackedTrainer, train_stack
from training.train import parse_option, train

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small glyphs protocol; of its validation part 300 knowns judge the epochs."""
    from training.data import load_protocol

    return load_protocol("glyphs", size="small", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def few(small: Any) -> Any:
    """Cut to 320 training images: ten batches of 32."""
    choice = np.random.default_rng(0).permutation(len(small.train))[:320]
    validation = np.random.default_rng(1).permutation(len(small.validation))[:150]
    return dataclasses.replace(
        small, train=small.train.subset(choice), validation=small.validation.subset(validation)
    )


def config_for(loss: str = "cos_eos", **changes: Any) -> TrainConfig:
    return make_config("glyphs", loss, device="cpu", **({"epochs": 2, "seed": 1} | changes))


def trainer_for(config: TrainConfig, data: Any, folder: Path) -> Trainer:
    trainer = Trainer(config, data, folder, show_progress=False)
    check_folder(folder, config)
    begun_run(folder, config)
    return trainer


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Killed(BaseException):
    """Stands for a kill: nothing of ours may catch it."""


@pytest.mark.parametrize("preset", ["thesis", "modern"])
@pytest.mark.parametrize("stop_at", [(0, 7), (1, 3)])
def test_run_killed_under_way_ends_with_the_very_same_weights(
    few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, stop_at: tuple[int, int]
) -> None:
    torch.set_num_threads(1)
    options = {"batch_size": 32, "precision": "float32"}
    config = config_for(preset=preset, options=options)
    trainer_for(config, few, tmp_path / "whole").run()
    monkeypatch.setattr(engine, "LOG_EVERY", 2)
    often = dataclasses.replace(config, checkpoint_seconds=0.0)
    broken = trainer_for(often, few, tmp_path / "broken")
    working = broken._step

    def step_until_killed(*arguments: Any) -> torch.Tensor:
        if (broken.progress.epoch, broken.progress.step) == stop_at:
            raise Killed
        return working(*arguments)

    broken._step = step_until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        broken.run()
    continued = trainer_for(config, few, tmp_path / "broken")
    assert continued.resume()
    assert (continued.progress.epoch, continued.progress.step) == (stop_at[0], stop_at[1] // 2 * 2)
    continued.run()
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))
    whole, resumed = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "broken")
    )
    if preset == "modern":
        assert_same(whole["averaged"], resumed["averaged"])
    assert whole["progress"]["history"] == resumed["progress"]["history"]


def test_interrupt_in_the_middle_of_a_step_saves_only_whole_steps(few: Any, tmp_path: Path) -> None:
    """Ctrl-C while batch norm has seen the batch and the optimizer has not."""
    torch.set_num_threads(1)
    config = config_for(epochs=1, options={"batch_size": 32})
    trainer_for(config, few, tmp_path / "whole").run()
    broken = trainer_for(config, few, tmp_path / "broken")
    criterion, calls = broken.criterion.forward, []

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return criterion(*arguments)

    broken.criterion.forward = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert signal.getsignal(signal.SIGINT) is before
    continued = trainer_for(config, few, tmp_path / "broken")
    assert continued.resume()
    assert continued.progress.step == 4
    continued.run()
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))


def test_second_interrupt_does_not_wait(few: Any, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(epochs=1), few, tmp_path / "run")

    def hangs(*_: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second interrupt was swallowed")

    trainer._step = hangs  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_interrupt_in_the_last_validation_is_not_lost(
    few: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command with more runs to train would go on with the next one."""
    config = config_for(epochs=1, name="run")
    validate = engine.validate

    def interrupted(*arguments: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return validate(*arguments)

    monkeypatch.setattr(engine, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, runs=tmp_path, data=few, show_progress=False)
    assert Run(tmp_path / "run").trained_epochs() == 1
    # Nothing is left to do, and nothing is done twice.
    assert train(config, runs=tmp_path, data=few, show_progress=False).unfinished() == []


def test_kill_between_the_two_checkpoints_of_an_epoch_loses_no_best_one(
    few: Any, tmp_path: Path
) -> None:
    config = config_for(epochs=1)
    trainer_for(config, few, tmp_path / "whole").run()
    broken = trainer_for(config, few, tmp_path / "broken")
    save = broken.save

    def once(*name: str) -> None:
        save(*name)
        raise Killed

    broken.save = once  # type: ignore[method-assign]
    with pytest.raises(Killed):
        broken.run()
    continued = trainer_for(config, few, tmp_path / "broken")
    continued.resume()
    continued.run()
    best = [
        torch.load(tmp_path / name / "best.pt", weights_only=True)["model"]
        for name in ("whole", "broken")
    ]
    assert_same(*best)


def test_unsound_weights_are_never_saved(few: Any, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(), few, tmp_path / "run")
    trainer.save()
    sound = (tmp_path / "run" / "last.pt").read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingDiverged, match="weights"):
        trainer.save()
    assert (tmp_path / "run" / "last.pt").read_bytes() == sound


def with_one_pixel_changed(data: Any) -> Any:
    images = data.train.images.clone()
    images[17, 0, 3, 5] ^= 1
    return dataclasses.replace(data, train=dataclasses.replace(data.train, images=images))


@pytest.mark.parametrize(
    "change",
    [
        with_one_pixel_changed,
        lambda data: dataclasses.replace(
            data, train=data.train.subset(np.arange(2560)[::-1].copy())
        ),
        lambda data: dataclasses.replace(data, validation=data.validation.subset(np.arange(149))),
    ],
)
def test_other_images_in_the_same_place_are_refused(few: Any, tmp_path: Path, change: Any) -> None:
    # So many that a sample of them would not do.
    data = dataclasses.replace(few, train=few.train.subset(np.arange(2560) % len(few.train)))
    trainer_for(config_for(epochs=1), data, tmp_path / "run").save()
    assert trainer_for(config_for(epochs=1), data, tmp_path / "run").resume()
    with pytest.raises(ValueError, match="other images"):
        trainer_for(config_for(epochs=1), change(data), tmp_path / "run").resume()


def test_unfinished_run_says_so(few: Any, tmp_path: Path) -> None:
    trainer_for(config_for(epochs=1), few, tmp_path / "run").run()
    assert Run(tmp_path / "run").unfinished() == []
    config = dataclasses.replace(config_for(epochs=1), epochs=3)
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    assert Run(tmp_path / "run").unfinished() == ["trained for 1 of 3 epochs"]


@pytest.mark.parametrize(
    "options", [{"learning_rate": "abc"}, {"batch_size": 0}, {"batch_size": 1.5}, {"momentum": -1}]
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        config_for(options=options)


def test_same_seed_same_run_and_another_seed_another(few: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer_for(config_for(epochs=1, seed=seed), few, tmp_path / name).run()
    assert_same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    name = "network.feature.weight"
    assert not torch.equal(weights_of(tmp_path / "a")[name], weights_of(tmp_path / "c")[name])


def test_run_may_start_from_the_weights_of_another(few: Any, tmp_path: Path) -> None:
    first = tmp_path / "first"
    trainer_for(config_for(epochs=1), few, first).run()
    options = {"initial_weights": str(first)}
    second = Trainer(config_for(options=options), few, tmp_path / "second", show_progress=False)
    assert_same(weights_of(first), dict(second.model.state_dict()))
    assert config_for(options=options).name != config_for().name
    # Validation images of this split may have trained that run.
    with pytest.raises(ValueError, match="calibrate"):
        Trainer(
            config_for(options=options | {"split_seed": 7}),
            few,
            tmp_path / "x",
            show_progress=False,
        )
    fewer = dataclasses.replace(few, class_ids=few.class_ids[:5])
    with pytest.raises(ValueError, match="other classes"):
        Trainer(config_for(options=options), fewer, tmp_path / "third", show_progress=False)


@pytest.mark.parametrize(
    ("protocol", "spelt_out"),
    [
        ("glyphs", {"split_seed": 4242}),
        ("glyphs", {"size": "full"}),
        ("toy", {"digits": "emnist"}),
        ("p1", {"allow_missing_classes": False}),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_default_that_is_spelt_out_splits_no_other_way(
    few: Any, tmp_path: Path, protocol: str, spelt_out: dict[str, Any], is_first: bool
) -> None:
    def started_from_first(second: dict[str, Any]) -> Trainer:
        config = make_config(
            protocol, "cos_eos", device="cpu", options=second | {"initial_weights": str(tmp_path)}
        )
        config = dataclasses.replace(config, network="lenet_plus_plus", network_options={})
        return Trainer(config, few, tmp_path / "second", show_progress=False)

    first, second = (spelt_out, {}) if is_first else ({}, spelt_out)
    config = make_config(protocol, "cos_eos", device="cpu", options=first)
    config = dataclasses.replace(config, network="lenet_plus_plus", network_options={})
    trainer_for(config, few, tmp_path).save()
    assert_same(weights_of(tmp_path), dict(started_from_first(second).model.state_dict()))
    with pytest.raises(ValueError, match="'seed': 7"):
        started_from_first(second | {"split_seed": 7})


def test_weights_are_taken_over_where_a_part_of_the_validation_judges(
    few: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it calibrates, and all of it is what the first run was validated beside."""
    trainer_for(config_for(epochs=1), few, tmp_path / "first").save()
    config = config_for(options={"initial_weights": str(tmp_path / "first")})
    fewer = dataclasses.replace(few, validation=few.validation.subset(np.arange(100)))
    second = Trainer(
        config, fewer, tmp_path / "second", show_progress=False, calibration=few.validation
    )
    assert_same(weights_of(tmp_path / "first"), dict(second.model.state_dict()))
    assert "other images" not in caplog.text


def test_finished_run_stays_as_it_is(few: Any, tmp_path: Path) -> None:
    config = config_for(epochs=1)
    trainer_for(config, few, tmp_path / "run").run()
    before = (tmp_path / "run" / "last.pt").stat().st_mtime_ns
    again = trainer_for(config, few, tmp_path / "run")
    again.resume()
    again.run()
    assert (tmp_path / "run" / "last.pt").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_folder_is_refused(few: Any, tmp_path: Path) -> None:
    config = config_for()
    begun_run(tmp_path / "run", config)
    other = dataclasses.replace(config, loss_options={**config.loss_options, "scale": 20.0})
    with pytest.raises(ValueError, match="loss_options"):
        check_folder(tmp_path / "run", other)


@pytest.mark.parametrize(
    "start", [train, lambda config, **options: train_stack([config], **options)]
)
def test_another_configuration_is_refused_before_any_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Any
) -> None:
    begun_run(tmp_path / "run", config_for(name="run"))
    monkeypatch.setattr(TrainConfig, "load_data", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(ValueError, match=r"another configuration.*data_options"):
        start(config_for(name="run", options={"size": "small"}), runs=tmp_path)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.json"]


def test_configuration_follows_a_run_that_died_before_its_first_checkpoint(
    few: Any, tmp_path: Path
) -> None:
    begun_run(tmp_path, config_for(epochs=1))
    later = config_for(epochs=2, options={"scores": "energy"})
    with Trainer(later, few, tmp_path, show_progress=False).opened():
        assert Run(tmp_path).config == later


def test_refused_images_leave_the_configuration_as_it_was(few: Any, tmp_path: Path) -> None:
    trainer_for(config_for(epochs=1), few, tmp_path).save()
    other = dataclasses.replace(few, train=few.train.subset(np.arange(len(few.train))[::-1].copy()))
    later = Trainer(config_for(epochs=2), other, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match="other images"), later.opened():
        pass
    assert Run(tmp_path).config.epochs == 1


def test_non_finite_loss_stops_with_advice_and_keeps_the_sound_checkpoint(
    few: Any, tmp_path: Path
) -> None:
    config = config_for("softmax", options={"learning_rate": 1e30})
    trainer = trainer_for(config, few, tmp_path / "run")
    trainer.save()
    sound = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(TrainingDiverged, match="smaller learning_rate"):
        trainer.run()
    assert (tmp_path / "run" / "last.pt").read_bytes() == sound


_ANY, _MARGIN, _RADIAL = "max_gradient_norm=5", "margin_warmup_epochs=5", "detach_radial=true"


@pytest.mark.parametrize(
    ("loss", "changes", "expected"),
    [
        ("arc_os", {}, {_ANY, _MARGIN, _RADIAL}),
        ("cos_eos_sfn", {}, {_ANY, _MARGIN, _RADIAL}),
        ("cos_eos_sfn", {"options": {"as_published": True}}, {_ANY, _MARGIN}),  # hard there
        ("cos_eos", {}, {_ANY, _MARGIN}),
        ("cos_eos", {"options": {"head": "soft"}}, {_ANY, _MARGIN, _RADIAL}),
        ("sm_softmax", {}, {_ANY, _MARGIN}),
        ("norm_os", {}, {_ANY}),
        ("softmax", {"preset": "modern"}, set()),
        ("arc_os", {"options": {"margin_warmup_epochs": 2, "detach_radial": True}}, {_ANY}),
    ],
)
def test_advice_names_options_that_the_loss_takes_and_the_run_lacks(
    few: Any, tmp_path: Path, loss: str, changes: dict[str, Any], expected: set[str]
) -> None:
    trainer = Trainer(config_for(loss, **changes), few, tmp_path, show_progress=False)
    told = str(trainer._diverged("the loss is nan"))
    assert "a smaller learning_rate" in told
    assert {option for option in (_ANY, _MARGIN, _RADIAL) if option in told} == expected
    for option in expected:  # and each of them is accepted
        options = {**changes.get("options", {}), **dict([parse_option(option)])}
        config_for(loss, **{**changes, "options": options}).build_model(10)


def with_accuracies(
    accuracies: list[float], data: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    """A run that learns nothing and finds these accuracies, epoch by epoch, late enough to be judged by them."""
    left = iter(accuracies)
    monkeypatch.setattr(engine, "_EARLIEST_COLLAPSE_STEPS", 0)
    sound = {"confidence": 1.0, "validation_loss_without_margin": 1.0}
    monkeypatch.setattr(Trainer, "_train_epoch", lambda *_: None)
    monkeypatch.setattr(engine, "validate", lambda *_: sound | {"validation_accuracy": next(left)})
    return trainer_for(config_for(epochs=len(accuracies)), data, folder)


@pytest.mark.parametrize(
    ("accuracies", "stopped_at"),
    [
        ([0.9, 0.8, 0.1, 0.1, 0.11, 0.1, 0.1, 0.1], 5),
        ([0.9, 0.1, 0.1, 0.13, 0.1, 0.1, 0.1, 0.9], 7),
        ([0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1, 0.1], None),  # a slow start, two bad epochs
        ([0.13] * 8, None),
    ],
)
def test_collapse_with_a_finite_loss_is_a_divergence(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracies: list[float], stopped_at: int | None
) -> None:  # fmt: skip
    trainer = with_accuracies(accuracies, small, tmp_path / "run", monkeypatch)
    if stopped_at is None:
        trainer.run()
        return
    with pytest.raises(TrainingDiverged, match=f"collapsed.*in epoch {stopped_at}"):
        trainer.run()
    assert Run(tmp_path / "run").load_checkpoint()["progress"]["epoch"] == stopped_at - 1


@pytest.mark.parametrize(("earliest", "stopped_at"), [(5, 5), (7, 7), (9, None)])
def test_so_few_steps_that_a_network_may_still_guess_are_no_collapse(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earliest: int, stopped_at: int | None
) -> None:  # fmt: skip
    trainer = with_accuracies([0.1] * 8, small, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(engine, "_EARLIEST_COLLAPSE_STEPS", earliest * trainer.steps_per_epoch)
    if stopped_at is None:
        trainer.run()
        return
    with pytest.raises(TrainingDiverged, match=f"collapsed.*in epoch {stopped_at}"):
        trainer.run()


def test_one_right_of_two_is_no_collapse(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own classes of ten images each have two to validate with, and one of the two judges the epochs."""
    two = np.concatenate([np.flatnonzero(small.validation.labels == label)[:2] for label in (0, 1)])
    data = dataclasses.replace(
        small,
        class_ids=small.class_ids[:2],
        train=small.train.subset(np.flatnonzero(small.train.labels < 2)),
        validation=small.validation.subset(two),
    )
    trainer = with_accuracies([0.5] * 8, data, tmp_path / "run", monkeypatch)
    assert len(trainer.validation) == 2
    trainer.run()
    assert trainer.progress.epoch == 8


@pytest.mark.parametrize(
    ("correct", "count", "num_classes", "expected"),
    [
        (0, 0, 2, False),
        (0, 2, 2, False),
        (1, 2, 2, False),
        (10, 20, 2, False),
        (50, 100, 2, True),
        (120, 200, 2, False),  # at the limit
        (2, 23, 10, False),
        (30, 300, 10, True),
        (36, 300, 10, False),
        (1, 116, 116, True),
        (150, 1950, 15, True),
    ],
)
def test_so_many_right_tell_a_guess_or_do_not(
    correct: int, count: int, num_classes: int, expected: bool
) -> None:
    assert is_useless(correct, count, num_classes) is expected


@pytest.mark.parametrize("num_classes", [2, 3, 10, 19, 20, 116])
@pytest.mark.parametrize("count", [2, 5, 20, 100, 1000])
def test_model_above_a_guess_is_rarely_taken_for_useless(num_classes: int, count: int) -> None:
    called = [number for number in range(count + 1) if is_useless(number, count, num_classes)]
    accuracy = 1 / num_classes + 0.1
    assert sum(binom.pmf(called, count, accuracy)) <= 0.05


def test_useless_accuracy_is_far_below_a_useful_one_for_any_number_of_classes() -> None:
    assert useless_accuracy(116) == pytest.approx(2 / 116)
    assert useless_accuracy(6) == pytest.approx(0.2)


@pytest.mark.parametrize("before", [False, True])
def test_training_does_not_inherit_how_convolutions_are_rounded(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with fast_convolutions(torch.device("cuda")):
        assert torch.backends.cudnn.allow_tf32 is True
    assert torch.backends.cudnn.allow_tf32 is before


def test_full_disk_leaves_the_former_checkpoint(few: Any, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(), few, tmp_path / "run")
    trainer.save()
    sound = (tmp_path / "run" / "last.pt").read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(sound) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="earlier checkpoints are intact"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "last.pt").read_bytes() == sound
    assert not list((tmp_path / "run").glob("*.partial"))


def test_damaged_checkpoint_is_refused_and_names_the_way_out(few: Any, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(), few, tmp_path / "run")
    for name in ("last.pt", "best.pt"):
        trainer.save(name)
        file = tmp_path / "run" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # of a weight
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt cannot be read.*put .*best\.pt"):
        trainer.resume()
    for which, way_out in (("last", r"put .*best\.pt"), ("best", "take the last epoch")):
        with pytest.raises(ValueError, match=rf"{which}\.pt cannot be read.*{way_out}"):
            Run(tmp_path / "run").load_model(which)


def test_second_process_of_a_run_is_refused_and_touches_nothing(few: Any, tmp_path: Path) -> None:
    config = config_for(epochs=1, name="run")
    first = Trainer(config, few, tmp_path / "run", show_progress=False)
    with first.opened():
        first.save()
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
        with pytest.raises(
            RunInUse, match=r"another process is training .*run; wait for it.*--name"
        ):
            train(config, runs=tmp_path, data=few, show_progress=False)
        with pytest.raises(RunInUse):
            train_stack([config], runs=tmp_path, data=few, show_progress=False)
        assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    # Free again, also for a stack, which holds it to its end.
    steps = StackedTrainer._next_step

    def step_beside_another(self: StackedTrainer) -> None:
        with pytest.raises(RunInUse), locked_run(tmp_path / "run"):
            pass
        steps(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StackedTrainer, "_next_step", step_beside_another)
        assert train_stack([config], runs=tmp_path, data=few, show_progress=False) == {}
    with locked_run(tmp_path / "run"):
        pass


def test_only_the_writer_of_several_processes_locks_the_run(few: Any, tmp_path: Path) -> None:
    other = Trainer(config_for(epochs=1), few, tmp_path / "run", show_progress=False)
    other.is_writer = False
    with locked_run(tmp_path / "run"), other.opened():
        pass


def test_process_that_a_killed_trainer_leaves_behind_does_not_hold_its_run(tmp_path: Path) -> None:
    """As the processes that load data, which notice a killed parent seconds later."""
    program = f"""
import os, signal, time
from pathlib import Path
from training.run_folder import locked_run
with locked_run(Path({str(tmp_path / "run")!r})):
    child = os.fork()
    if not child:
        os.close(1)
        time.sleep(60)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    left_behind = int(done.stdout)
    try:
        with locked_run(tmp_path / "run"):
            os.kill(left_behind, 0)  # it lives
    finally:
        os.kill(left_behind, signal.SIGKILL)


def test_cache_that_changes_the_views_belongs_to_the_run(tmp_path: Path) -> None:
    def photographs(preset: str, cache: str | None) -> TrainConfig:
        return make_config("p1", "cos_os", preset=preset, device="cpu", cache=cache, name="run")

    for preset, refused in (("thesis", False), ("modern", True)):
        begun_run(tmp_path / preset, photographs(preset, None))
        if refused:
            with pytest.raises(ValueError, match="cache"):
                check_folder(tmp_path / preset, photographs(preset, "folder"))
        else:
            check_folder(tmp_path / preset, photographs(preset, "folder"))
    names = {
        dataclasses.replace(photographs("modern", cache)).default_name()
        for cache in (None, "one", "two")
    }
    assert len(names) == 2
    assert photographs("thesis", "auto").cache is None  # a processor decodes on the way
    assert config_for(options={"checkpoint_seconds": 7}).name == config_for().name


def test_losses_without_negatives_never_see_one(few: Any, tmp_path: Path) -> None:
    for loss, expected in (("cosface", False), ("cos_os", True)):
        trainer = Trainer(config_for(loss), few, tmp_path, show_progress=False)
        seen = torch.cat([labels for _, labels in trainer._batches()])
        assert bool((seen == NEGATIVE).any()) is expected
        assert len(list(trainer._batches())) == trainer.steps_per_epoch


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_an_epoch_without_a_non_finite_value(
    few: Any, tmp_path: Path, loss: str
) -> None:
    trainer = trainer_for(config_for(loss, epochs=1), few, tmp_path / loss)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    row = trainer.run()
    assert all(np.isfinite(value) for value in row.values())
    after = weights_of(tmp_path / loss)
    assert all(torch.isfinite(value).all() for value in after.values())
    for name in ("network.feature.weight", "head.weight"):
        assert not torch.equal(before[name], after[name])


def test_confidence_is_the_thesis_formula(few: Any) -> None:
    from openset.heads import OpenSetOutput
    from training.data import Split

    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])

    class Fixed(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> OpenSetOutput:
            return OpenSetOutput(features, logits, logits)

    labels = np.array([0, 2, NEGATIVE])
    split = Split(
        torch.zeros(3, 1, 28, 28, dtype=torch.uint8), labels, labels.astype(str), labels.astype(str)
    )
    model = torch.nn.ModuleDict({"network": torch.nn.Identity(), "head": Fixed()})
    row = engine.validate(model, split, few.preprocessing, torch.device("cpu"), config_for())
    probabilities = logits.softmax(1)
    assert row["known_confidence"] == pytest.approx(
        (probabilities[0, 0] + probabilities[1, 2]).item() / 2
    )
    assert row["negative_confidence"] == pytest.approx(1 + 1 / 3 - probabilities[2].max().item())
    assert row["validation_accuracy"] == 0.5


def test_default_names_tell_runs_apart_and_know_equal_ones() -> None:
    assert config_for().name == config_for().name
    names = {
        config_for(options=options).name
        for options in (
            {},
            {"cosine_margin": 0.2},
            {"feature_dim": 11},
            {"batch_size": 16},
            {"activation": "none"},
        )
    }
    assert len(names) == 5
    assert config_for().name.startswith("glyphs-cos_eos-thesis-s1-")


def test_as_published_sets_all_deviations() -> None:
    config = make_config("toy", "cos_os", options={"as_published": True}, device="cpu")
    assert config.network_options == {"feature_bias": True, "activation": "none"}
    assert config.data_options == {"digits": "mnist"}
    head, criterion = config.build_model(10)[1:]
    assert (criterion.spec.cce_mean, head.center_norm) == ("known", "projected")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a=1", ("a", 1)), ("a=1e-3", ("a", 0.001)), ("a=true", ("a", True)), ("a=b=c", ("a", "b=c"))],
)
def test_options_are_read_as_json_or_text(text: str, expected: tuple[str, Any]) -> None:
    assert parse_option(text) == expected


def test_unknown_option_of_a_loss_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"softmax.*no option cosine_margin;"):
        config_for("softmax", options={"cosine_margin": 0.3, "size": "small"})


# The real command on 20 images of a class, with a checkpoint every fifth step.
FEW_IMAGES = """
import dataclasses, sys
import training.engine, training.runs
from training.data import at_most
from training.train import main

def few(*arguments, **options):
    data = load_all(*arguments, **options)
    return dataclasses.replace(data, train=at_most(data.train, 20))

load_all, training.runs.load_protocol = training.runs.load_protocol, few
training.engine.LOG_EVERY = 5
sys.exit(main(sys.argv[1:]))
"""


def test_process_killed_at_a_random_moment_continues(tmp_path: Path) -> None:
    """kill -9 of the real command; the same command then ends with the weights of an undisturbed run."""
    command = [
        sys.executable, "-c", FEW_IMAGES,
        "--protocol", "glyphs", "--loss", "arc_os", "--epochs", "1", "--option", "size=small", "--quiet",
        "--device", "cpu", "--runs", str(tmp_path), "--option", "checkpoint_seconds=0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--name", name], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )

    assert start("whole").wait() == 0
    process = start("killed")
    checkpoint = tmp_path / "killed" / "last.pt"
    while not checkpoint.exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    step = Run(tmp_path / "killed").load_checkpoint()["progress"]["step"]
    assert start("killed").wait() == 0
    assert step > 0
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))


def test_random_kills_change_nothing(tmp_path: Path) -> None:
    """Three of the fifty that ``make chaos`` does, with fewer images."""
    from benchmarks.train_chaos import survive

    outcome = survive(3, seed=1, runs=tmp_path, per_class=16, show_progress=False)
    assert outcome.kills == 3
    assert outcome.resumed >= 1
    assert outcome.different == []
