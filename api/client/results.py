"""Where answers go: a journal that survives an interruption, then one table, CSV or Parquet."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import orjson

# Column -> type, in the order of the table; all but the first may be missing.
COLUMNS: dict[str, type] = {
    "path": str,
    "status": int,
    "label": str,
    "accepted": bool,
    "score": float,
    "score_type": str,
    "tau": float,
    "p_value": float,
    "nearest_label": str,
    "nearest_probability": float,
    "nearest_cosine": float,
    "nearest_angle_deg": float,
    "calibration_id": int,
    "fpr": float,
    "model_sha256": str,
    "problem": str,
    "detail": str,
}

Row = dict[str, Any]


class CannotResume(ValueError):
    """The journal or the result belongs to something else."""


def text_of(path: str) -> str:
    r"""A path as text: bytes of a file name that are not UTF-8 become ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def row_without_answer(path: str, status: int | None, reason: str) -> Row:
    """One line of the table for a file that has no answer: the last "later" that was said of it, or no status at all."""
    return {"path": text_of(path), "status": status, "detail": reason}


def row_of(path: str, status: int, answer: dict[str, Any]) -> Row:
    """One line of the table from an answer of ``POST /predict``, or from its problem."""
    path = text_of(path)
    if status != 200:
        problem = {"problem": answer.get("type"), "detail": answer.get("detail")}
        return {"path": path, "status": status, **problem}
    nearest, calibration = answer["nearest"], answer["calibration"]
    same = ("label", "accepted", "score", "score_type", "tau", "p_value")
    return {
        "path": path,
        "status": status,
        **{name: answer[name] for name in same},
        **{f"nearest_{name}": nearest[name] for name in ("label", "probability", "cosine", "angle_deg")},
        "calibration_id": calibration["id"],
        "fpr": calibration["fpr"],
        "model_sha256": answer["model"]["sha256"],
    }  # fmt: skip


def _key_of(path: str) -> str:
    """A file is the same however its path is written."""
    return text_of(os.path.abspath(path))


def _path_of(row: Row) -> str:
    path: str = row["path"]
    return path


def _is_same(begun: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two identities agree; a source that is not known, as that of a stream of paths, agrees with all."""
    sources = {identity.get("source") for identity in (begun, now)} - {None}
    return len(sources) < 2 and {**begun, "source": None} == {**now, "source": None}


class Journal:
    """Answers so far, one JSON line each, beside the result; a broken last line (a kill) is dropped.

    Args:
        out: the result that will be made of it.
        identity: what all answers must share; another one on resuming is refused.

    Raises:
        CannotResume: the result exists already, another client writes the journal, or it was begun with another identity.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.file = out.with_name(out.name + ".journal")
        if out.exists():
            raise CannotResume(
                f"{out} exists already; remove it or name another file with --out (nothing was changed)"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.file.open("ab", buffering=0)
        try:
            lines = self._lines_so_far(identity)
        except CannotResume:
            self._stream.close()
            raise
        self.done: dict[str, list[int]] = {line["key"]: line["file"] for line in lines[1:]}
        self.identity = identity
        if not lines:
            self._write(identity)

    def _lines_so_far(self, identity: dict[str, Any]) -> list[dict[str, Any]]:
        """The whole lines of the journal, which from now on is ours alone; a broken last one is cut off."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotResume(
                f"another client is writing {self.file}; wait for it, or name another --out"
            ) from None
        known = self.file.read_bytes().split(b"\n")
        lines = [orjson.loads(line) for line in known[:-1]]  # the last is empty, or broken
        if lines and not _is_same(lines[0], identity):
            raise CannotResume(
                f"{self.file} was begun with {orjson.dumps(lines[0]).decode()}, now it is "
                f"{orjson.dumps(identity).decode()}; remove it to begin anew, or name another --out"
            )
        if known[-1]:
            self._stream.truncate(sum(len(line) + 1 for line in known[:-1]))
        return lines

    def knows(self, path: str, file: list[int]) -> bool:
        """Whether it holds an answer about this state of the file."""
        return self.done.get(_key_of(path)) == file

    def _write(self, content: dict[str, Any]) -> None:
        self._stream.write(orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE))

    def add(self, row: Row, file: list[int]) -> None:
        """Keep an answer.

        Args:
            row: see ``row_of``.
            file: size and time of the image; if they change the image is asked about again.
        """
        key = _key_of(row["path"])
        self._write({"key": key, "row": row, "file": file})
        self.done[key] = file

    def rows(self) -> Iterator[Row]:
        """The newest answer of every file, in the order of their paths."""
        yield from sorted(self._newest().values(), key=_path_of)

    def _newest(self) -> dict[str, Row]:
        newest: dict[str, Row] = {}
        with self.file.open("rb") as stream:
            next(stream)
            for line in stream:
                content = orjson.loads(line)
                newest[content["key"]] = content["row"]
        return newest

    def calibrations(self) -> list[int]:
        """Ids of the calibrations that decided; more than one where the threshold was changed on the way."""
        ids = {row.get("calibration_id") for row in self.rows()}
        return sorted(number for number in ids if number is not None)

    def close(self) -> None:
        """Close the file; the next run goes on from here."""
        self._stream.close()

    def finish(self, without_answer: Sequence[Row] = ()) -> int:
        """Write the result, atomically, and remove the journal; gives the number of rows.

        Args:
            without_answer: rows of files that have none, or none about what they are now; each takes the place of an
                older answer about the same file.
        """
        self.close()
        partial = self.out.with_name(self.out.name + ".partial")
        found = self._newest() | {_key_of(row["path"]): row for row in without_answer}
        rows = sorted(found.values(), key=_path_of)
        WRITERS[self.out.suffix](rows, partial)
        os.replace(partial, self.out)
        self.file.unlink()
        return len(rows)


def write_csv(rows: list[Row], file: Path) -> None:
    """A table with a header; missing values are empty, truth values ``true`` and ``false``."""

    def text(value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    stream: TextIO
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows([text(row.get(name)) for name in COLUMNS] for row in rows)


def write_parquet(rows: list[Row], file: Path) -> None:
    """A typed table, zstd-compressed.

    Raises:
        ModuleNotFoundError: arro3 is not installed.
    """
    from arro3.core import Array, DataType, Field, Schema, Table
    from arro3.io import write_parquet as write

    types = {
        str: DataType.utf8(),
        int: DataType.int64(),
        float: DataType.float64(),
        bool: DataType.bool(),
    }
    schema = Schema([Field(name, types[kind]) for name, kind in COLUMNS.items()])
    columns: dict[str, Any] = {
        name: Array([row.get(name) for row in rows], types[kind]) for name, kind in COLUMNS.items()
    }
    write(Table.from_pydict(columns, schema=schema), file, compression="zstd(3)")


WRITERS = {".csv": write_csv, ".parquet": write_parquet}
