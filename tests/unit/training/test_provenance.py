"""Commit and hardware that stand beside a figure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from training import provenance


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working copy with one commit, in the place of ours."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "training" / "provenance.py"))
    (tmp_path / "tracked").write_text("one")
    names = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for words in (["init", "-q"], ["add", "tracked"], [*names, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_commit_says_whether_tracked_files_differ_from_it(copy: Path) -> None:
    whole = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=copy, check=True, capture_output=True, text=True
    ).stdout
    (copy / "untracked").write_text("one")
    assert provenance.current_commit() == provenance.exact_commit() == whole[:7]
    (copy / "tracked").write_text("two")
    assert provenance.current_commit() == f"{whole[:7]}+"
    assert provenance.exact_commit() is None


def test_outside_of_a_working_copy_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "training" / "provenance.py"))
    assert provenance.current_commit() is None
    assert provenance.exact_commit() is None


@pytest.mark.parametrize(("count", "text"), [(1, ", 1 core"), (2, ", 2 cores")])
def test_processor_has_the_cores_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, count: int, text: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
    assert provenance.device_name("cpu").endswith(text)
