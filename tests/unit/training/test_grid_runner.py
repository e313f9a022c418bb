"""The loop over the cells: what becomes of each, what is done again, and what the command says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.grid_runs import GLYPHS, restricted_cells, restricted_tree, run_grid, scored
from training import provenance, reproduce
from training.data import MissingClasses
from training.evaluation import SCORES_FILE
from training.grid import cell_evaluation, pages, runner
from training.grid.plan import data_columns, plan
from training.grid.rows import CELL_FILE, SCORES_DIGESTS, read_rows, scores_digest, stored_rows
from training.report import build_report


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training that only makes a folder; the losses that came to it, in order."""
    order: list[str] = []

    def train(config, *, runs: Path, show_progress: bool) -> SimpleNamespace:
        order.append(config.loss)
        (runs / config.name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(
            folder=runs / config.name, config=config, protocol_data=lambda _: None
        )

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(runner, "Run", lambda folder: SimpleNamespace(folder=folder))
    return order


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Evaluation of made-up scores; Ctrl-C comes once to the losses that are put in here."""
    interrupted: set[str] = set()

    def evaluation(run, *_: object) -> dict:
        if run.config.loss in interrupted:
            interrupted.remove(run.config.loss)
            raise KeyboardInterrupt
        sample, file = scored(5.0, 1), run.folder / SCORES_FILE
        sample.save(file)
        counts = data_columns(run.config).get("counts", {})
        report = build_report(sample, config={}, notes=[], counts=counts, factory=None, repeats=5)
        return {"test": report, "validation": None, SCORES_DIGESTS: {SCORES_FILE: scores_digest(file)}}  # fmt: skip

    monkeypatch.setattr(runner, "evaluate_cell", evaluation)
    return interrupted


def test_again_goes_on_after_what_this_commit_has_evaluated(
    tmp_path: Path, trained: list[str], evaluated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "current_commit", lambda: "0000000")
    run_grid(tmp_path)
    monkeypatch.setattr(provenance, "current_commit", lambda: "abc1234")
    assert len(run_grid(tmp_path).found) == 3
    trained.clear()
    evaluated.add("eos")
    with pytest.raises(KeyboardInterrupt):
        run_grid(tmp_path, again=True)
    assert trained == ["softmax", "eos"]
    trained.clear()
    assert len(run_grid(tmp_path, again=True).found) == 1
    assert trained == ["eos", "os"]
    rows = [row for folder in (tmp_path / "runs").iterdir() for row in stored_rows(folder)]
    assert {row["commit"] for row in rows} == {"abc1234"}

    # On another device, with scores of another evaluation or of code that no commit names, nothing is done yet.
    trained.clear()
    [folder] = (tmp_path / "runs").glob("*-os-*")
    scored(5.0, 2).save(folder / SCORES_FILE)
    assert len(run_grid(tmp_path, again=True).found) == 2
    assert trained == ["os"]
    for name, value in (("device_name", "a GPU"), ("current_commit", "abc1234+")):
        trained.clear()
        with monkeypatch.context() as patch:
            patch.setattr(provenance, name, lambda *_, value=value: value)
            assert run_grid(tmp_path, again=True).found == []
        assert trained == ["softmax", "eos", "os"]


@pytest.mark.parametrize("lost", ["row", "run", "nothing"])
@pytest.mark.parametrize(
    ("tree", "digest", "message"),
    [
        ((), True, None),
        ((1,), True, "data with other classes of the same number .* than these"),
        ((1,), False, None),  # a cell of an earlier release, of which that cannot be told
        ((0, 6), True, "data with other numbers of images"),
        ((0, 6), False, "data with other numbers of images"),
    ],
)
def test_rows_of_another_tree_are_not_taken_for_those_of_this_one(
    tmp_path: Path, trained: list[str], evaluated: set[str], lost: str, tree: tuple[int, ...], digest: bool,
    message: str | None,
) -> None:  # fmt: skip
    [cell] = restricted_cells()
    file, run = tmp_path / "results/p2.json", tmp_path / "runs" / cell.name

    def run_on(data: Path) -> runner.Outcome:
        return runner.reproduce(
            [cell], data=data, runs=tmp_path / "runs", results=tmp_path / "results", device="cpu",
            show_progress=False,
        )  # fmt: skip

    assert run_on(restricted_tree(tmp_path / "one")).trained == [cell.name]
    if not digest:
        for record in (file, run / CELL_FILE):
            record.write_text(record.read_text().replace("classes_digest", "unheard_of"))
    if lost == "row":
        file.unlink()
    elif lost == "run":
        shutil.rmtree(run)
    other = restricted_tree(tmp_path / "other", *tree)
    if message is None:
        assert run_on(other).found == [cell.name]
    else:
        with pytest.raises(ValueError, match=f"{cell.name} are of {message}"):
            run_on(other)
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("commit", "arguments", "text"),
    [
        ("abc1234+", [], "goes on where it stopped"),
        ("abc1234", ["--again"], "goes on where it stopped"),
        ("abc1234+", ["--again"], "begins at the first cell: "),
        (None, ["--again"], "begins at the first cell: "),
    ],
)
def test_command_says_where_it_begins_the_next_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, commit: str | None, arguments: list[str], text: str
) -> None:  # fmt: skip
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    caplog.set_level("INFO")
    monkeypatch.setattr(provenance, "current_commit", lambda: commit)
    monkeypatch.setattr(runner, "reproduce", interrupted)
    monkeypatch.setattr(pages, "write", lambda *_, **__: None)
    assert reproduce.main(["--protocol", "glyphs", *arguments]) == 130
    assert f"interrupted; the same command {text}" in caplog.text
    left = runner.Outcome(left=["one"])
    monkeypatch.setattr(runner, "reproduce", lambda *_, **__: left)
    assert reproduce.main(["--protocol", "glyphs", *arguments]) == 0
    assert f"1 left; the same command {text}" in caplog.text


def test_broken_cell_is_logged_and_the_others_go_on(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    def evaluation(run, *_: object) -> dict:
        raise RuntimeError(f"out of memory for {run.config.loss}")

    monkeypatch.setattr(runner, "evaluate_cell", evaluation)
    outcome = run_grid(tmp_path)
    assert trained == ["softmax", "eos", "os"]
    assert len(outcome.failed) == 3
    assert outcome.left == []
    assert "out of memory for eos" in caplog.text


def test_broken_cell_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "reproduce", lambda *_, **__: runner.Outcome(failed=["one"]))
    monkeypatch.setattr(pages, "write", lambda *_, **__: None)
    assert reproduce.main(["--protocol", "glyphs"]) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), MissingClasses("none there")])
def test_what_every_cell_would_meet_stops_the_grid(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def evaluation(*_: object) -> dict:
        raise error

    monkeypatch.setattr(runner, "evaluate_cell", evaluation)
    with pytest.raises(type(error)):
        run_grid(tmp_path)
    assert trained == ["softmax"]


def test_scores_that_are_not_finite_are_a_divergence(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = scored(5.0, 1)
    sample.scores["softmax"][3] = np.nan
    monkeypatch.setattr(cell_evaluation, "score_test", lambda *_, **__: sample)
    monkeypatch.setattr(cell_evaluation, "require_former_validation", lambda *_: None)
    outcome = run_grid(tmp_path)
    assert len(outcome.diverged) == 3
    rows = read_rows(tmp_path / "results/glyphs.json")
    assert {row["diverged"] for row in rows} == {
        "diverged: the test part has softmax scores that are not finite"
    }
    assert run_grid(tmp_path).found == [cell.name for cell in plan("glyphs", **GLYPHS)]
