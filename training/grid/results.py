"""What the grid has found so far: its rows by setting and loss, seeds together, with their intervals."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training.angles import Angles, angles_of
from training.evaluation import SCORES_FILE, results_folder
from training.grid.plan import all_classes, default_epochs, differing_options
from training.grid.rows import CELL_FILE, GROUPS, OTHER_DIGITS_GROUP, Row, cell_key, replaced_scores
from training.grid.summaries import GROUP_LABELS, Summary, stored_summary, summarize, summary_file
from training.intervals import (
    ACCURACY,
    Floats,
    Interval,
    ModelScores,
    percentile_interval,
    seed_difference_interval,
    seed_interval,
    widened,
)
from training.losses import LOSSES
from training.protocols import WITH_DIGITS
from training.published import TARGETS
from training.recommendations import recommendation
from training.runs import Run
from training.scoring import Scored

logger = logging.getLogger(__name__)

COLUMNS = (*TARGETS, ACCURACY)
# These change what the task is; all other options change how a model is made for it.
_DATA_OPTIONS = ("allow_missing_classes", "image_size", "on_unreadable", "size", "split_seed")


@dataclass(frozen=True)
class Setting:
    """What the models of one table have in common.

    Attributes:
        protocol: name.
        preset: "thesis" or "modern".
        digits: "mnist", "emnist" or None.
        epochs: passes over the training data.
        classes: known/negative/unknown classes, e.g. "10/11/11".
        as_published: whether the published code's deviations are on.
        data_options: what the data differ in from the protocol's, (name, value) each.
    """

    protocol: str
    preset: str
    digits: str | None
    epochs: int
    classes: str
    as_published: bool
    data_options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_published(self) -> bool:
        """Is this what the thesis' numbers were made with?"""
        return self == published_setting(self.protocol)

    @property
    def is_complete(self) -> bool:
        """Are all classes of the protocol there?"""
        return self.classes == all_classes(self.protocol)

    def class_count(self, group: str, column: str) -> int:
        """Number of classes that a figure's bootstrap draws from: the smaller of knowns and the foreign group."""
        known, negative, unknown = (int(count) for count in self.classes.split("/"))
        if column == ACCURACY:
            return known
        return min(known, unknown if group.startswith("unknowns") else negative)

    @property
    def title(self) -> str:
        """For people."""
        full = default_epochs(self.protocol)
        parts = [
            f"{self.preset} preset" + (", published code" if self.as_published else ""),
            "" if self.digits is None else f"{self.digits.upper()} digits",
            f"{self.epochs} epochs" if self.epochs == full else f"{self.epochs} of {full} epochs",
            ""
            if self.is_complete
            else f"restricted to {self.classes} known/negative/unknown classes",
            *(option_text(name, value) for name, value in self.data_options),
        ]
        return ", ".join(part for part in parts if part)


