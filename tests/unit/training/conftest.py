"""A grid of two losses that were never trained, for the tests of its report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.grid_runs import cells, finished_run, written
from training.grid import pages


@pytest.fixture(scope="session")
def two_losses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cos_eos and eos as published with two seeds; cos_eos with EMNIST's digits too. To be read only."""
    root = tmp_path_factory.mktemp("grid")
    for loss, quality in (("cos_eos", 6.0), ("eos", 4.0)):
        for cell in cells(loss):
            finished_run(root / "runs", cell, quality=quality)
    for cell in cells("cos_eos", digits=["emnist"]):
        finished_run(root / "runs", cell, quality=3.0)
    written(root)
    return root


@pytest.fixture
def grid(two_losses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; figures are drawn once, for all tests."""
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    shutil.copytree(two_losses, tmp_path, dirs_exist_ok=True)
    return tmp_path
