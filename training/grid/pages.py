"""The page of a protocol: its rows gathered, its sections in order, their contents on top."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from training.choices import GRID_RUNS, RESULTS
from training.grid import conditions, drawing, tables, thesis_table
from training.grid.aim_differences import aim_differences
from training.grid.aims import aims, aims_table
from training.grid.commands import command
from training.grid.results import Entry, Setting, digit_twins, group_rows, published_setting, twins
from training.grid.rows import (
    Row,
    alone_in,
    cell_key,
    merge_rows,
    results_file,
    stored_rows,
)
from training.markdown_contents import contents
from training.runs import write_atomically

logger = logging.getLogger(__name__)

_TABLE_NAMES = {
    "toy": "table 6.1",
    "p1": "table 6.2 (a)",
    "p2": "table 6.2 (b)",
    "p3": "table 6.2 (c)",
}


def write(protocol: str, *, runs: Path = GRID_RUNS, results: Path = RESULTS) -> Path | None:
    """Write ``<results>/<protocol>.md`` and its figures; None where there is neither a row nor a published table.

    Rows of finished runs on this machine that the rows' file lacks are added to it first.

    Args:
        protocol: whose grid.
        runs: folder of the grid's runs; where it lacks one, its rows are enough for the tables.
        results: folder of the rows, where the report goes.
    """
    with alone_in(runs) if runs.is_dir() else nullcontext():
        return _write(protocol, runs, results)


def _write(protocol: str, runs: Path, results: Path) -> Path | None:
    file = results_file(protocol, results)
    rows = _gather(protocol, runs, file)
    if not rows and protocol not in _TABLE_NAMES:
        return None
    settings = group_rows(rows, runs, results)
    figures = drawing.draw_all(settings, results / "figures", protocol) if rows else {}
    target = file.with_suffix(".md")
    parts = _sections(protocol, rows, settings, figures) if rows else _published_alone(protocol)
    body = [part for part in parts if part]
    listed = contents("\n\n".join(body))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        target, "\n\n".join([_title(protocol), *([listed] if listed else []), *body]) + "\n"
    )
    what = f"{len(figures)} figures" if rows else "nothing was run, the published values alone"
    logger.info("written: %s (%s)", target, what)
    return target


def _gather(protocol: str, runs: Path, file: Path) -> list[Row]:
    found = [
        row
        for folder in sorted(runs.glob(f"{protocol}-*"))
        for row in stored_rows(folder)
        if row["protocol"] == protocol
    ]
    if not found and not file.is_file():
        return []
    # What is there is written again too, in the form of this release.
    return merge_rows(file, found, is_held=runs.resolve() == file.parent.resolve())


def _sections(
    protocol: str, rows: list[Row], settings: dict[Setting, list[Entry]], figures: dict[str, str]
) -> list[str]:
    published = published_setting(protocol)
    entries = settings.get(published, [])
    parts = [_origin(protocol, rows), _HOW_TO_READ]
    if entries:
        parts += _thesis_table(published, entries)
    parts += conditions.sections(protocol, rows)
    parts += _aims(settings, protocol)
    parts += _digits(settings, figures)
    parts += _other_digits(settings)
    if entries:
        parts.append("## The published setting in detail")
    parts += _comparison(published, entries, figures)
    for setting, others in settings.items():
        if setting != published:
            parts += [f"## {setting.title}", _caution(setting)]
            parts += [
                f"All with `{others[0].shared_text}`." if others[0].shared else "",
                "CCR against **unknowns**, softmax scores.",
                tables.setting_table(others),
                tables.missing_note(setting, others),
                tables.precision_note(others),
                tables.counts_note(others),
            ]
            parts += _comparison(setting, others, figures)
    parts += _pictures(settings, figures)
    if not entries:  # what was run comes first
        parts += _thesis_table(published, entries)
    return parts


def _published_alone(protocol: str) -> list[str]:
    """The page of a protocol of which nothing was run: the thesis' table, empty cells of ours, and what fills them."""
    published = published_setting(protocol)
    parts = [
        f"Made by `make report PROTOCOL={protocol}`; not to be edited. Nothing was run: the cells of ours are empty, and "
        f"{command(published, seeds=3)} fills all of them.",
        *_thesis_table(published, []),
        *conditions.sections(protocol, []),
    ]
    return parts


def _title(protocol: str) -> str:
    return f"# {protocol}: the thesis' grid"


_HOW_TO_READ = (
    "A figure is the mean over the seeds that were run, ± the half-width of its 95 % interval over seeds (Student's t, "
    "from two seeds on), then in brackets the 95 % interval over classes: a bootstrap that draws whole classes, knowns "
    "and foreign ones apart, with a new threshold each time, and the same classes for all models, so that differences "
    "are paired. With few classes its percentiles are too narrow; they are widened by sqrt(G / (G - 1)) and Student's t of "
    "G - 1 degrees of freedom, G the smaller number of classes. A dash: the FPR is not reached. Empty: not run."
)


