"""What is settled before the first of several trainings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openset.labels import NEGATIVE, UNKNOWN
from tests.factories import begun_run, character_data
from training import compare_losses, cures, recommend
from training.arms import CURES
from training.comparisons import require_trainable, with_epochs_in_name
from training.data import ProtocolData
from training.runs import TrainConfig, make_config

DATA = character_data(train=(0, 1, NEGATIVE), validation=(0, 1), test=(0, UNKNOWN), count=4)
WITHOUT_UNKNOWNS = replace(DATA, test=DATA.validation)


def trial(epochs: int, **options: Any) -> TrainConfig:
    return make_config("glyphs", "cos_eos", device="cpu", epochs=epochs, options=options)


def test_trial_with_fewer_epochs_is_a_run_of_its_own(tmp_path: Path) -> None:
    short, long = (with_epochs_in_name(trial(epochs), tmp_path, "-hidden") for epochs in (1, 120))
    assert short.name == f"{trial(1).name}-e1-hidden"
    begun_run(tmp_path / short.name, short)
    assert with_epochs_in_name(trial(120), tmp_path, "-hidden") == long
    assert long.name == f"{trial(1).name}-e120-hidden"
    require_trainable(long, num_classes=10, runs=tmp_path)


def test_run_under_a_name_without_epochs_is_found_if_it_had_as_many(tmp_path: Path) -> None:
    former = replace(trial(15), name=f"{trial(15).name}-hidden")
    begun_run(tmp_path / former.name, former)
    assert with_epochs_in_name(trial(15), tmp_path, "-hidden") == former
    assert with_epochs_in_name(trial(15), tmp_path).name == f"{trial(15).name}-e15"
    assert with_epochs_in_name(trial(120), tmp_path, "-hidden").name.endswith("-e120-hidden")


def test_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    config = trial(1)
    begun_run(tmp_path / config.name, replace(trial(1, feature_dim=5), name=config.name))
    with pytest.raises(ValueError, match="another configuration"):
        require_trainable(config, num_classes=10, runs=tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that the commands train; each is stopped there."""
    names: list[str] = []

    def stop(config: TrainConfig, **_: Any) -> None:
        names.append(config.name)
        raise OSError("far enough")

    for command in (compare_losses, cures, recommend):
        monkeypatch.setattr(command, "train", stop)
    return names


def shows(monkeypatch: pytest.MonkeyPatch, data: ProtocolData) -> None:
    monkeypatch.setattr("training.runs.load_protocol", lambda *_, **__: data)


COMMANDS = [
    (compare_losses, ["--losses", "softmax"], ""),
    (cures, ["--cure", "arc_os"], ""),
    (cures, ["--cure", "arc_os", "--per-class", "3"], "-n3"),
    (recommend, [], "-hidden"),
    (recommend, ["--per-class", "3"], "-hidden-n3"),
]


@pytest.mark.parametrize(("command", "words", "ending"), COMMANDS)
def test_every_comparison_names_its_runs_by_their_epochs(
    command: Any, words: list[str], ending: str, trained: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    negatives = character_data(
        train=(0, 1, NEGATIVE), validation=(0, 1, NEGATIVE), test=(0, UNKNOWN), count=4
    )
    train = negatives.train
    groups = train.groups.astype("U9")
    groups[train.labels == NEGATIVE] = ["A", "A", "B", "B"]
    shows(monkeypatch, replace(negatives, train=replace(train, groups=groups)))
    assert command.main([*words, "--epochs", "3", "--runs", str(tmp_path)]) == 1
    [name] = trained
    assert name.endswith(f"-e3{ending}")


@pytest.mark.parametrize(("command", "words"), [(c, words) for c, words, _ in COMMANDS[:2]])
def test_data_without_unknowns_are_refused_before_any_training(
    command: Any, words: list[str], trained: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shows(monkeypatch, WITHOUT_UNKNOWNS)
    assert command.main([*words, "--runs", str(tmp_path)]) == 1
    assert "compares models on unknown classes" in caplog.text
    assert trained == []


def test_arm_that_does_not_fit_the_protocol_is_refused_before_the_others_are_trained(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    shows(monkeypatch, DATA)
    words = ["--cure", "turned_negatives", "--protocol", "p3", "--runs", str(tmp_path)]
    assert cures.main(words) == 1
    assert "cos_eos, turned_negatives=0.25: turned_negatives is for characters" in caplog.text
    assert trained == []


@pytest.mark.parametrize(
    ("command", "words", "option"),
    [
        (cures, ["--cure", "feature_dim", "--arms", "cos_eos, K=C"], "feature_dim=64"),
        (recommend, ["--candidates", "cos_eos, thesis", "cos_eos, thesis, turned"], "turned_negatives=0.5"),
    ],
)  # fmt: skip
def test_option_in_which_arms_differ_is_refused_for_all_of_them(
    command: Any, words: list[str], option: str, trained: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shows(monkeypatch, DATA)
    assert command.main([*words, "--option", option, "--runs", str(tmp_path)]) == 1
    assert f"{option.split('=')[0]} cannot be the same for all" in caplog.text
    assert trained == []


def test_folder_that_blocks_a_later_arm_is_named_before_the_others_are_trained(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    shows(monkeypatch, DATA)
    last = CURES["arc_os"][-1]
    options = {"precision": "auto", **last.options}
    config = make_config("glyphs", last.loss, preset=last.preset, options=options)
    begun_run(tmp_path / config.name, replace(config, seed=7))
    assert cures.main(["--cure", "arc_os", "--runs", str(tmp_path)]) == 1
    assert f"{last.name}: {tmp_path / config.name} holds a run with another" in caplog.text
    assert trained == []


@pytest.mark.parametrize("command", [cures, recommend, compare_losses])
def test_rows_are_written_before_the_table_is_printed(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the table is broken")

    monkeypatch.setattr(command, "print_table", broken)
    for name in ("compare_arms", "judge", "compare"):
        monkeypatch.setattr(command, name, lambda *_, **__: [], raising=False)
    monkeypatch.setattr(recommend, "choose", lambda _: {"why_provisional": []})
    target = tmp_path / "rows.json"
    words = ["--cure", "scale"] if command is cures else []
    with pytest.raises(RuntimeError, match="broken"):
        command.main([*words, "--json", str(target)])
    assert target.is_file()
