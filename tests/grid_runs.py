"""Cells, runs and rows of grids that were never trained, with made-up scores, and readers of the page that tells of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openset.labels import NEGATIVE, UNKNOWN
from training.evaluation import REPORT, SCORES_FILE
from training.grid import pages, runner
from training.grid.plan import Cell, all_classes, default_epochs, plan
from training.grid.results import Entry, Setting
from training.grid.rows import (
    CELL_FILE,
    SCORES_DIGESTS,
    VALIDATION_GROUP,
    Row,
    cell_columns,
    read_rows,
    scores_digest,
)
from training.protocols import get_protocol
from training.report import build_report
from training.runs import CONFIG
from training.scoring import Scored

NOTES = ["the letters test file holds fewer images of some letters (X 497, Z 447)"]
COUNTS = {
    "train": {"known": 48000, "negative": 42240, "unknown": 0},
    "test": {"known": 10000, "negative": 8800, "unknown": 8144},
}
LETTERS = {NEGATIVE: "ABCD", UNKNOWN: "PQRS"}
GLYPHS = {
    "seeds": 1,
    "losses": ["softmax", "eos", "os"],
    "options": {"size": "small"},
    "device": "cpu",
}


def scored(quality: float, seed: int) -> Scored:
    """Ten digits and eight letters, 30 images each; higher quality parts them better."""
    random = np.random.default_rng(seed)
    labels = np.repeat([*range(10), *[NEGATIVE] * 4, *[UNKNOWN] * 4], 30)
    groups = np.repeat([*"0123456789", *LETTERS[NEGATIVE], *LETTERS[UNKNOWN]], 30)
    centers = np.eye(10, dtype=np.float32)
    features = random.normal(0, 1, (len(labels), 10)).astype(np.float32)
    features[labels >= 0] += quality * centers[labels[labels >= 0]]
    logits = features @ centers.T
    cosines = logits / np.linalg.norm(features, axis=1, keepdims=True)
    scores = {"softmax": logits.max(axis=1) - logits.mean(axis=1), "logit": logits.max(axis=1)}
    ids = np.arange(len(labels)).astype(str)
    return Scored(
        features, logits, cosines, scores, logits.argmax(axis=1), labels, groups, ids, centers
    )


def finished_run(
    runs: Path,
    cell: Cell,
    *,
    quality: float = 5.0,
    sample: Scored | None = None,
    evaluated: str = "2026-01-01",
    on_other_digits: float | None = None,
) -> Path:
    """What ``reproduce`` leaves behind for one cell."""
    folder = runs / cell.name
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(cell.config(data=None, device="cpu").to_json())
    sample = sample or scored(quality, cell.seed)
    sample.save(folder / SCORES_FILE)
    report = build_report(sample, config={}, notes=NOTES, counts=COUNTS, factory=None, repeats=5)
    (folder / REPORT).write_text(json.dumps(report))
    provenance = {
        "run": cell.name, "commit": "abc1234", "device": "a processor", "evaluated": evaluated,
    }  # fmt: skip
    columns = cell_columns(cell, {"classes": "10/11/11"})
    record = {
        "columns": columns, "provenance": provenance, "test": report, "validation": None,
        SCORES_DIGESTS: {SCORES_FILE: scores_digest(folder / SCORES_FILE)},
    }  # fmt: skip
    if on_other_digits is not None:
        other = scored(on_other_digits, cell.seed)
        record["other_digits"] = build_report(
            other, config={}, notes=NOTES, counts=COUNTS, factory=None, repeats=5
        )
    (folder / CELL_FILE).write_text(json.dumps(record))
    return folder


def as_before(folder: Path) -> Path:
    """The cell as an earlier release left it; its report, which alone has the figures of the test then."""
    record = json.loads((folder / CELL_FILE).read_text())
    del record["test"], record[SCORES_DIGESTS]
    (folder / CELL_FILE).write_text(json.dumps(record))
    return folder / REPORT


def cells(loss: str, **arguments: Any) -> list[Cell]:
    """Of toy, as published: two seeds with MNIST's digits unless told otherwise."""
    return plan("toy", losses=[loss], **({"seeds": 2, "digits": ["mnist"]} | arguments))


