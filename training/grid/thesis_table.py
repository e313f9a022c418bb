"""The thesis' table beside ours: verdicts, what lies outside the published spread, and what could explain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.grid.commands import SEEDS, command
from training.grid.formatting import HEADINGS, figure_text, interval_text, number, seeds_text, table
from training.grid.plan import ranked_losses
from training.grid.results import COLUMNS, Entry, Setting, option_text, plain_entry
from training.intervals import ACCURACY, prediction_interval
from training.losses import THESIS_LOSSES, published_deviations
from training.protocols import get_protocol
from training.published import (
    comparisons,
    has_replicates,
    is_published,
    published_interval,
    published_value,
    replicate,
)

REPRODUCED, BEYOND, UNDECIDED = "reproduced", "beyond", "undecided"

# Science reference, section 2.6: what the published code did otherwise, as the option that switches it off.
_COMMON_SWITCHES: dict[str, Any] = {"feature_bias": False}
_CHARACTER_SWITCHES: dict[str, Any] = {"activation": "prelu"}
_SWITCH_OF_FIELD = {"normalization": "head"}  # where it is not called like the loss table's field


def published_table(setting: Setting, entries: Sequence[Entry]) -> str:
    """The thesis' table side by side with ours; losses without a published row follow."""
    groups = comparisons(setting.protocol)
    shown = {loss for _, losses in groups for loss in losses}
    rest = [loss for loss in ranked_losses(setting.protocol) if loss not in shown]
    headings = ["loss", "seeds"]
    for column in COLUMNS:
        headings += [f"{HEADINGS[column]} thesis", "ours"]
    headings += ["verdict", "to fill"]
    lines = []
    for title, losses in [*groups, ("no row in the thesis", rest)]:
        if losses:
            lines.append([f"*{title}*", *[""] * (len(headings) - 1)])
        lines += [_published_line(setting, plain_entry(entries, loss), loss) for loss in losses]
    return table(headings, lines)


def _published_line(setting: Setting, entry: Entry | None, loss: str) -> list[str]:
    count = len(entry.models) if entry else 0
    line = [f"`{loss}`", seeds_text(entry)]
    for column in COLUMNS:
        line += [_published_text(setting.protocol, loss, column)]
        line += [figure_text(entry, column) if entry else ""]
    fill = command(setting, loss, seeds=len(SEEDS)) if count < len(SEEDS) else ""
    return [*line, _verdict_text(entry), fill]


def _published_text(protocol: str, loss: str, column: str) -> str:
    if is_published(protocol, loss):
        return number(published_value(protocol, loss, column))
    other = replicate(protocol, loss, column)
    return "" if other is None else f"({number(other[0])})"


def replicate_note(protocol: str) -> str:
    """What the values in brackets are."""
    notes = []
    for loss in ranked_losses(protocol):
        other = replicate(protocol, loss, ACCURACY)
        if other is not None and not is_published(protocol, loss):
            notes.append(f"`{loss}` ({other[1]})")
    return (
        "In brackets: a later run of the author that is not in the thesis, with its settings against ours: "
        + ", ".join(notes)
        + "."
        if notes
        else ""
    )


def published_code_note() -> str:
    """The rows of the published table whose loss the author's code computed otherwise than the thesis' text, and how."""
    rows: dict[str, list[str]] = {}
    for loss in THESIS_LOSSES:
        for deviation in published_deviations(loss):
            rows.setdefault(deviation.meaning, []).append(f"`{loss}`")
    few_first = sorted(rows.items(), key=lambda item: len(item[1]))
    lines = [f"- {', '.join(losses)}: {meaning}" for meaning, losses in few_first]
    return "\n".join(
        [
            "In these rows the author's code, and with it ours in this table, deviates from the thesis' text (what holds for "
            "all rows: [as published](../training.md#as-published)):\n",
            *lines,
        ]
    )


def verdict(entry: Entry, column: str) -> str | None:
    """Our figure against the published one with the spread of a run; None where one of them is missing.

    The interval over classes has no say: the author's models and ours are tested on the same classes.

    Returns:
        ``REPRODUCED`` where our mean lies within the published value's spread; ``BEYOND`` where our interval over seeds does not
        meet that spread; ``UNDECIDED`` where the mean lies outside, and that interval meets the spread or one seed was run.
    """
    theirs = published_interval(entry.setting.protocol, entry.loss, column)
    mean = entry.mean(column)
    if theirs is None or mean is None:
        return None
    if theirs[0] <= mean <= theirs[1]:
        return REPRODUCED
    ours = entry.over_seeds(column)
    if ours is not None and (ours[1] < theirs[0] or ours[0] > theirs[1]):
        return BEYOND
    return UNDECIDED


