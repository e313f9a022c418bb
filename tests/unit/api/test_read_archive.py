"""What is no archive of ours is one kind of error, whatever the damage."""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
from pathlib import Path

import pytest

from api.archive import read_archive


def test_every_damaged_byte_of_the_directory_is_a_value_error_or_none(
    archive: Path, tmp_path: Path
) -> None:
    """Compression methods that do not exist, passwords, sizes, names, places."""
    sound, file = archive.read_bytes(), tmp_path / "damaged.mar"
    begin, end = int.from_bytes(sound[-6:-2], "little"), len(sound)
    directory = [*range(begin, begin + 46), *range(end - 22, end)]  # its first entry and its end
    refused = 0
    for at in directory:
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
        with contextlib.suppress(ValueError):
            read_archive(file)
            continue
        refused += 1
    assert refused > len(directory) // 3


@pytest.mark.parametrize("card", [b"[" * 100_000, b"[]", b"\xff"])
def test_card_that_is_none_is_a_value_error(archive: Path, tmp_path: Path, card: bytes) -> None:
    file = tmp_path / "damaged.mar"
    with zipfile.ZipFile(archive) as sound, zipfile.ZipFile(file, "w") as damaged:
        for name in sound.namelist():
            damaged.writestr(name, card if name == "model_card.json" else sound.read(name))
    with pytest.raises(ValueError, match=r"damaged\.mar is not an archive of this product"):
        read_archive(file)


def test_broken_compression_is_a_value_error(archive: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.mar"
    with (
        zipfile.ZipFile(archive) as sound,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in sorted(sound.namelist(), reverse=True):  # weights first
            packed.writestr(name, sound.read(name))
    data = bytearray(file.read_bytes())
    data[60:70] = b"\xff" * 10
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is not an archive of this product"):
        read_archive(file)


def test_archive_that_may_not_be_read_is_not_called_damaged(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, since the administrator may read everything."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(archive))

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*tiny\.mar"):
        read_archive(archive)