def written(tmp_path: Path) -> str:
    """The page of toy, made from the runs and results in this folder."""
    target = pages.write("toy", runs=tmp_path / "runs", results=tmp_path / "results")
    assert target is not None
    return target.read_text()


def section(text: str, heading: str) -> str:
    """From a heading to the next of the same rank."""
    rank = heading.split(" ")[0]
    body = text.split(f"\n{heading}", 1)[1]
    return re.split(rf"\n{rank} ", body, maxsplit=1)[0]


def line_of(text: str, loss: str) -> list[str]:
    """The cells of the first table's line of a loss."""
    line = next(line for line in text.splitlines() if line.startswith(f"| `{loss}` |"))
    return [part.strip() for part in line.strip("|").split("|")]


def rows_of_cos_eos(grid: Path, values: list[float], images: list[float] | None) -> list[Row]:
    """The rows of MNIST's digits, a seed for each value of CCR@1e-2."""
    rows = []
    for row in read_rows(grid / "results/toy.json"):
        if (row["loss"], row["digits"]) == ("cos_eos", "mnist") and row["seed"] <= len(values):
            cell = {"value": values[row["seed"] - 1], "interval_clustered": images}
            rows.append(row | {"ccr_at_fpr": row["ccr_at_fpr"] | {"0.01": cell}})
    return rows


def run_grid(tmp_path: Path, *, again: bool = False) -> runner.Outcome:
    """Three small cells, trained and evaluated."""
    return runner.reproduce(
        plan("glyphs", **GLYPHS), data=None, runs=tmp_path / "runs", results=tmp_path / "results", device="cpu",
        again=again, show_progress=False,
    )  # fmt: skip


def restricted_tree(root: Path, first: int = 0, count: int = 5) -> Path:
    """Three known, two negative and one unknown class of p2, as many images of each to train and to test with."""
    protocol = get_protocol("p2")
    known = protocol.known[first : first + 3]
    for wnid in [*known, *protocol.negative[:2], *protocol.unknown[:1]]:
        for part in ("train", "val"):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpeg").touch()
    return root


def restricted_cells() -> list[Cell]:
    """The one cell of ``restricted_tree``."""
    return plan(
        "p2", seeds=1, losses=["eos"], options={"allow_missing_classes": True}, device="cpu"
    )


@dataclass(frozen=True, eq=False)
class Judged:
    """An entry with one CCR for every rate, or one by rate, or one by score on the validation's negatives."""

    loss: str
    ccr: float | dict[str, float]
    digits: str = "mnist"
    preset: str = "thesis"
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    is_recommended: bool = False
    seeds: tuple[int, ...] = (1, 2, 3)

    @property
    def setting(self) -> Setting:
        values = {
            "epochs": default_epochs("toy"),
            "classes": all_classes("toy"),
            "as_published": True,
        }
        return Setting("toy", self.preset, self.digits, **(values | self.changes))

    sees_negatives = Entry.sees_negatives
    full_label = Entry.full_label

    def at_zero_fpr(self, *, score: str) -> list[float] | None:
        return {"logit": [0.1, 0.2, 0.6], "softmax": [0.0]}.get(score)

    def mean(self, column: str, *, group: str = "unknowns", score: str = "softmax") -> float | None:
        if isinstance(self.ccr, float):
            return self.ccr
        if group == VALIDATION_GROUP:
            return self.ccr[score] if column == "0.01" else 0.0
        return self.ccr.get(column)


def settings_of(*entries: Judged) -> dict[Setting, Any]:
    """Entries by setting, as ``group_rows`` gives them."""
    settings: dict[Setting, Any] = {}
    for entry in entries:
        settings.setdefault(entry.setting, []).append(entry)
    return settings
