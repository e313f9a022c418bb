"""The grid's tables in Markdown: our figures, differences, digits, scores, what is missing and how to fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from training.grid.commands import command
from training.grid.formatting import (
    HEADINGS,
    difference_text,
    figure_text,
    name_text,
    number,
    seeds_text,
    table,
)
from training.grid.plan import RANKING, ranked_losses
from training.grid.results import COLUMNS, Entry, Setting, difference, options_text, plain_entry
from training.grid.rows import OTHER_DIGITS_GROUP, PUBLISHED_SCORE, VALIDATION_GROUP
from training.grid.summaries import PASSING_TARGETS
from training.options import applies
from training.protocols import get_protocol

_PASSING_SHOWN = 6
# With fewer losses, a setting of characters is a trial of these, beside the grid. Photographs cost too much for trials: what
# is missing there is named from the first loss on, but only those that are worth knowing first.
_MIN_COMPARED = 3
# What a loss is held against, by whether it sees negatives.
BENCHMARKS = {False: ("softmax",), True: ("softmax", "eos", "os")}


def setting_table(entries: Sequence[Entry], *, group: str = "unknowns") -> str:
    """Our figures alone, softmax scores."""
    lines = []
    for entry in entries:
        cells = [figure_text(entry, column, group=group) for column in COLUMNS]
        lines.append([name_text(entry), seeds_text(entry), *cells])
    return table(["loss", "seeds", *HEADINGS.values()], lines)


def missing_note(setting: Setting, entries: Sequence[Entry]) -> str:
    """The losses that were not run in a setting where others were, with the command that trains them; empty for a trial."""
    run = {entry.loss for entry in entries}
    several = len(run) >= _MIN_COMPARED
    if not several and get_protocol(setting.protocol).is_of_characters:
        return ""
    asked = ranked_losses(setting.protocol) if several else RANKING
    missing = [loss for loss in asked if loss not in run]
    if not missing:
        return ""
    names = ", ".join(f"`{loss}`" for loss in missing)
    shared = {
        name: value
        for name, value in entries[0].options.items()
        if all({name: value}.items() <= entry.options.items() for entry in entries)
    }
    commands: dict[str, list[str]] = {}
    for loss in missing:
        taken = {name: value for name, value in shared.items() if applies(name, loss)}
        commands.setdefault(options_text(taken), []).append(loss)
    lines = [command(setting, ",".join(losses), options=text) for text, losses in commands.items()]
    return f"Not run here: {names}. To run them: {', '.join(lines)}."


def benchmarks_of(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """Softmax, and for what sees negatives EOS and OS; those that were run, with the same options where they have them.

    An option that a benchmark's loss does not have makes no difference: a margin that grows from 0 is compared with EOS,
    which has none. A benchmark is compared with the ones before it alone.
    """
    names = BENCHMARKS[entry.sees_negatives]
    if entry.loss in names:
        names = names[: names.index(entry.loss) + bool(entry.options)]
    found = []
    for loss in names:
        options = {name: value for name, value in entry.options.items() if applies(name, loss)}
        alike = [one for one in entries if (one.loss, one.options) == (loss, options)]
        other = alike[0] if alike and alike[0] is not entry else plain_entry(entries, loss)
        if other is not None and other is not entry:
            found.append(other)
    return found


def difference_table(entries: Sequence[Entry]) -> str:
    """Each loss minus its benchmarks; empty where there is no pair."""
    return pair_table(
        [(entry, other) for entry in entries for other in benchmarks_of(entries, entry)]
    )


def option_table(entries: Sequence[Entry]) -> str:
    """Each loss with options minus the same loss with the most of them, but not all; empty where there is no pair."""
    pairs = []
    for entry in entries:
        less = [
            one
            for one in entries
            if one.loss == entry.loss and one.options.items() < entry.options.items()
        ]
        if less:
            pairs.append((entry, max(less, key=lambda one: len(one.options))))
    return pair_table(pairs)


def pair_table(
    pairs: Iterable[tuple[Entry, Entry]],
    name: Callable[[Entry], str] = lambda entry: f"`{entry.label}`",
    score: Callable[[Entry], str] = lambda _: "softmax",
) -> str:
    """First minus second of each pair, each with its score; empty where there is no pair."""
    lines = []
    for entry, other in pairs:
        scores = (score(entry), score(other))
        found = [difference(entry, other, column, scores=scores) for column in COLUMNS]
        lines.append([f"{name(entry)} − {name(other)}", *map(difference_text, found)])
    return table(["difference", *HEADINGS.values()], lines) if lines else ""


def score_table(entries: Sequence[Entry]) -> str:
    """Logit minus softmax thresholding of the same models."""
    lines = []
    for entry in entries:
        if not all((("unknowns", "logit") in model.rows) for model in entry.models):
            continue
        cells = []
        for column in COLUMNS[:-1]:
            cells += [figure_text(entry, column, score=score) for score in ("softmax", "logit")]
            change = difference(entry, entry, column, scores=("logit", "softmax"))
            cells.append(difference_text(change))
        lines.append([f"`{entry.label}`", *cells])
    headings = ["loss"]
    for column in COLUMNS[:-1]:
        headings += [f"{HEADINGS[column]} softmax", "logit", "logit − softmax"]
    return table(headings, lines) if lines else ""


def saturation_table(entries: Sequence[Entry]) -> str:
    """The same models with the published score, a float32 probability, and with log-odds, which do not tie at 1."""
    lines = []
    for entry in entries:
        if not all(("unknowns", PUBLISHED_SCORE) in model.rows for model in entry.models):
            continue
        cells = []
        for column in COLUMNS[:-1]:
            means = [entry.mean(column, score=score) for score in (PUBLISHED_SCORE, "softmax")]
            cells += [number(mean) for mean in means]
        lines.append([name_text(entry), *cells])
    headings = ["loss"]
    for column in COLUMNS[:-1]:
        headings += [f"{HEADINGS[column]} probability", "log-odds"]
    return table(headings, lines) if lines else ""


def passing_table(entries: Sequence[Entry]) -> str:
    """Which unknown classes pass, and as what: of the first seed, softmax scores; empty where no summary says it."""
    lines = []
    for entry in entries:
        summary = next((found for model in entry.sound if (found := model.summary)), None)
        for target in PASSING_TARGETS:
            passing = summary and summary.passing.get(("unknowns", "softmax", target))
            if not passing:
                continue
            name_of = get_protocol(entry.setting.protocol).short_name
            shown = ", ".join(
                f"{name_of(foreign)} → {name_of(taken)} {count}"
                for (foreign, taken), count in list(passing.pairs.items())[:_PASSING_SHOWN]
            )
            rest = passing.count - sum(list(passing.pairs.values())[:_PASSING_SHOWN])
            lines.append([name_text(entry), target, str(passing.count), shown, str(rest)])
    headings = ["loss", "FPR", "accepted", "of which", "others"]
    return table(headings, lines) if lines else ""


def digits_table(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """The same losses with MNIST's digits and with EMNIST's; empty where there is no pair."""
    lines = []
    for first, second in pairs:
        cells = []
        for column in COLUMNS:
            change = difference(first, second, column)
            cells += [figure_text(first, column), figure_text(second, column)]
            cells.append(difference_text(change))
        lines.append([f"`{first.label}`", *cells])
    headings = ["loss"]
    for column in COLUMNS:
        headings += [f"{HEADINGS[column]} MNIST", "EMNIST", "difference"]
    return table(headings, lines) if lines else ""


def missed_table(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """Share of the knowns that are rejected or taken for another class, 1 - CCR, with either source of digits."""
    lines = []
    for pair in pairs:
        cells = []
        for column in COLUMNS[:-1]:
            means = [entry.mean(column) for entry in pair]
            cells += [number(None if mean is None else 1 - mean) for mean in means]
        lines.append([f"`{pair[0].label}`", *cells])
    headings = ["loss"]
    for column in COLUMNS[:-1]:
        headings += [f"missed at FPR {column}, MNIST", "EMNIST"]
    return table(headings, lines) if lines else ""


def other_digits_table(entries: Sequence[Entry]) -> str:
    """What models keep of digits of the source that they were not trained with, beside their own, at the same thresholds.

    Of the seeds that were tested so; they are named.
    """
    lines = []
    for whole in entries:
        tested = [one for one in whole.models if (OTHER_DIGITS_GROUP, "softmax") in one.rows]
        if not tested:
            continue
        entry = replace(whole, models=tested)
        cells = []
        for column in COLUMNS:
            change = difference(entry, entry, column, groups=("unknowns", OTHER_DIGITS_GROUP))
            cells += [
                figure_text(entry, column),
                figure_text(entry, column, group=OTHER_DIGITS_GROUP),
                difference_text(change),
            ]
        lines.append(
            [name_text(entry), ", ".join(str(one.columns["seed"]) for one in tested), *cells]
        )
    headings = ["loss", "seed"]
    for column in COLUMNS:
        headings += [f"{HEADINGS[column]} own", "other", "difference"]
    return table(headings, lines) if lines else ""


def validation_table(entries: Sequence[Entry]) -> str:
    """CCR against the validation part's negatives, for information."""
    lines = []
    for entry in entries:
        for score in ("softmax", "logit"):
            if all((VALIDATION_GROUP, score) in model.rows for model in entry.models):
                cells = [
                    figure_text(entry, column, group=VALIDATION_GROUP, score=score)
                    for column in COLUMNS
                ]
                lines.append([f"`{entry.label}`", score, *cells])
    return table(["loss", "score", *HEADINGS.values()], lines) if lines else ""


