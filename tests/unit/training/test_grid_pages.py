"""The pages of the grid, made from rows and stored scores of runs that were never trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from threading import Thread

import pytest

from tests.grid_runs import as_before, cells, finished_run, line_of, section, written
from training.grid import pages
from training.grid.plan import plan
from training.grid.rows import CELL_FILE, merge_rows, read_rows, stored_rows


def means_in(text: str) -> list[str]:
    """The lines of all tables but that of who passes, without intervals over classes and what is bold for them."""
    text = re.sub(r"### Who passes\n.*?(?=\n#|\Z)", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [re.sub(r" \[[^\]]*\]|\*\*", "", line) for line in lines]


def test_report_is_the_same_from_rows_alone_but_for_what_needs_scores(grid: Path) -> None:
    before = (grid / "results/toy.md").read_text()
    shutil.rmtree(grid / "runs")
    shutil.rmtree(grid / "results/summaries")
    after = written(grid)
    assert means_in(after) == means_in(before)
    assert len(means_in(after)) > 50
    for text, has_scores in ((before, True), (after, False)):
        line = line_of(section(text, "## The thesis' table 6.1 and ours"), "cos_eos")
        assert line[1] == "2"
        assert ("±" in line[7], "[" in line[7]) == (True, has_scores)
        assert ("### Who passes" in text) == has_scores


def test_report_of_a_fresh_clone_has_all_that_was_committed(
    two_losses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(two_losses / "results", tmp_path / "results")
    before = (tmp_path / "results/toy.md").read_text()
    pictures = {file: file.read_bytes() for file in (tmp_path / "results/figures").iterdir()}
    monkeypatch.setattr(
        "training.grid.summaries.bootstrap_by_class", lambda *_, **__: pytest.fail("drawn again")
    )
    assert written(tmp_path) == before
    assert before.count("![") >= 6
    # Curves and angles are drawn from what is kept beside the rows.
    drawn = [file for file in pictures if not file.stem.endswith("false_positives")]
    assert {file.stem.rpartition("-")[2] for file in drawn} == {
        "oscr", "logit", "thresholds", "angles", "digits",
    }  # fmt: skip
    for file in drawn:
        file.unlink()
    assert written(tmp_path) == before
    assert {file: file.read_bytes() for file in drawn} == {file: pictures[file] for file in drawn}


def test_page_begins_with_its_contents_and_the_machines_and_commits_of_its_models(
    grid: Path,
) -> None:
    rows = read_rows(grid / "results/toy.json")
    others = [row | {"commit": "f00"} for row in rows if row["loss"] == "eos" and row["seed"] == 2]
    merge_rows(grid / "results/toy.json", [row | {"evaluated": "2026-02-02"} for row in others])
    shutil.rmtree(grid / "runs")
    text = written(grid)
    head, _, rest = text.partition("\n## ")
    assert "\n- 6 on a processor, float32: abc1234 (5), f00 (1)\n" in head
    listed = re.findall(r"^- \[(.*)\]\(#.*\)$", head, re.MULTILINE)
    assert listed == re.findall(r"^## (.*)$", f"## {rest}", re.MULTILINE)
    assert len(listed) > 3
    assert text.splitlines()[2].startswith(f"- [{listed[0]}](#")


def test_damaged_run_is_left_out_and_the_others_are_reported(
    grid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for cell, damage in zip(cells("arc_eos"), ("", '{"columns": {}}'), strict=True):
        folder = finished_run(grid / "runs", cell)
        (folder / CELL_FILE).write_text(damage)
    as_before(finished_run(grid / "runs", cells("os")[0])).unlink()
    table = section(written(grid), "## The thesis' table 6.1 and ours")
    assert line_of(table, "arc_eos")[1] == ""
    assert line_of(table, "os")[1] == ""
    assert line_of(table, "cos_eos")[1] == "2"
    assert caplog.text.count("is left out, its files are damaged") == 3


def test_report_writes_rows_of_an_earlier_release_in_its_own_form(grid: Path) -> None:
    file = grid / "results/toy.json"
    before = file.read_bytes()
    assert b"is_recommended" not in before
    content = json.loads(before)
    for row in content["rows"]:
        row["is_recommended"] = True
    file.write_text(json.dumps(content))
    shutil.rmtree(grid / "runs")
    assert "(recommended)" not in written(grid)
    assert file.read_bytes() == before


def test_lost_row_is_found_again_in_the_run_and_missed_where_there_is_none(grid: Path) -> None:
    file = grid / "results/toy.json"
    complete = file.read_bytes()
    content = json.loads(complete)
    assert len(content["rows"]) == 6 * 2 * 2
    lost = [row for row in content["rows"] if (row["loss"], row["seed"]) != ("eos", 2)]
    file.write_text(json.dumps(content | {"rows": lost}))
    written(grid)
    assert file.read_bytes() == complete
    file.write_text(json.dumps(content | {"rows": lost}))
    shutil.rmtree(grid / "runs")
    table = section(written(grid), "## The thesis' table 6.1 and ours")
    assert line_of(table, "eos")[1] == "1"
    assert line_of(table, "cos_eos")[1] == "2"


def test_shorter_training_never_stands_in_the_published_table(grid: Path) -> None:
    for cell in cells("arc_eos", epochs=5):
        finished_run(grid / "runs", cell)
    text = written(grid)
    published = line_of(section(text, "## The thesis' table 6.1 and ours"), "arc_eos")
    assert published[1:4] == ["", ".9853", ""]
    short = section(text, "## thesis preset, published code, MNIST digits, 5 of 15 epochs")
    assert "Not comparable with the thesis' table: another number of epochs." in short
    assert line_of(short, "arc_eos")[1] == "2"


def test_differing_options_get_a_line_of_their_own_and_not_the_published_one(grid: Path) -> None:
    for cell in cells("arc_eos", options={"feature_dim": 40}):
        finished_run(grid / "runs", cell)
    text = written(grid)
    assert line_of(section(text, "## The thesis' table 6.1 and ours"), "arc_eos")[1] == ""
    assert "`arc_eos (feature_dim=40)`" in text


def test_diverged_cell_says_so_and_gives_no_mean(grid: Path) -> None:
    folder = finished_run(grid / "runs", cells("arc_os")[0])
    record = json.loads((folder / CELL_FILE).read_text())
    (folder / CELL_FILE).write_text(json.dumps(record | {"diverged": "diverged: loss is nan"}))
    assert all("accuracy" not in row for row in stored_rows(folder))
    table = section(written(grid), "## The thesis' table 6.1 and ours")
    assert line_of(table, "arc_os")[3] == "diverged"


def test_options_in_the_published_setting_have_their_unknowns_and_accuracy(grid: Path) -> None:
    text = (grid / "results/toy.md").read_text()
    assert "### Against unknowns" not in section(text, "## The published setting in detail")
    for cell in cells("eos", options={"feature_dim": 40}):
        finished_run(grid / "runs", cell)
    detail = section(written(grid), "## The published setting in detail")
    line = line_of(section(detail, "### Against unknowns"), "eos (feature_dim=40)")
    assert all(line[1:])
    assert len(line) == 6


def test_protocol_without_a_published_table_has_its_unknowns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    for cell in plan("toy_vis", losses=["eos"], seeds=1, digits=["mnist"]):
        finished_run(tmp_path / "runs", cell)
    target = pages.write("toy_vis", runs=tmp_path / "runs", results=tmp_path / "results")
    assert target is not None
    detail = section(target.read_text(), "## The published setting in detail")
    assert line_of(section(detail, "### Against unknowns"), "eos")[1] == "1"


def test_setting_whose_models_all_diverged_is_reported(tmp_path: Path, two_losses: Path) -> None:
    [cell] = cells("eos", seeds=1)
    folder = tmp_path / "runs" / cell.name
    shutil.copytree(two_losses / "runs" / cell.name, folder)
    record = json.loads((folder / CELL_FILE).read_text())
    (folder / CELL_FILE).write_text(json.dumps(record | {"diverged": "diverged: loss is nan"}))
    table = section(written(tmp_path), "## The thesis' table 6.1 and ours")
    assert line_of(table, "eos")[3] == "diverged"


def test_runs_and_results_may_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    finished_run(tmp_path, cells("eos", seeds=1)[0])
    (tmp_path / "inside").mkdir()
    one = {"runs": tmp_path, "results": tmp_path / "inside/.."}
    # It would wait for itself, in a way that no other thread can end.
    writing = Thread(target=pages.write, args=("toy",), kwargs=one, daemon=True)
    writing.start()
    writing.join(timeout=120)
    assert not writing.is_alive()
    assert len(read_rows(tmp_path / "toy.json")) == 4
