"""Rows of a benchmark: said as they come, kept for JSON, drawn."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.load import QUANTILES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One claim. ``met`` is None where this machine cannot say; ``command`` then fills it on one that can."""

    name: str
    value: float | None
    unit: str
    baseline: float | None
    against: str
    ratio: float | None
    aim: str
    met: bool | None
    command: str | None = None


class Report:
    """Collects rows and details; says and writes them as they come, so that an interrupted run keeps what it has.

    Args:
        file: JSON, rewritten with every row; None for none.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.rows: list[Row] = []
        self.details: dict[str, Any] = {}

    def add(self, name: str, value: float | None, unit: str, **rest: Any) -> None:
        """Add a claim and print it."""
        values: dict[str, Any] = {
            "baseline": None, "against": "", "ratio": None, "aim": "", "met": None, **rest,
        }  # fmt: skip
        row = Row(name, value, unit, **values)
        self.rows.append(row)
        print(line_of(row), flush=True)
        self.save()

    def failed(self, part: str, error: BaseException) -> None:
        """Say and keep that a part could not be measured."""
        said = f"{type(error).__name__}: {error}"
        self.details.setdefault("failed", {})[part] = said
        say(f"{part} failed and is left out: {said}")
        self.save()

    @property
    def complete(self) -> bool:
        """Whether every part was measured."""
        return "failed" not in self.details

    def save(self) -> None:
        """Write the file."""
        if self.file is None:
            return
        rows = [asdict(row) for row in self.rows]
        content = {"machine": machine(), "rows": rows, **self.details}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1) + "\n")

    def ratio(
        self, name: str, value: float, unit: str, baseline: float, against: str, *, at_least: float | None
    ) -> None:  # fmt: skip
        """Add a claim of a ratio; without a baseline above 0 there is none, and an aim is missed."""
        ratio = value / baseline if baseline > 0 else None
        self.add(
            name, round(value, 3), unit, baseline=round(baseline, 3), against=against,
            ratio=None if ratio is None else round(ratio, 3),
            aim="" if at_least is None else f">= {at_least:g}",
            met=None if at_least is None else ratio is not None and ratio >= at_least,
        )  # fmt: skip


def line_of(row: Row) -> str:
    """One row for people."""
    met = {True: "met", False: "MISSED", None: ""}[row.met]
    value = "-" if row.value is None else f"{row.value:.3f}"
    against = "" if row.baseline is None else f"{row.baseline:.3f} {row.against}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    return f"{row.name:74} {value:>10} {row.unit:9} {against:52} {ratio:>7} {row.aim:18} {met}{row.command or ''}"


def say(text: str) -> None:
    """What happens now, for those who wait."""
    print(f"-- {text}", file=sys.stderr, flush=True)


@cache
def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    model = next(
        (
            text.partition(":")[2].strip()
            for text in Path("/proc/cpuinfo").read_text().splitlines()
            if text.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "load_average_at_start": os.getloadavg()[0],
        "commit": commit.stdout.strip() or None,
    }


def draw(report: Report, file: Path) -> None:
    """Latency and goodput against load, one column for each measured path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = report.details["latency against load"]
    figure, axes = plt.subplots(
        2, len(curves), figsize=(1 + 6 * len(curves), 6), sharex="col", layout="constrained", squeeze=False
    )  # fmt: skip
    for (above, below), (what, curve) in zip(axes.T, curves.items(), strict=True):
        offered = [point["offered"] for point in curve]
        for name in QUANTILES:
            above.plot(offered, [point[f"{name}_ms"] for point in curve], marker="o", label=name)
        above.set(yscale="log", ylabel="latency of answers, ms", title=what)
        above.legend()
        below.plot(offered, [point["goodput"] for point in curve], marker="o", label="goodput")
        below.plot(offered, offered, color="grey", linestyle=":", label="offered")
        below.set(xlabel="offered load, images/s (open loop)", ylabel="images/s")
        below.legend()
    for one in axes.flat:
        one.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
