"""Replaced files are whole, and on the disk before they take their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from training import durable
from training.durable import replacing


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synchronise(descriptor: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"new"
        done.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", synchronise)
    monkeypatch.setattr(durable.os, "replace", rename)
    file = tmp_path / "file"
    with replacing(file) as stream:
        stream.write(b"new")
    assert done == [
        ("fsync", f"{file}.partial"), ("replace", str(file)), ("fsync", str(tmp_path)),
    ]  # fmt: skip
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"new")]


def test_error_leaves_the_former_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"former")

    def interrupted() -> None:
        with replacing(file) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"former")]
