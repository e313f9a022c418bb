"""The artifact's folder under several hands: replaced whole, changed by one command at a time, found again after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def _old(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".old")


@contextlib.contextmanager
def locked(artifact: Path) -> Iterator[None]:
    """Nobody else changes the artifact meanwhile; waits for whoever does. The lock lies beside it, since it is replaced."""
    with artifact.with_name(artifact.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def recover(artifact: Path) -> None:
    """Bring back the artifact that a kill in the middle of ``replace_artifact`` left beside its place."""
    old = _old(artifact)
    if old.is_dir() and not artifact.exists():
        logger.warning("an interrupted export had moved %s away; it is back", artifact)
        old.rename(artifact)


def replace_artifact(staging: Path, artifact: Path) -> None:
    """Put the whole artifact ``staging`` in the place of another; at every moment one of both is whole on disk."""
    old = _old(artifact)
    shutil.rmtree(old, ignore_errors=True)
    if artifact.exists():
        artifact.rename(old)
    staging.rename(artifact)
    shutil.rmtree(old, ignore_errors=True)
