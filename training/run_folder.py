"""A run's folder: whom it belongs to, and that one process at a time trains there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.runs import CONFIG, HOW_NOT_WHAT, TrainConfig

_LOCK = "lock"
_CLAIM = "claim"
_held: set[int] = set()


class RunInUse(ValueError):
    """Another process trains the run."""


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile; it is made if it is not there. A kill ends the lock with the process.

    Raises:
        RunInUse: somebody does.
    """
    with _locked(
        folder / _LOCK,
        f"another process is training {folder}; wait for it, or give this run another name (NAME=, --name)",
    ):
        yield


@contextmanager
def claimed_run(folder: Path) -> Iterator[None]:
    """Nobody else trains and evaluates this cell of a grid meanwhile; as ``locked_run``, which it goes around.

    Raises:
        RunInUse: somebody does.
    """
    with _locked(folder / _CLAIM, f"another process works on {folder}"):
        yield


@contextmanager
def _locked(file: Path, message: str) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written to by nobody; network file systems lock only what is open for writing.
    lock = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    _held.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUse(message) from None
        yield
    finally:
        if lock in _held:
            _held.remove(lock)
            os.close(lock)


def check_folder(folder: Path, config: TrainConfig) -> None:
    """Whether a run may be trained in the folder: a new one, or one that goes on. Nothing is written.

    Raises:
        ValueError: the folder holds a run with another configuration, or one that is trained further.
    """
    file = folder / CONFIG
    if not file.is_file():
        return
    former = TrainConfig.from_json(file.read_text())
    now, then = json.loads(config.to_json()), json.loads(former.to_json())
    changed = sorted(
        key
        for key in now
        if now[key] != then[key] and key not in (*HOW_NOT_WHAT, "epochs", "scores")
    )
    if config.views_from_cache != former.views_from_cache:
        changed.append("cache (it changes the views of this augmentation)")
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration (different: {', '.join(changed)}); "
            "give this one another NAME= or remove that folder"
        )
    if config.epochs != former.epochs and config.training.schedule != "constant":
        raise ValueError(
            f"{folder} was started with epochs={former.epochs}; its {config.training.schedule} schedule depends on "
            f"that number, so it cannot go on with {config.epochs}. Give this run another NAME="
        )
    if config.epochs < former.epochs:
        raise ValueError(
            f"{folder} was started with epochs={former.epochs}, more than the {config.epochs} now asked for; "
            "give this run another NAME="
        )


def _let_go() -> None:
    """A process that loads data may outlive a killed trainer for seconds: it must not keep the lock that it inherits."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
