"""What a command that compares trainings settles before the first: which runs they are, and that none will be refused later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from openset.labels import UNKNOWN
from training.arms import Arm
from training.data import ProtocolData
from training.run_folder import check_folder
from training.runs import CONFIG, TrainConfig


def with_epochs_in_name(config: TrainConfig, runs: Path, ending: str = "") -> TrainConfig:
    """The configuration under a name that holds its number of epochs, so that a short trial is a run of its own.

    Names of earlier releases do not hold it: a run of that name with as many epochs is this one, and keeps it.

    Args:
        config: with its default name.
        runs: where the runs lie.
        ending: of the name.
    """
    former = config.name + ending
    file = runs / former / CONFIG
    is_this_run = file.is_file() and TrainConfig.from_json(file.read_text()).epochs == config.epochs
    return replace(
        config, name=former if is_this_run else f"{config.name}-e{config.epochs}{ending}"
    )


def require_trainable(config: TrainConfig, *, num_classes: int, runs: Path) -> None:
    """Build head and loss for C classes and look into the run's folder; nothing is kept.

    Raises:
        ValueError: the loss does not take its options or so few classes, or the folder holds another run.
    """
    check_folder(runs / config.name, config)
    config.head_and_criterion(num_classes)


def require_common(options: Iterable[str], arms: Iterable[Arm]) -> None:
    """Refuse options for all arms that one of them sets itself: others would bear the name of a value that they do not have.

    Raises:
        ValueError: names the option and an arm.
    """
    for arm in arms:
        if taken := sorted(set(options) & set(arm.options)):
            raise ValueError(
                f"{', '.join(taken)} cannot be the same for all: it is what variants differ in here ({arm.name}); leave it out "
                "of OPTIONS"
            )


def require_unknowns(data: ProtocolData) -> None:
    """Refuse data without unknown classes where models are to be compared on them.

    Raises:
        ValueError: the test part holds no unknown.
    """
    if not (data.test.labels == UNKNOWN).any():
        raise ValueError(
            f"this command compares models on unknown classes, and the data of {data.name} have no images of them; "
            "add some (protocol folders: foreign images in unknown/ that are not in negative/)"
        )
