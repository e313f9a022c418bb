"""The thesis' tables 5.1, 5.2, 6.1 and 6.2 and how far a single run may lie from the last two (van den Bergh 2023)."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from training.losses import LOSSES

TARGETS = ("0.001", "0.01", "0.1")

# Table 6.1 rests on one run a row. Later runs of the author, of nine of its losses and with s = 15 instead of 13, differ
# from it by about this much at most; without negatives, CCR@1e-3 differs by a factor.
_TOY_SPREAD = {
    True: {"0.001": 0.02, "0.01": 0.006, "0.1": 0.002, "accuracy": 0.0015},
    False: {"0.01": 0.17, "0.1": 0.03, "accuracy": 0.0015},
}
_TOY_FACTOR = 3.0
# The largest differences of four losses that the author ran twice on P2; at 1e-3 two of them reach the FPR only once.
_P2_SPREAD = {"0.01": 0.053, "0.1": 0.019, "accuracy": 0.021}

Interval = tuple[float, float]


@cache
def _tables() -> dict[str, Any]:
    text = (resources.files("training") / "published_tables.json").read_text()
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def published_counts(protocol: str) -> dict[str, dict[str, int]]:
    """Images by part and group (table 5.1, sizes of P1 to P3); empty where the thesis names none."""
    counts: dict[str, dict[str, int]] = _tables()["counts"].get(protocol, {})
    return counts


def published_hyperparameters(protocol: str) -> dict[str, float | None]:
    """Table 5.2 by the thesis' symbols, None where it does not use one; empty where it has no such protocol."""
    values: dict[str, float | None] = _tables()["hyperparameters"].get(protocol, {})
    return values


def comparisons(protocol: str) -> list[tuple[str, list[str]]]:
    """What the protocol's table compares: title and losses of each group; empty where nothing is published."""
    table = _tables()["tables"].get(protocol, {"groups": []})
    return [(group["title"], list(group["losses"])) for group in table["groups"]]


def published_value(protocol: str, loss: str, column: str) -> float | None:
    """A cell of the thesis' table; ``column`` is one of ``TARGETS`` or "accuracy". None: no such row, or not reached."""
    row = _tables()["tables"].get(protocol, {"values": {}})["values"].get(loss)
    return None if row is None else _column(row, column)


def is_published(protocol: str, loss: str) -> bool:
    """Does the thesis have a row for this loss?"""
    return loss in _tables()["tables"].get(protocol, {"values": {}})["values"]


def replicate(protocol: str, loss: str, column: str) -> tuple[float | None, str] | None:
    """The author's latest other run of a loss with softmax scores: value and how its settings differ; None without one."""
    rows = [
        row
        for row in _tables()["replicates"]
        if (row["protocol"], row["loss"], row["score"]) == (protocol, loss, "softmax")
    ]
    if not rows:
        return None
    latest = max(rows, key=lambda row: row["date"])
    return _column(latest, column), latest["settings"]


def published_interval(protocol: str, loss: str, column: str) -> Interval | None:
    """Where another run of the author may lie: the published value with its spread. None without a value or a spread.

    The spread is the difference between two runs where such are known, else the sampling error of the test set alone; see
    ``has_replicates``.
    """
    value = published_value(protocol, loss, column)
    if value is None:
        return None
    if protocol == "toy":
        uses_negatives = LOSSES[loss].uses_negatives
        if not uses_negatives and column == "0.001":
            return value / _TOY_FACTOR, value * _TOY_FACTOR
        half = _TOY_SPREAD[uses_negatives][column]
    elif has_replicates(protocol, column):
        half = _P2_SPREAD[column]
    else:
        half = _tables()["half_widths"][protocol][column]
    return max(0.0, value - half), min(1.0, value + half)


def has_replicates(protocol: str, column: str) -> bool:
    """Is it known how far two runs of the author differ in this figure?"""
    return protocol == "toy" or (protocol == "p2" and column in _P2_SPREAD)


def _column(row: dict[str, Any], column: str) -> float | None:
    value = row["accuracy"] if column == "accuracy" else row["ccr_at_fpr"][column]
    return None if value is None else float(value)
