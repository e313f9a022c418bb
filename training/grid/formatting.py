"""Figures, names, tables and commands of the grid as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from training.grid.plan import default_epochs
from training.grid.results import Difference, Entry, Setting, option_text
from training.grid.statistics import ACCURACY, Interval
from training.protocols import get_protocol

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


def seeds_text(entry: Entry | None) -> str:
    """How many seeds, and how many of them trained with a bfloat16 backbone; empty where nothing was run."""
    if entry is None or not entry.models:
        return ""
    half = sum(model.columns["precision"] == "bfloat16" for model in entry.models)
    return f"{len(entry.models)}" + (f" ({half} bf16)" if half else "")


def precision_note(entries: Iterable[Entry]) -> str:
    """What "bf16" means; empty where no such model is shown."""
    if not any("bf16" in seeds_text(entry) for entry in entries):
        return ""
    return (
        "bf16: so many of the seeds trained with bfloat16 arithmetic in the backbone (head, loss and test scores are float32); "
        "the thesis trained in float32."
    )


def name_text(entry: Entry) -> str:
    """Loss and options; whether the recommendation stands for it."""
    return f"`{entry.label}`" + (" (recommended)" if entry.is_recommended else "")


def counts_note(entries: Iterable[Entry]) -> str:
    """How many samples the models saw, and what is to know about the data; empty for rows that do not say."""
    texts: dict[str, None] = {}
    for entry in entries:
        for model in entry.models:
            parts = [
                f"{part} {' / '.join(f'{count:,} {group}' for group, count in counts.items() if count)}"
                for part, counts in model.columns.get("counts", {}).items()
                if any(counts.values())
            ]
            sentences = ["Samples: " + "; ".join(parts)] if parts else []
            texts |= dict.fromkeys(sentences + list(model.columns.get("notes", [])))
    return "\n".join(f"- {text}" for text in texts)


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rules = ["---", *("--:" for _ in headings[1:])]
    rows = [headings, rules, *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def command(setting: Setting, losses: str = "", *, seeds: int | str = 1, options: str = "") -> str:
    """The command that trains cells of a setting; without losses all of the thesis'. A number of seeds, or which."""
    parts = [f"make reproduce PROTOCOL={setting.protocol}"]
    parts += [f"LOSSES={losses}"] if losses else []
    parts.append(f"SEEDS={seeds}")
    if setting.digits:
        parts.append(f"DIGITS={setting.digits}")
    if setting.epochs != default_epochs(setting.protocol):
        parts.append(f"EPOCHS={setting.epochs}")
    if setting.preset != "thesis":
        parts.append(f"PRESET={setting.preset}")
    elif not setting.as_published:
        options = f"as_published=false {options}".strip()
    options = " ".join([options, *(option_text(*pair) for pair in setting.data_options)]).strip()
    if get_protocol(setting.protocol).is_of_characters:
        parts += ["DATA=$DATA"] * (setting.protocol != "glyphs")
    else:
        parts.append("DATA=/imagenet" if setting.is_complete else "DATA=$TINY")
    if options:
        parts.append(f'OPTIONS="{options}"' if " " in options else f"OPTIONS={options}")
    return f"`{' '.join(parts)}`"


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