def option_text(name: str, value: Any) -> str:
    """An option as OPTIONS= takes it."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def options_text(options: dict[str, Any]) -> str:
    """Options as OPTIONS= takes them."""
    return " ".join(option_text(name, value) for name, value in options.items())


@dataclass(frozen=True, eq=False)
class Model:
    """One trained cell.

    Attributes:
        columns: of any of its rows; they name the cell and say where its figures come from.
        rows: by (group, score).
        folder: of its run; the scores may lie on another machine.
        results: folder of the rows and summaries.
    """

    columns: Row
    rows: dict[tuple[str, str], Row]
    folder: Path
    results: Path

    @property
    def diverged(self) -> str | None:
        """Why there is no figure, if there is none."""
        message: str | None = self.columns.get("diverged")
        return message

    def value(self, group: str, score: str, column: str) -> float | None:
        """A figure of the model; None where it is not reached or not there."""
        row = self.rows.get((group, score))
        if row is None or "diverged" in row:
            return None
        value = row["accuracy"]["value"] if column == ACCURACY else _ccr(row, column)["value"]
        return None if value is None else float(value)

    def stored_interval(self, group: str, score: str, column: str) -> Interval | None:
        """The class-clustered interval that the row carries; none of the accuracy."""
        row = self.rows.get((group, score))
        if row is None or column == ACCURACY or "diverged" in row:
            return None
        interval = _ccr(row, column)["interval_clustered"]
        return None if interval is None else (float(interval[0]), float(interval[1]))

    @property
    def run(self) -> str:
        """Its name."""
        name: str = self.columns["run"]
        return name

    @property
    def angles(self) -> Angles | None:
        """Histograms of its angles, where they are kept."""
        return None if self.summary is None else self.summary.angles

    @cached_property
    def has_scores(self) -> bool:
        """Do the scores behind these rows lie on this machine?"""
        file = self.folder / CELL_FILE
        if self.diverged or not file.is_file():
            return False
        provenance = json.loads(file.read_text())["provenance"]
        is_same = provenance["evaluated"] == self.columns["evaluated"]
        return bool(is_same and self._is_own(self.folder / SCORES_FILE))

    def _is_own(self, file: Path) -> bool:
        """Is a file of scores here, and is it what these rows were computed from?"""
        if not file.is_file():
            return False
        is_replaced = str(file.relative_to(self.folder)) in replaced_scores(self.folder)
        if is_replaced:
            logger.warning(
                "%s was written by another evaluation than its rows and is left out; "
                "the cell's own command, run as python -m training.reproduce ... --again, evaluates it anew",
                file,
            )
        return not is_replaced

    @cached_property
    def summary(self) -> Summary | None:
        """Replicates, curves, angles: from the file kept beside the rows, else from the scores, and then kept; else None."""
        if self.diverged:
            return None
        file = summary_file(self.results, self.columns["run"])
        kept = stored_summary(file, self.columns["evaluated"])
        is_whole = kept is not None and kept.angles is not None
        if is_whole or not self.has_scores:
            return kept
        run, scored = Run(self.folder), Scored.load(self.folder / SCORES_FILE)
        other = None
        if (OTHER_DIGITS_GROUP, "softmax") in self.rows:
            file_of_other = results_folder(run, run.config.other_digits) / SCORES_FILE
            if self._is_own(file_of_other):
                other = _sample(Scored.load(file_of_other))
        made = summarize(
            _sample(scored),
            rule=self.columns["rule"],
            evaluated=self.columns["evaluated"],
            angles=angles_of(scored, run.config),
            other_digits=other,
        )
        made.save(file)
        return Summary.load(file)


def _sample(scored: Scored) -> ModelScores:
    return ModelScores(scored.scores, scored.predictions, scored.labels, scored.groups)


def _ccr(row: Row, column: str) -> dict[str, Any]:
    cell: dict[str, Any] = row["ccr_at_fpr"][column]
    return cell


@dataclass(frozen=True, eq=False)
class Entry:
    """One loss with one set of options in one setting: the models of its seeds.

    Attributes:
        setting: of the table it stands in.
        loss: its name.
        options: what differs from the setting.
        models: by seed, ascending.
        shared: names of the options that all entries of several in the setting have alike.
    """

    setting: Setting
    loss: str
    options: dict[str, Any]
    models: list[Model] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)

    @property
    def label(self) -> str:
        """Loss, and the options that not all in its table have."""
        options = options_text({k: v for k, v in self.options.items() if k not in self.shared})
        return self.loss + (f" ({options})" if options else "")

    @property
    def full_label(self) -> str:
        """Loss and all its options; unlike its label the same in whatever company it is shown."""
        return self.loss + (f" ({options_text(self.options)})" if self.options else "")

    @property
    def shared_text(self) -> str:
        """The options that all in its table have."""
        return options_text({k: v for k, v in self.options.items() if k in self.shared})

    @property
    def sees_negatives(self) -> bool:
        """Is a foreign image shown in training, or chooses an epoch? Not where all of them are composed of knowns."""
        is_composed = self.options.get("composed_negatives") == 1
        return LOSSES[self.loss].uses_negatives and (
            not is_composed or "initial_weights" in self.options
        )

    @property
    def is_recommended(self) -> bool:
        """Is this what ``recommended`` stands for, with its scores?"""
        setting = self.setting
        choice = recommendation(setting.protocol, setting.digits)
        options = differing_options(
            setting.protocol, choice.loss, choice.preset, setting.digits, choice.options
        )
        as_published = bool(options.pop("as_published", False))
        return (self.loss, setting.preset, self.options, setting.as_published) == (
            choice.loss, choice.preset, options, as_published,
        )  # fmt: skip

    @property
    def seeds(self) -> list[int]:
        """That were run, ascending."""
        return [model.columns["seed"] for model in self.models]

    @property
    def sound(self) -> list[Model]:
        """Models that did not diverge."""
        return [model for model in self.models if model.diverged is None]

    def values(
        self, column: str, *, group: str = "unknowns", score: str = "softmax"
    ) -> list[float]:
        """The figure of each seed that reaches it."""
        values = [model.value(group, score, column) for model in self.sound]
        return [value for value in values if value is not None]

    def mean(self, column: str, *, group: str = "unknowns", score: str = "softmax") -> float | None:
        """Mean over seeds; None unless all of them reach it: the others would flatter it."""
        values = self.values(column, group=group, score=score)
        return float(np.mean(values)) if values and len(values) == len(self.models) else None

    def at_zero_fpr(self, *, group: str = "unknowns", score: str = "softmax") -> list[float] | None:
        """CCR of each seed with no foreign image accepted; None where one diverged or has no such row."""
        rows = [model.rows.get((group, score)) for model in self.sound]
        values = [row["ccr_at_zero_fpr"] for row in rows if row is not None]
        return values if values and len(values) == len(self.models) else None

    def over_seeds(
        self, column: str, *, group: str = "unknowns", score: str = "softmax"
    ) -> Interval | None:
        """95 % interval of the mean over seeds; None for one seed, or where some do not reach the FPR."""
        if self.mean(column, group=group, score=score) is None:
            return None
        return seed_interval(self.values(column, group=group, score=score))

    def over_classes(
        self, column: str, *, group: str = "unknowns", score: str = "softmax"
    ) -> Interval | None:
        """95 % class-clustered bootstrap interval of the mean, widened for the number of classes; else None."""
        if self.mean(column, group=group, score=score) is None:
            return None
        replicates = self.replicates(group, score)
        interval = None
        if replicates is not None:
            interval = percentile_interval(replicates[column])
        elif len(self.models) == 1:
            # What the row carries: of one model, and with fewer replicates.
            interval = self.models[0].stored_interval(group, score, column)
        center = self.mean(column, group=group, score=score)
        if interval is None or center is None:
            return None
        low, high = widened(interval, center, self.setting.class_count(group, column))
        return max(0.0, low), min(1.0, high)

    def replicates(self, group: str, score: str) -> dict[str, Floats] | None:
        """Bootstrap replicates of the means over seeds; None where a model's are neither here nor kept."""
        if group not in (*GROUP_LABELS, OTHER_DIGITS_GROUP) or len(self.sound) != len(self.models):
            return None
        found = [model.summary for model in self.models]
        parts = [one.replicates.get((group, score)) for one in found if one is not None]
        complete = [part for part in parts if part is not None]
        if len(complete) < len(self.models):
            return None
        return {
            column: np.mean([part[column] for part in complete], axis=0) for column in complete[0]
        }


