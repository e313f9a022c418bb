"""Rows of another machine, with the summaries and pictures that lie beside them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from training.choices import GRID_RUNS
from training.grid.drawing import PICTURES, key_of
from training.grid.results import group_rows
from training.grid.rows import Row, cell_key, merge_rows, read_rows, results_file, row_key
from training.grid.summaries import stored_summary, summary_file


def merge(file: Path, results: Path) -> None:
    """Add the rows of another file to those of its protocol, and of what lies beside it what belongs to rows that stay."""
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"{file} holds no rows; expected a <protocol>.json of make reproduce")
    for protocol in sorted({row["protocol"] for row in rows}):
        chosen = [row for row in rows if row["protocol"] == protocol]
        kept = merge_rows(results_file(protocol, results), chosen)
        theirs = {(row_key(row), row["evaluated"]) for row in chosen}
        newest: dict[str, str] = {}
        for row in kept:  # older ones of a cell are of scores that are no longer made
            newest[cell_key(row)] = max(row["evaluated"], newest.get(cell_key(row), ""))
        taken = [
            row
            for row in kept
            if (row_key(row), row["evaluated"]) in theirs
            and row["evaluated"] == newest[cell_key(row)]
        ]
        _merge_summaries(taken, file.parent, results)
        _merge_pictures(taken, file.parent, results)


def _merge_summaries(rows: list[Row], source: Path, results: Path) -> None:
    for run, evaluated in sorted({(row["run"], row["evaluated"]) for row in rows}):
        theirs, ours = (summary_file(folder, run) for folder in (source, results))
        found, former = (stored_summary(one, evaluated) for one in (theirs, ours))
        if found is not None and former is None:
            ours.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(theirs, ours)


def _merge_pictures(rows: list[Row], source: Path, results: Path) -> None:
    """Contact sheets and deep features that are not here; the images and features they were made from are elsewhere."""
    for entries in group_rows(rows, GRID_RUNS, results).values():
        for entry, kind in itertools.product(entries, PICTURES):
            name = Path("figures") / f"{key_of(entry, kind)}.png"
            if (source / name).is_file() and not (results / name).exists():
                (results / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, results / name)
