"""A damaged checkpoint is never taken for a sound one, whichever byte it is."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoints import read_checkpoint, write_checkpoint


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": {"weight": torch.randn(7, 3), "steps": torch.tensor(90)},
        "progress": {"epoch": 3, "loss_sum": 1.5, "history": [{"accuracy": 0.25}]},
        "class_ids": ["ant", "bee"],
        "averaged": None,
    }


def is_same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "last.pt", state())
    return tmp_path / "last.pt"


def test_state_comes_back_and_torch_reads_the_file_too(file: Path) -> None:
    assert is_same(read_checkpoint(file), state())
    assert is_same(torch.load(file, weights_only=True), state())


def test_no_changed_byte_is_taken_for_what_was_saved(file: Path) -> None:
    raw = file.read_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"last\.pt cannot be read \(.*best\.pt"):
            read_checkpoint(file)


def test_changed_weight_in_a_checkpoint_of_an_earlier_release_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "best.pt"
    torch.save(state(), file)
    assert is_same(read_checkpoint(file), state())
    changed = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as stored:
        [weight] = [name for name in stored.namelist() if name.endswith("data/0")]
        changed[changed.index(stored.read(weight)) + 5] ^= 1
    file.write_bytes(changed)
    assert not is_same(torch.load(file, weights_only=True), state())
    with pytest.raises(ValueError, match=r"data/0 is not as written.*take the last epoch"):
        read_checkpoint(file)


@pytest.mark.parametrize("size", [0, 1, 20, 100, 1000, -33, -1])
def test_shortened_file_is_refused(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"last\.pt cannot be read.*best\.pt"):
        read_checkpoint(file)
