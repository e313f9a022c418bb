"""What a command that compares trainings settles before the first: that none will be refused later."""

from __future__ import annotations

from pathlib import Path

from openset.labels import UNKNOWN
from training.data import ProtocolData
from training.run_folder import check_folder
from training.runs import TrainConfig


def require_trainable(config: TrainConfig, *, num_classes: int, runs: Path) -> None:
    """Build head and loss for C classes and look into the run's folder; nothing is kept.

    Raises:
        ValueError: the loss does not take its options or so few classes, or the folder holds another run.
    """
    check_folder(runs / config.name, config)
    config.head_and_criterion(num_classes)


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
