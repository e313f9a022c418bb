"""Files of scores and summaries that are damaged: each says which it is and what to do, whatever the bytes make numpy raise."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import FOREIGN_DEG, KNOWN_DEG, scored_at
from training.grid.summaries import FPR_GRID, Summary, stored_summary
from training.scoring import Scored
from training.stored_arrays import loaded


@pytest.fixture(params=["scores", "summary"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], Any]]:
    file = tmp_path / "stored.npz"
    if request.param == "scores":
        scored_at(KNOWN_DEG, FOREIGN_DEG).save(file)
        return file, Scored.load
    key = ("unknowns", "softmax")
    Summary("2026", {key: {"0.1": np.linspace(0, 1, 50)}}, {key: FPR_GRID}).save(file)
    return file, Summary.load


def test_file_with_any_one_byte_changed_is_read_or_refused_by_name(
    stored: tuple[Path, Callable[[Path], Any]],
) -> None:
    file, load = stored
    whole, told, causes = file.read_bytes(), [], set()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            load(file)
        except ValueError as error:
            told.append(str(error))
            causes.add(type(error.__cause__).__name__)
    assert all(text.startswith(f"{file} is damaged (") for text in told)
    assert all(text.endswith("restore or remove it") for text in told)
    assert {"BadZipFile", "NotImplementedError", "error"} <= causes  # the last is zlib's
    file.write_bytes(whole)
    load(file)


def test_cut_or_empty_file_is_refused_and_one_that_is_not_there_is_called_so(
    stored: tuple[Path, Callable[[Path], Any]],
) -> None:
    file, load = stored
    whole = file.read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"stored\.npz is damaged"):
            load(file)
        assert stored_summary(file, "2026") is None
    file.unlink()
    with pytest.raises(FileNotFoundError):
        load(file)


def test_size_that_no_machine_has_room_for_is_damage(
    stored: tuple[Path, Callable[[Path], Any]],
) -> None:
    file, load = stored
    with zipfile.ZipFile(file) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    name, content = next(iter(contents.items()))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**60,)}
    )
    with zipfile.ZipFile(file, "w") as damaged:
        for other, as_it_is in contents.items():
            damaged.writestr(other, header.getvalue() + content if other == name else as_it_is)
    with pytest.raises(ValueError, match=r"stored\.npz is damaged .*its header says"):
        load(file)


@pytest.mark.parametrize("error", [PermissionError(13, "not yours"), MemoryError("no room")])
def test_what_says_nothing_about_the_file_does_not_call_it_damaged(
    tmp_path: Path, error: Exception
) -> None:
    np.savez(tmp_path / "sound.npz", values=np.zeros(3))

    def read() -> None:
        with loaded(tmp_path / "sound.npz"):
            raise error

    with pytest.raises(type(error)):
        read()
