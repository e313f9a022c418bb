"""Checkpoints on disk: written whole, and read as they were written or refused.

Behind the zip that ``torch.save`` makes lie the 32 bytes of its SHA-256. ``torch.load`` passes over them, and takes changed
weights for good ones.
"""

from __future__ import annotations

import hashlib
import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch

from training.durable import replacing

LAST = "last.pt"
BEST = "best.pt"

_DIGEST_LENGTH = hashlib.sha256().digest_size
_ZIP_END, _ZIP_END_LENGTH = b"PK\5\6", 22


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write a state in one step.

    Raises:
        OSError: the disk is full or gone; the file stays as it was.
        RuntimeError: likewise, as torch says it.
    """
    with replacing(file) as stream:
        torch.save(state, stream)
        stream.seek(0)
        stream.write(hashlib.file_digest(stream, "sha256").digest())


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The stored state, on the CPU.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read here and now, which says nothing about it.
        MemoryError: likewise.
    """
    try:
        _check(file)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged zip or pickle raises anything
        way_out = (
            f"put {file.with_name(BEST)} in its place to go on from the best epoch, or remove it to start anew"
            if file.name == LAST
            else f"take the last epoch, or remove {file.parent} and train anew"
        )
        raise ValueError(
            f"{file} cannot be read ({error}); it was damaged after it was written: {way_out}"
        ) from error
    return state


def _check(file: Path) -> None:
    """Raise ValueError, or what a damaged zip raises, if the file is not as it was written."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        if raw[-_ZIP_END_LENGTH:].startswith(_ZIP_END):
            # Of an earlier release, which wrote the zip alone: the CRC-32 of its entries tells of changed content.
            with zipfile.ZipFile(stream) as stored:
                changed = stored.testzip()
            if changed is not None:
                raise ValueError(f"{changed} is not as written")
            return
        with memoryview(raw) as content:
            found = hashlib.sha256(content[:-_DIGEST_LENGTH]).digest()
        if found != raw[-_DIGEST_LENGTH:]:
            raise ValueError("its bytes are not those that were written")
