"""Rows of the grid: what is known of each cell, gathered over runs and machines in ``docs/results/<protocol>.json``."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from training.choices import RESULTS
from training.evaluation import REPORT
from training.grid.plan import Cell, ranked_losses
from training.runs import write_atomically

logger = logging.getLogger(__name__)

Row = dict[str, Any]

CELL_FILE = "cell.json"
# In it: SHA-256 of each file of scores, by its name in the run's folder.
SCORES_DIGESTS = "scores_sha256"
SCHEMA = 1

# A row is one group and one score of one cell on one set of classes.
_CELL_KEY = (
    "protocol", "loss", "options", "preset", "seed", "epochs", "digits", "classes", "precision",
)  # fmt: skip
_KEY = (*_CELL_KEY, "group", "score")
# Columns of earlier releases. What is recommended changes after a row was made: the pages ask the recommendation itself.
_DROPPED = ("is_recommended",)
# Two trees may lack classes of a protocol and have as many left. Rows of earlier releases have no digest.
_DATA_COLUMNS = {
    "classes_digest": "other classes of the same number",
    "counts": "other numbers of images",
}
_CELL_FIGURES = ("value", "interval", "interval_clustered", "false_negative_rate")
GROUPS = {"negative": "negatives", "unknown": "unknowns"}
VALIDATION_GROUP = "validation_negatives"
# The same unknown letters and thresholds, with the known digits of the source that was not trained with.
OTHER_DIGITS_GROUP = "unknowns_other_digits"
# The score as published, in float32: where it ties at 1, a low FPR is out of reach.
PUBLISHED_SCORE = "softmax_float32"


def row_key(row: Row) -> str:
    """What tells a row from all others."""
    return json.dumps([row[name] for name in _KEY], sort_keys=True)


def cell_key(row: Row) -> str:
    """The same for all rows of a cell."""
    return json.dumps([row[name] for name in _CELL_KEY], sort_keys=True)


def cell_columns(cell: Cell, of_data: Row) -> Row:
    """The columns that name a cell, its data (``training.grid.plan.data_columns``) and what was asked of its evaluation."""
    values = vars(cell) | of_data
    return {name: values[name] for name in _CELL_KEY} | {"scores": cell.scores} | of_data


def is_recorded(columns: Row, rows: Iterable[Row]) -> bool:
    """Do the rows hold a cell with all scores that are asked of it? A diverged cell has none to give."""
    found = [row for row in rows if cell_key(row) == cell_key(columns)]
    if any("diverged" in row for row in found):
        return True
    return bool(found) and set(columns["scores"]) <= {row["score"] for row in found}


def require_same_data(columns: Row, rows: Iterable[Row]) -> None:
    """Refuse rows of a cell whose data had other classes or numbers of images; what either side does not say is not compared.

    Raises:
        ValueError: they had.
    """
    found = [row for row in rows if cell_key(row) == cell_key(columns)]
    newest = max(found, key=lambda row: str(row["evaluated"]), default={})
    for name, what in _DATA_COLUMNS.items():
        if name in columns and name in newest and columns[name] != newest[name]:
            raise ValueError(
                f"the rows of {newest['run']} are of data with {what} ({_text(newest[name])}) than these "
                f"({_text(columns[name])}); give these folders of their own (--runs, --results), or take the former data"
            )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def rows_of(
    columns: Row,
    provenance: Row,
    *,
    test: dict[str, Any],
    validation: dict[str, Any] | None,
    published_score: dict[str, Any] | None = None,
    other_digits: dict[str, Any] | None = None,
) -> list[Row]:
    """One row a group and score.

    Args:
        columns: from ``cell_columns``.
        provenance: run, commit, device, precision and time of the evaluation.
        test: report of the test part (``training.report.build_report``).
        validation: report of the validation part, or None.
        published_score: report of the test part with ``PUBLISHED_SCORE``, or None.
        other_digits: report of the test part with the digits of the other source, or None.
    """
    parts = [(test, GROUPS)]
    if published_score is not None:
        parts.append((published_score, GROUPS))
    if other_digits is not None:
        parts.append((other_digits, {"unknown": OTHER_DIGITS_GROUP}))
    if validation is not None:
        parts.append((validation, {"negative": VALIDATION_GROUP}))
    rows = []
    for report, names in parts:
        for score, against in report["scores"].items():
            for group, figures in against.items():
                if group not in names:
                    continue
                cells = {
                    target: {key: cell[key] for key in _CELL_FIGURES}
                    for target, cell in figures["ccr_at_fpr"].items()
                }
                rows.append(
                    columns
                    | {"group": names[group], "score": score, "rule": report["rule"]}
                    | {"ccr_at_fpr": cells, "ccr_at_zero_fpr": figures["ccr_at_zero_fpr"]}
                    | {"accuracy": report["accuracy"], "foreign_count": figures["count"]}
                    | {"counts": report.get("counts") or test["counts"]}
                    | {"notes": report.get("notes") or test["notes"]}
                    | provenance
                )
    return rows


def _diverged_rows(columns: Row, provenance: Row, *, message: str) -> list[Row]:
    """The rows of a cell whose training broke down: they hold no figure, and say why."""
    return [
        columns | {"group": group, "score": score, "diverged": message} | provenance
        for group in GROUPS.values()
        for score in ("softmax", "logit")
    ]


def stored_rows(folder: Path) -> list[Row]:
    """The rows of a finished run, from its files; none where it is not finished, or where its files are damaged."""
    file = folder / CELL_FILE
    if not file.is_file():
        return []
    try:
        record = json.loads(file.read_text())
        columns, provenance = record["columns"], record["provenance"]
        if "diverged" in record:
            return _diverged_rows(columns, provenance, message=record["diverged"])
        rows = rows_of(
            columns,
            provenance,
            # A cell of an earlier release has it in the run's report alone.
            test=record.get("test") or json.loads((folder / REPORT).read_text()),
            validation=record["validation"],
            published_score=record.get("published_score"),
            other_digits=record.get("other_digits"),
        )
        for row in rows:
            row_key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is left out, its files are damaged (%r)", folder, error)
        return []
    return rows


def scores_digest(file: Path) -> str:
    """SHA-256 of a file of scores: a cell names those that its rows were computed from."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replaced_scores(folder: Path) -> list[str]:
    """Files of scores of a finished run that its rows were not computed from, by their names in its folder.

    Gone ones are among them; of a cell of an earlier release nothing is known, and none is named.
    """
    digests = json.loads((folder / CELL_FILE).read_text()).get(SCORES_DIGESTS, {})
    return [
        name
        for name, digest in digests.items()
        if not (folder / name).is_file() or scores_digest(folder / name) != digest
    ]


