"""The grid's tables in Markdown: published beside ours, differences, digits, scores, what is missing and how to fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from training.grid import RANKING, all_classes, default_epochs, ranked_losses
from training.grid_results import (
    COLUMNS,
    Difference,
    Entry,
    Setting,
    difference,
    option_text,
    options_text,
)
from training.grid_rows import OTHER_DIGITS_GROUP, PUBLISHED_SCORE
from training.grid_statistics import ACCURACY, Interval, prediction_interval
from training.grid_summaries import PASSING_TARGETS
from training.losses import THESIS_LOSSES, published_deviations
from training.options import applies
from training.protocols import WITH_DIGITS, get_protocol
from training.published import (
    comparisons,
    has_replicates,
    is_published,
    published_interval,
    published_value,
    replicate,
)

HEADINGS = {"0.001": "CCR@1e-3", "0.01": "CCR@1e-2", "0.1": "CCR@1e-1", ACCURACY: "Acc"}
_PASSING_SHOWN = 6
# With fewer losses, a setting of characters is a trial of these, beside the grid. Photographs cost too much for trials: what
# is missing there is named from the first loss on, but only those that are worth knowing first.
_MIN_COMPARED = 3
# What a loss is held against, by whether it sees negatives.
BENCHMARKS = {False: ("softmax",), True: ("softmax", "eos", "os")}

# Science reference, section 2.6: what the published code did otherwise, as the option that switches it off.
_COMMON_SWITCHES: dict[str, Any] = {"feature_bias": False}
_CHARACTER_SWITCHES: dict[str, Any] = {"activation": "prelu"}
_SWITCH_OF_FIELD = {"normalization": "head"}  # where it is not called like the loss table's field


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


def published_setting(protocol: str) -> Setting:
    """The setting of the thesis' table, whether anything was run in it or not."""
    digits = "mnist" if protocol in WITH_DIGITS else None
    return Setting(
        protocol, "thesis", digits, default_epochs(protocol), all_classes(protocol), True
    )


def plain_entry(entries: Sequence[Entry], loss: str) -> Entry | None:
    """The entry of a loss without further options."""
    return next((entry for entry in entries if entry.loss == loss and not entry.options), None)


def published_table(setting: Setting, entries: Sequence[Entry], *, seeds: int = 3) -> str:
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
        lines += [
            _published_line(setting, plain_entry(entries, loss), loss, seeds) for loss in losses
        ]
    return table(headings, lines)


def _published_line(setting: Setting, entry: Entry | None, loss: str, seeds: int) -> list[str]:
    count = len(entry.models) if entry else 0
    line = [f"`{loss}`", seeds_text(entry)]
    for column in COLUMNS:
        line += [_published_text(setting.protocol, loss, column)]
        line += [figure_text(entry, column) if entry else ""]
    fill = command(setting, loss, seeds=seeds) if count < seeds else ""
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


def setting_table(
    entries: Sequence[Entry], *, group: str = "unknowns", score: str = "softmax"
) -> str:
    """Our figures alone."""
    lines = []
    for entry in entries:
        cells = [figure_text(entry, column, group=group, score=score) for column in COLUMNS]
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


REPRODUCED, BEYOND, UNDECIDED = "reproduced", "beyond", "undecided"


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


def verdicts(entries: Sequence[Entry]) -> list[tuple[Entry, str, str]]:
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
    return [found for found in verdicts(entries) if found[2] != REPRODUCED]


def verdict_summary(protocol: str, entries: Sequence[Entry]) -> str:
    """How much of the published table was run, how it compares, and what lies outside."""
    # A row may stand in several comparisons.
    published = {loss for _, losses in comparisons(protocol) for loss in losses}
    run = [loss for loss in published if plain_entry(entries, loss) is not None]
    found = [kind for _, _, kind in verdicts(entries)]
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


def digits_table(
    mnist: Sequence[Entry], emnist: Sequence[Entry]
) -> tuple[str, list[tuple[Entry, Entry]]]:
    """The same losses with MNIST's digits and with EMNIST's; also the pairs."""
    pairs = []
    for entry in mnist:
        twin = next((o for o in emnist if (o.loss, o.options) == (entry.loss, entry.options)), None)
        if twin is not None:
            pairs.append((entry, twin))
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
    return (table(headings, lines) if lines else ""), pairs


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
            if all(("validation_negatives", score) in model.rows for model in entry.models):
                cells = [
                    figure_text(entry, column, group="validation_negatives", score=score)
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