def _origin(protocol: str, rows: list[Row]) -> str:
    cells = {cell_key(row): row for row in rows}
    machines: dict[str, Counter[str]] = {}
    for row in cells.values():
        machine = f"{row['device']}, {row['precision']}"
        machines.setdefault(machine, Counter())[row["commit"]] += 1
    listed = "\n".join(
        f"- {commits.total()} on {machine}: "
        + ", ".join(f"{commit} ({count})" for commit, count in sorted(commits.items()))
        for machine, commits in sorted(machines.items())
    )
    return (
        f"Made by `make report PROTOCOL={protocol}` from `{protocol}.json` and the stored scores; not to be edited. "
        f"The rows come from `make reproduce PROTOCOL={protocol}`, {len(cells)} trained model{'s' * (len(cells) > 1)} "
        f"by machine and commit (+: tracked files differed from the commit's, for instance rows of other runs):\n\n{listed}"
    )


def _thesis_table(published: Setting, entries: Sequence[Entry]) -> list[str]:
    """The published table beside ours, of which nothing need have been run; empty where the thesis has none."""
    protocol = published.protocol
    if protocol not in _TABLE_NAMES:
        return []
    how = "CCR against **unknowns**, softmax scores, FPR strictly below the target, as published. The thesis has one run a row."
    return [
        f"## The thesis' {_TABLE_NAMES[protocol]} and ours",
        f"Setting: {published.title}. {how}" + ("" if entries else " Nothing was run in it yet."),
        thesis_table.published_table(published, entries),
        thesis_table.published_code_note(),
        tables.precision_note(entries),
        thesis_table.replicate_note(protocol),
        tables.counts_note(entries),
        *(_deviations(published, entries) if entries else []),
    ]


def _deviations(setting: Setting, entries: Sequence[Entry]) -> list[str]:
    rule = (
        "Reproduced: our mean over seeds lies within the published value's spread. Beyond: our interval over seeds does not meet "
        "that spread. Undecided: the mean lies outside, and one seed alone was run or the interval over seeds meets the spread. "
        "The interval over classes has no say here: the author's models and ours are tested on the same classes, so that it "
        "tells how a figure may move with other classes and not whether it was reproduced. One more run of ours: an interval "
        "that holds one further seed with 95 % (Student's t, cut at 0 and 1; wide with two or three seeds); a published figure "
        "in it cannot be told from one more training of ours. "
    ) + thesis_table.spread_note(setting.protocol)
    return [
        "### Outside the published spread",
        thesis_table.verdict_summary(setting.protocol, entries),
        rule,
        thesis_table.deviation_table(setting, entries),
    ]


def _caution(setting: Setting) -> str:
    reasons = []
    if not setting.as_published:
        reasons.append("the definitions of the thesis' text, not the published code")
    if setting.preset != "thesis":
        reasons.append(f"the {setting.preset} preset")
    if setting.digits == "emnist":
        reasons.append("EMNIST's digits, not MNIST's as in the published runs")
    if setting.epochs != published_setting(setting.protocol).epochs:
        reasons.append("another number of epochs")
    if not setting.is_complete:
        reasons.append("fewer classes")
    if setting.data_options:
        reasons.append("other data")
    return f"Not comparable with the thesis' table: {'; '.join(reasons)}." if reasons else ""


def _comparison(setting: Setting, entries: Sequence[Entry], figures: dict[str, str]) -> list[str]:
    if not entries:
        return []
    differences = tables.difference_table(entries)
    scores = tables.score_table(entries)
    parts = ["### Against negatives", tables.setting_table(entries, group="negatives")]
    # The published setting's own table has the plain entries of protocols with a published table, and nothing else.
    if setting == published_setting(setting.protocol) and (
        setting.protocol not in _TABLE_NAMES or any(entry.options for entry in entries)
    ):
        parts = [
            "### Against unknowns",
            tables.setting_table(entries),
            tables.precision_note(entries),
            *([] if setting.protocol in _TABLE_NAMES else [tables.counts_note(entries)]),
            *parts,
        ]
    if differences:
        parts += [
            "### Differences to the benchmarks",
            "Softmax, which sees no negatives in training, and for losses that see them EOS and OS. Bold: both intervals "
            "exclude zero.",
            differences,
            tables.conclusion(entries),
        ]
    if options := tables.option_table(entries):
        parts += [
            "### What options change",
            "Against the same loss without them, or with fewer of them. Bold: both intervals exclude zero.",
            options,
        ]
    if scores:
        parts += ["### Softmax or logit thresholds", scores]
    saturation = tables.saturation_table(entries)
    if saturation:
        parts += [
            "### No saturation",
            "CCR against unknowns. A float32 probability is exactly 1 for many images; a dash is where these ties put "
            "the FPR out of reach. Log-odds order the same images without ties.",
            saturation,
        ]
    parts += [
        "### No foreign image accepted",
        "CCR with the threshold just above the best foreign score.",
    ]
    parts.append(tables.zero_table(entries))
    passing = tables.passing_table(entries)
    if passing:
        parts += [
            "### Who passes",
            "Unknown images above the softmax threshold by their class and the one they are taken for; of the first seed.",
            passing,
        ]
    validation = tables.validation_table(entries)
    if validation:
        parts += [
            "### The validation part, for information",
            "Not for choosing: these images certify the thresholds of these models, and a choice made on them would cost that. "
            "`make recommend` chooses without them.",
            validation,
        ]
    slug = drawing.slug(setting)
    parts += [
        f"![{caption}]({figures[key]})"
        for kind, caption in drawing.CAPTIONS.items()
        if (key := f"{slug}-{kind}") in figures
    ]
    return parts