def results_file(protocol: str, folder: Path = RESULTS) -> Path:
    """Where a protocol's rows lie."""
    return folder / f"{protocol}.json"


def read_rows(file: Path) -> list[Row]:
    """All rows of a file; none where there is no file.

    Raises:
        ValueError: the file is damaged or of another schema.
    """
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text())
        schema, rows = content["schema"], content["rows"]
        for row in rows:
            row_key(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold rows of the grid ({error!r}); restore it from the repository, or move it away"
        ) from error
    if schema != SCHEMA:
        raise ValueError(f"{file} has schema {schema}, this release reads {SCHEMA}")
    return list(rows)


def merge_rows(file: Path, rows: Iterable[Row], *, is_held: bool = False) -> list[Row]:
    """Add rows to a file: of two with one key the one evaluated later stays, all others are kept. Returns all rows.

    Safe against a second process doing the same, and against being killed. ``is_held`` says that the caller is
    ``alone_in`` the file's folder already, and would wait for itself.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if is_held else alone_in(file.parent):
        merged = {row_key(row): row for row in read_rows(file)}
        for row in rows:
            former = merged.get(row_key(row))
            if former is None or former["evaluated"] < row["evaluated"]:
                merged[row_key(row)] = row
        ordered = [_written(row) for row in sorted(merged.values(), key=_order)]
        protocol = ordered[0]["protocol"] if ordered else None
        # A line a row: git then shows, and merges, single rows.
        lines = ",\n".join(json.dumps(row) for row in ordered)
        head = f'{{"schema": {SCHEMA}, "protocol": {json.dumps(protocol)}, "rows": ['
        write_atomically(file, f"{head}\n{lines}\n]}}\n" if ordered else f"{head}]}}\n")
    return ordered


def _order(row: Row) -> tuple[Any, ...]:
    losses = ranked_losses(row["protocol"])
    rank = losses.index(row["loss"]) if row["loss"] in losses else len(losses)
    return (rank, row["loss"], row_key(row))


def _written(row: Row) -> Row:
    """A row as it stands in the file."""
    return {name: _rounded(value) for name, value in row.items() if name not in _DROPPED}


def _rounded(value: Any) -> Any:
    """Six decimals: an image more or less is 1e-4 of a rate on the largest test set here."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; it ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