@dataclass(frozen=True)
class Difference:
    """First minus second: value, interval over seeds and over classes; None where there is none."""

    value: float
    over_seeds: Interval | None
    over_classes: Interval | None

    @property
    def is_established(self) -> bool:
        """Do both intervals exclude zero?"""
        both = (self.over_seeds, self.over_classes)
        return all(interval is not None and interval[0] * interval[1] > 0 for interval in both)


def difference(
    first: Entry,
    second: Entry,
    column: str,
    *,
    groups: tuple[str, str] = ("unknowns", "unknowns"),
    scores: tuple[str, str] = ("softmax", "softmax"),
) -> Difference | None:
    """Compare two entries; None where one of them does not reach the FPR.

    The bootstrap draws the same classes for both (paired); with the same images, so also the same images.
    """
    compared = list(zip((first, second), groups, scores, strict=True))
    means = [entry.mean(column, group=group, score=score) for entry, group, score in compared]
    if means[0] is None or means[1] is None:
        return None
    values = [entry.values(column, group=group, score=score) for entry, group, score in compared]
    replicates = [entry.replicates(group, score) for entry, group, score in compared]
    over_classes = None
    if replicates[0] is not None and replicates[1] is not None:
        over_classes = percentile_interval(replicates[0][column] - replicates[1][column])
    if over_classes is not None:
        count = first.setting.class_count(groups[0], column)
        low, high = widened(over_classes, means[0] - means[1], count)
        over_classes = max(-1.0, low), min(1.0, high)
    # Two scores of the same models are paired by seed.
    seeds = (
        seed_interval([one - other for one, other in zip(*values, strict=True)])
        if first is second
        else seed_difference_interval(*values)
    )
    return Difference(means[0] - means[1], seeds, over_classes)