def _aims(settings: dict[Setting, list[Entry]], protocol: str) -> list[str]:
    found = aims(settings, protocol)
    if not found:
        return []
    parts = [
        "## Aims",
        "What this project sets out to reach; full trainings only, means over the seeds that were run. A distance of zero or "
        "more: the aim is reached. A line without an aim is for information. The best of several was taken on these very test "
        "images, so that it is flattered. A thesis loss is one under the thesis preset, by the published code or as the text "
        "defines it; where both were run the better one counts, and in the lines that say so the published code alone.",
        aims_table(found),
    ]
    if by_digits := aim_differences(settings, protocol):
        parts += [
            "### What the aims are made of",
            "The models that the aims are judged by minus others that were trained in full with the same digits: all of the same "
            "preset and definition, and by the published code softmax and the best at each rate of an aim of those that see "
            "negatives as it does, or see none as it does; for what sees negatives EOS and OS too. CCR on unknowns and accuracy, "
            "softmax scores where no other is named; ± over seeds, in brackets over classes. Bold: both intervals exclude zero.",
        ]
        for digits, text in by_digits.items():
            parts += [f"With {digits.upper()}'s digits:", text]
    return parts


def _digits(settings: dict[Setting, list[Entry]], figures: dict[str, str]) -> list[str]:
    parts = []
    for first, second in digit_twins(settings):
        pairs = twins(settings[first], settings[second])
        if pairs:
            parts.append(f"### {first.title.replace('MNIST digits, ', '')}")
            key = f"{drawing.slug(first)}-style"
            if key in figures:
                parts += [
                    f"![CCR of the losses that were run with both sources of digits]({figures[key]})",
                    "Means over the seeds that were run. The intervals are of each figure; those of the paired difference stand "
                    "in the table.",
                ]
            parts += [
                tables.digits_table(pairs),
                "Share of the knowns missed (rejected, or taken for another class), 1 − CCR:",
                tables.missed_table(pairs),
            ]
            key = f"{drawing.slug(first)}-digits"
            if key in figures:
                parts.append(f"![CCR against FPR with both sources of digits]({figures[key]})")
    if not parts:
        return []
    return [
        "## How much of the separation is style?",
        "The same losses and training; only the source of the known digits differs. The foreign letters are EMNIST's in "
        "both: MNIST's digits were converted otherwise, so that they can be told from letters by their style alone.",
        *parts,
    ]


def _other_digits(settings: dict[Setting, list[Entry]]) -> list[str]:
    parts = []
    for setting, entries in settings.items():
        text = tables.other_digits_table(entries)
        if text:
            parts += [f"### Other digits: {setting.title}", text]
    if not parts:
        return []
    return [
        "## Tested with the other source's digits",
        "The same models, letters and thresholds; only the digits of the test are of the source that the model was not trained "
        "with (other), beside those of its own: they lack what a model may have learned of its own digits' style. Differences "
        "are paired: the same classes are drawn for both.",
        *parts,
    ]


def _pictures(settings: dict[Setting, list[Entry]], figures: dict[str, str]) -> list[str]:
    features, sheets = (_pictures_of_entries(settings, figures, kind) for kind in drawing.PICTURES)
    parts = ["## Deep features", *features] if features else []
    if sheets:
        parts += [
            "## The foreign images with the highest scores",
            "Of each loss' first seed, softmax score; every run has such a sheet in its folder (`figures/false_positives.png`).",
            *sheets,
        ]
    return parts


def _pictures_of_entries(
    settings: dict[Setting, list[Entry]], figures: dict[str, str], kind: str
) -> list[str]:
    parts = []
    for setting, entries in settings.items():
        shown = [
            f"`{entry.full_label}`\n\n![{entry.full_label}, {setting.title}]({path})"
            for entry in entries
            if (path := figures.get(drawing.key_of(entry, kind)))
        ]
        if overview := figures.get(f"{drawing.slug(setting)}-{kind}"):
            shown = [f"![{kind} of all losses, {setting.title}]({overview})", *shown]
        parts += [f"### {setting.title}", *shown] if shown else []
    return parts
