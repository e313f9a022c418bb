"""The command that makes the grid's pages: what it merges, what it makes of nothing, and its exit codes."""

from __future__ import annotations

from pathlib import Path

from tests.grid_runs import line_of, section
from training import grid_report
from training.grid.rows import merge_rows, read_rows


def test_rows_of_another_machine_are_merged_by_the_command(grid: Path) -> None:
    rows = read_rows(grid / "results/toy.json")
    other = grid / "elsewhere.json"
    merge_rows(other, [row | {"seed": 3} for row in rows if row["loss"] == "eos"])
    arguments = [
        "--protocol",
        "toy",
        "--runs",
        str(grid / "runs"),
        "--results",
        str(grid / "results"),
    ]
    assert grid_report.main([*arguments, "--merge", str(other)]) == 0
    assert len(read_rows(grid / "results/toy.json")) == len(rows) + 2 * 2
    table = section((grid / "results/toy.md").read_text(), "## The thesis' table 6.1 and ours")
    assert line_of(table, "eos")[1] == "3"
    assert grid_report.main([*arguments, "--merge", str(grid / "missing.json")]) == 1


def test_nothing_to_report_is_an_error_of_the_command(tmp_path: Path) -> None:
    arguments = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert grid_report.main(["--protocol", "glyphs", *arguments]) == 1
    assert not (tmp_path / "results").exists()


def test_published_table_of_which_nothing_was_run_stands_with_the_commands_that_fill_it(
    tmp_path: Path,
) -> None:
    arguments = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert grid_report.main(["--protocol", "p2", *arguments]) == 0
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["p2.md"]
    text = (tmp_path / "results/p2.md").read_text()
    line = line_of(section(text, "## The thesis' table 6.2 (b) and ours"), "norm_os")
    assert line[2:10] == [".0660", "", ".1853", "", ".4420", "", ".6800", ""]
    assert line[-1] == "`make reproduce PROTOCOL=p2 LOSSES=norm_os SEEDS=3 DATA=/imagenet`"
    assert "`make reproduce PROTOCOL=p2 SEEDS=3 DATA=/imagenet`" in text
    # Without a protocol every page that can be made is made.
    assert grid_report.main(arguments) == 0
    pages = {file.name for file in (tmp_path / "results").iterdir()}
    assert pages == {"toy.md", "p1.md", "p2.md", "p3.md"}