def group_rows(rows: Iterable[Row], runs: Path, results: Path) -> dict[Setting, list[Entry]]:
    """Settings, the published one first, with their entries in the order of the rows.

    Of one seed trained in two precisions the float32 model counts, which is what the thesis has.

    Args:
        rows: of one protocol.
        runs: folder of the grid's runs.
        results: folder of the rows and summaries.
    """
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(cell_key(row), []).append(row)
    entries: dict[tuple[Setting, str], Entry] = {}
    for members in by_cell.values():
        # Rows of one cell come from one evaluation; an older one may have left a score that is no longer made.
        newest = max(row["evaluated"] for row in members)
        current = [row for row in members if row["evaluated"] == newest]
        columns = next((row for row in current if row["group"] in GROUPS.values()), current[0])
        options = dict(columns["options"])
        of_data = tuple((key, options.pop(key)) for key in _DATA_OPTIONS if key in options)
        setting = Setting(
            columns["protocol"], columns["preset"], columns["digits"], columns["epochs"],
            columns["classes"], bool(options.pop("as_published", False)), of_data,
        )  # fmt: skip
        name = (setting, json.dumps([columns["loss"], options], sort_keys=True))
        entry = entries.setdefault(name, Entry(setting, columns["loss"], options))
        rows_by_name = {(row["group"], row["score"]): row for row in current}
        entry.models.append(Model(columns, rows_by_name, runs / columns["run"], results))
    settings: dict[Setting, list[Entry]] = {}
    for (setting, _), entry in sorted(entries.items(), key=lambda item: _order(item[0][0])):
        by_precision = sorted(entry.models, key=lambda one: one.columns["precision"] == "float32")
        by_seed = {one.columns["seed"]: one for one in by_precision}
        entry.models[:] = [by_seed[seed] for seed in sorted(by_seed)]
        settings.setdefault(setting, []).append(entry)
    for setting, together in settings.items():
        # Beside the published figures every option counts.
        if len(together) > 1 and not setting.is_published:
            for option, value in together[0].options.items():
                if all({option: value}.items() <= one.options.items() for one in together):
                    for one in together:
                        one.shared.add(option)
    return settings


def _order(setting: Setting) -> tuple[Any, ...]:
    """The published setting first, then what is nearest to it."""
    return (
        not setting.is_published, setting.preset != "thesis", not setting.as_published, setting.digits != "mnist",
        -setting.epochs, setting.title,
    )  # fmt: skip


def plain_entry(entries: Sequence[Entry], loss: str) -> Entry | None:
    """The entry of a loss without further options."""
    return next((entry for entry in entries if entry.loss == loss and not entry.options), None)


def published_setting(protocol: str) -> Setting:
    """The setting of the thesis' table, whether anything was run in it or not."""
    digits = "mnist" if protocol in WITH_DIGITS else None
    return Setting(
        protocol, "thesis", digits, default_epochs(protocol), all_classes(protocol), True
    )


def digit_twins(settings: Iterable[Setting]) -> list[tuple[Setting, Setting]]:
    """Pairs of settings that differ in the source of the digits alone, MNIST first."""
    listed = list(settings)
    return [
        (first, second)
        for first in listed
        for second in listed
        if (first.digits, second.digits) == ("mnist", "emnist")
        and _without_digits(first) == _without_digits(second)
    ]


def _without_digits(setting: Setting) -> tuple[object, ...]:
    return tuple(value for name, value in vars(setting).items() if name != "digits")


def twins(mnist: Sequence[Entry], emnist: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """The same loss and options with either source of digits, in the order of the first."""
    return [
        (entry, twin)
        for entry in mnist
        for twin in emnist
        if (twin.loss, twin.options) == (entry.loss, entry.options)
    ]
