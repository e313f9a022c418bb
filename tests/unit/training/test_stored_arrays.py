"""Files of scores and summaries that are damaged: each says which it is and what to do, whatever the bytes make numpy raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import FOREIGN_DEG, KNOWN_DEG, scored_at
from training.grid_summaries import FPR_GRID, Summary, stored_summary
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


def test_size_that_no_machine_has_room_for_is_damage(tmp_path: Path) -> None:
    np.savez(tmp_path / "sizes.npz", values=np.zeros(3))

    def read() -> None:
        with loaded(tmp_path / "sizes.npz"):
            raise MemoryError("Unable to allocate 7 EiB")

    with pytest.raises(ValueError, match=r"sizes.npz is damaged \(MemoryError: Unable"):
        read()