def zero_table(entries: Sequence[Entry]) -> str:
    """CCR with no foreign image accepted, by group and score."""
    lines = []
    for entry in entries:
        if len(entry.sound) == len(entry.models):
            cells = [
                _zero_text(entry, group, score)
                for group in ("negatives", "unknowns")
                for score in ("softmax", "logit")
            ]
            lines.append([f"`{entry.label}`", *cells])
    headings = ["loss"] + [
        f"{group}, {score}" for group in ("negatives", "unknowns") for score in ("softmax", "logit")
    ]
    return table(headings, lines) if lines else ""


def _zero_text(entry: Entry, group: str, score: str) -> str:
    values = entry.at_zero_fpr(group=group, score=score)
    if values is None:
        return ""
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(sum(values) / len(values)) + spread


def conclusion(entries: Sequence[Entry]) -> str:
    """What the intervals allow to say about the differences to the benchmarks."""
    counts = {column: [0, 0, 0] for column in COLUMNS}  # better, worse, compared
    pairs = [(entry, other) for entry in entries for other in benchmarks_of(entries, entry)]
    for entry, other in pairs:
        for column in COLUMNS:
            found = difference(entry, other, column)
            if found is None or found.over_seeds is None or found.over_classes is None:
                continue
            counts[column][2] += 1
            if found.is_established:
                counts[column][found.value < 0] += 1
    compared = {column: row for column, row in counts.items() if row[2]}
    if not compared:
        return (
            "No difference has both intervals yet (they need at least two seeds of both losses, with stored scores). With one "
            "seed, a difference whose interval over classes excludes 0 holds for these trained models; whether it holds for "
            "models trained again is not known. The intervals are not corrected for the number of comparisons."
        )
    parts = [
        f"{HEADINGS[column]}: {row[0]} better and {row[1]} worse than a benchmark, {row[2] - row[0] - row[1]} open"
        for column, row in compared.items()
    ]
    total = sum(row[2] for row in compared.values())
    return (
        f"Differences whose two intervals both exclude zero: {'; '.join(parts)}. Of {total} comparisons at 95 %, about "
        f"{0.05 * total:.1f} would look established by chance on one interval alone; requiring both makes that rarer. "
        "The intervals over classes draw whole classes, of which there are few: such a bootstrap is too narrow, and widening it "
        "for the number of classes, as was done here, makes up for that only approximately."
    )


def precision_note(entries: Iterable[Entry]) -> str:
    """What "bf16" means; empty where no such model is shown."""
    if not any("bf16" in seeds_text(entry) for entry in entries):
        return ""
    return (
        "bf16: so many of the seeds trained with bfloat16 arithmetic in the backbone (head, loss and test scores are float32); "
        "the thesis trained in float32."
    )


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
