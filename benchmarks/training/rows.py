"""Rows of the training benchmark: measured side by side, said as they come, written as JSON and as a table."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

# A line of a page that is otherwise written by hand; the table stands between the two.
TABLE_BEGINS, TABLE_ENDS = "<!-- table begins -->", "<!-- table ends -->"


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        name: what was measured, how and on which device.
        value: median; None where it was not measured, then ``command`` fills it.
        unit: of value.
        baseline: against what.
        ratio: how many times better than the baseline (times worse where the aim is an upper bound).
        aim: the ratio or value that was asked for.
        met: whether it was reached; None without a measurement or an aim.
        command: measures the row, on a machine that can.
        note: what a reader must know.
    """

    name: str
    value: float | None
    unit: str
    baseline: str
    ratio: float | None = None
    aim: str = ""
    met: bool | None = None
    command: str | None = None
    note: str | None = None


def seconds_side_by_side(
    candidates: dict[str, Callable[[], Any]], *, repeats: int
) -> dict[str, float]:
    """Median wall time of each, taken in turns so that a disturbance hits all; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            wait_for_gpu()
            started = time.perf_counter()
            run()
            wait_for_gpu()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def wait_for_gpu() -> None:
    """Kernels run on after the call that started them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [
        line.partition(":")[2].strip() for line in described.splitlines() if "model name" in line
    ]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def say(row: Row) -> None:
    """Print a row as soon as it is known."""
    value = "" if row.value is None else f"{row.value:.4g} {row.unit}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
    met = {True: "met", False: "MISSED", None: ""}[row.met]
    print(f"{row.name:78} {value:>22} {ratio:>8}  {row.aim:24} {met}", flush=True)


class Table:
    """Rows of one run of the benchmark; each is said and written as soon as it is known.

    Args:
        json: file for the rows and the machine; None writes none.
        markdown: file for the table. A page that holds the lines ``TABLE_BEGINS`` and ``TABLE_ENDS`` gets it between them
            and is otherwise kept; any other file is replaced.
    """

    def __init__(self, *, json: Path | None = None, markdown: Path | None = None) -> None:
        self.rows: list[Row] = []
        self._json, self._markdown = json, markdown

    def add(self, rows: list[Row]) -> None:
        """Say them, and write both files anew; whoever reads one sees a whole table."""
        self.rows += rows
        for row in rows:
            say(row)
        if self._json is not None:
            _replace(self._json, dumps(content(self.rows), indent=2, ensure_ascii=False) + "\n")
        if self._markdown is not None:
            _replace(self._markdown, _put_into(self._markdown, markdown(self.rows)))


def _put_into(page: Path, table: str) -> str:
    text = page.read_text() if page.is_file() else ""
    before, begins, rest = text.partition(TABLE_BEGINS)
    _, ends, after = rest.partition(TABLE_ENDS)
    return f"{before}{begins}\n\n{table}\n{ends}{after}" if ends else table


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


def content(rows: list[Row]) -> dict[str, Any]:
    """What goes into the JSON file."""
    return {"machine": machine(), "arguments": sys.argv[1:], "rows": [asdict(row) for row in rows]}


def markdown(rows: list[Row]) -> str:
    """The same as a table; a row without a value shows its command."""
    lines = ["| measured | value | against | ratio | aim | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4g} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        met = {True: "yes", False: "**no**", None: f"`{row.command}`" if row.command else ""}[
            row.met
        ]
        name = row.name + (f" ({row.note})" if row.note else "")
        lines.append(f"| {name} | {value} | {row.baseline} | {ratio} | {row.aim} | {met} |")
    return "\n".join(lines) + "\n"