def _verdicts(entries: Sequence[Entry]) -> list[tuple[Entry, str, str]]:
    """Entry, column and verdict of every figure that can be compared with a published one."""
    return [
        (entry, column, found)
        for entry in entries
        if not entry.options
        for column in COLUMNS
        if (found := verdict(entry, column)) is not None
    ]


def outside_published(entries: Sequence[Entry]) -> list[tuple[Entry, str, str]]:
    """Entry, column and verdict where our mean is not within the published value's spread."""
    return [found for found in _verdicts(entries) if found[2] != REPRODUCED]


def verdict_summary(protocol: str, entries: Sequence[Entry]) -> str:
    """How much of the published table was run, how it compares, and what lies outside."""
    # A row may stand in several comparisons.
    published = {loss for _, losses in comparisons(protocol) for loss in losses}
    run = [loss for loss in published if plain_entry(entries, loss) is not None]
    found = [kind for _, _, kind in _verdicts(entries)]
    text = f"{len(run)} of {len(published)} published rows were run"
    if not found:
        return text + "; no figure can be compared yet."
    outside = [
        f"`{entry.loss}` {HEADINGS[column]} (thesis {number(published_value(protocol, entry.loss, column))} "
        f"{interval_text(published_interval(protocol, entry.loss, column))}, ours {number(entry.mean(column))})"
        for entry, column, _ in outside_published(entries)
    ]
    return (
        f"{text}; of {len(found)} figures that can be compared {found.count(REPRODUCED)} are reproduced, "
        f"{found.count(BEYOND)} lie beyond, {found.count(UNDECIDED)} are undecided"
        + (f". Outside the published spread: {', '.join(outside)}." if outside else ".")
    )


def spread_note(protocol: str) -> str:
    """What the spread of the published values is."""
    if protocol == "toy":
        return (
            "Of nine of the table's fourteen losses there are later runs of the author, all with s = 15 instead of 13. The "
            "spread is about the largest difference between the two, and so wider than a seed's. Without negatives it is a "
            "weak test: a factor of 3 at 1e-3, .17 at 1e-2."
        )
    if protocol == "p2":
        return (
            "The spread is the largest difference over four losses that the author ran twice; at 1e-3 the test set's sampling "
            "error stands in, and a run may well differ by more."
        )
    return "No second run of the author is known: the spread is the test set's sampling error, and a run may well differ by more."


def _verdict_text(entry: Entry | None) -> str:
    """The verdicts of a row; columns are named where they differ."""
    kinds: dict[str, list[str]] = {}
    for column in COLUMNS if entry is not None else ():
        assert entry is not None
        if (found := verdict(entry, column)) is not None:
            kinds.setdefault(found, []).append(HEADINGS[column])
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{kind}: {', '.join(columns)}" for kind, columns in kinds.items())


def deviation_table(setting: Setting, entries: Sequence[Entry]) -> str:
    """Every cell outside the published one's spread, with what each deviation of the published code does to it."""
    lines = []
    for entry, column, kind in outside_published(entries):
        theirs = published_interval(setting.protocol, entry.loss, column)
        experiments = [
            _experiment(setting, entry, entries, column, option, value)
            for option, value in switches(setting.protocol, entry.loss).items()
        ]
        lines.append(
            [
                f"`{entry.loss}`",
                HEADINGS[column],
                f"{number(published_value(setting.protocol, entry.loss, column))} {interval_text(theirs)}"
                + ("" if has_replicates(setting.protocol, column) else " (no replicate known)"),
                figure_text(entry, column),
                _one_more_run(entry, column),
                kind,
                "<br>".join(experiments),
            ]
        )
    headings = ["loss", "figure", "thesis, spread", "ours", "one more run of ours", "verdict"]
    return table([*headings, "one deviation switched off"], lines) if lines else ""


def _one_more_run(entry: Entry, column: str) -> str:
    found = prediction_interval(entry.values(column))
    return interval_text(None if found is None else (max(0.0, found[0]), min(1.0, found[1])))


def switches(protocol: str, loss: str) -> dict[str, Any]:
    """Options that switch off what the published code did otherwise for this loss, one by one."""
    chosen = dict(_COMMON_SWITCHES)
    if get_protocol(protocol).is_of_characters:
        chosen |= _CHARACTER_SWITCHES
    return chosen | {
        _SWITCH_OF_FIELD.get(deviation.field, deviation.field): deviation.text
        for deviation in published_deviations(loss)
    }


def _experiment(
    setting: Setting, entry: Entry, entries: Sequence[Entry], column: str, option: str, value: Any
) -> str:
    name = option_text(option, value)
    other = next(
        (one for one in entries if one.loss == entry.loss and one.options == {option: value}), None
    )
    if other is not None:
        return f"`{name}`: {figure_text(other, column)}"
    return f"`{name}`: not run, {command(setting, entry.loss, options=name)}"
