"""Figures, intervals, names and tables of the grid as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from training.grid.results import Difference, Entry
from training.intervals import ACCURACY, Interval

HEADINGS = {"0.001": "CCR@1e-3", "0.01": "CCR@1e-2", "0.1": "CCR@1e-1", ACCURACY: "Acc"}


def number(value: float | None, digits: int = 4) -> str:
    """So many digits, without the leading zero; a dash where the FPR is not reached."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}".removeprefix("0")
    return f"−{text}" if value < 0 and float(text) else text


def signed(value: float) -> str:
    """A difference, with its sign."""
    return number(value) if value < 0 else "+" + number(value)


def interval_text(interval: Interval | None) -> str:
    """[low, high], empty where there is none."""
    return "" if interval is None else f"[{number(interval[0], 3)}, {number(interval[1], 3)}]"


def figure_text(
    entry: Entry, column: str, *, group: str = "unknowns", score: str = "softmax"
) -> str:
    """Mean, half-width over seeds, interval over classes; why not, where there is no mean."""
    options = {"group": group, "score": score}
    if any(model.diverged for model in entry.models):
        return "diverged"
    mean = entry.mean(column, **options)
    if mean is None:
        reached = len(entry.values(column, **options))
        return "–" if not reached else f"– ({reached} of {len(entry.models)} seeds reach it)"
    seeds = entry.over_seeds(column, **options)
    half = "" if seeds is None else f" ±{number(seeds[1] - mean)}"
    return f"{number(mean)}{half} {interval_text(entry.over_classes(column, **options))}".rstrip()


def difference_text(result: Difference | None) -> str:
    """Value, half-width over seeds and interval over classes; bold where both exclude zero."""
    if result is None:
        return "–"
    half = ""
    if result.over_seeds is not None:
        half = f" ±{number(result.over_seeds[1] - result.value)}"
    value = signed(result.value)
    shown = f"**{value}**" if result.is_established else value
    return f"{shown}{half} {interval_text(result.over_classes)}".rstrip()


def seeds_text(entry: Entry | None) -> str:
    """How many seeds, and how many of them trained with a bfloat16 backbone; empty where nothing was run."""
    if entry is None or not entry.models:
        return ""
    half = sum(model.columns["precision"] == "bfloat16" for model in entry.models)
    return f"{len(entry.models)}" + (f" ({half} bf16)" if half else "")


def name_text(entry: Entry) -> str:
    """Loss and options; whether the recommendation stands for it."""
    return f"`{entry.label}`" + (" (recommended)" if entry.is_recommended else "")


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rules = ["---", *("--:" for _ in headings[1:])]
    rows = [headings, rules, *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
