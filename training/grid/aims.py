"""What this project sets out to reach on the toy protocol, and how far it got."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from training.grid.commands import SEEDS, command
from training.grid.formatting import number, signed, table
from training.grid.plan import default_epochs
from training.grid.results import Entry, Setting, options_text, published_setting
from training.grid.rows import VALIDATION_GROUP
from training.losses import THESIS_LOSSES
from training.recommendations import RECOMMENDED, recommendation

# On unknowns, CCR at an FPR: the recommended model with MNIST's digits, and any model that sees no negatives.
RECOMMENDED_CCR = {"0.001": 0.990, "0.01": 0.994}
WITHOUT_NEGATIVES_CCR = {"0.01": 0.65}
# With EMNIST's digits, share of the knowns that the best thesis loss misses (1 - CCR) and the recommended one must not.
FEWER_MISSED = {"0.01": 0.25, "0.1": 0.25}


@dataclass(frozen=True)
class Aim:
    """A figure and what was reached.

    Attributes:
        digits: source of the digits.
        what: the figure, for people.
        aim: what it should be at least; None for a figure that is shown without an aim.
        reached: what it is; None where nothing was run, or an FPR is not reached.
        by: which models reached it, and the commands for seeds that they lack.
        command: trains what was not run, as code in Markdown; empty where there is a model.
    """

    digits: str
    what: str
    aim: float | None
    reached: float | None
    by: str
    command: str = ""

    @property
    def distance(self) -> float | None:
        """Reached minus aim; negative where the aim is missed."""
        return None if self.reached is None or self.aim is None else self.reached - self.aim


def aims(settings: dict[Setting, list[Entry]], protocol: str) -> list[Aim]:
    """The aims of a protocol, none but for toy; only full trainings on all classes count."""
    if protocol != "toy":
        return []
    mnist, emnist = (full_trainings(settings, digits) for digits in ("mnist", "emnist"))
    return [
        *_recommended_aims(mnist),
        *_without_negatives_aims(mnist),
        *_fewer_missed_aims(emnist),
    ]


def full_trainings(settings: dict[Setting, list[Entry]], digits: str) -> list[Entry]:
    """All that were trained as long as the protocol asks, on all of its classes, with this source of digits."""
    return [
        entry
        for setting, found in settings.items()
        for entry in found
        if setting.digits == digits
        and setting.epochs == default_epochs(setting.protocol)
        and setting.is_complete
        and not setting.data_options
    ]


def _recommended_aims(entries: Sequence[Entry]) -> list[Aim]:
    best = recommended_entry(entries)
    whats = {column: f"`{RECOMMENDED}`: CCR at FPR {column}" for column in RECOMMENDED_CCR}
    if best is None:
        asked = _command(RECOMMENDED, "mnist")
        return [Aim("mnist", whats[c], aim, None, "", asked) for c, aim in RECOMMENDED_CCR.items()]
    score = recommended_score(best)
    by = f"{entry_name(best)}, {score}"
    found = [
        Aim("mnist", whats[column], aim, best.mean(column, score=score), by + _seeds_to_add(best))
        for column, aim in RECOMMENDED_CCR.items()
    ]
    values = best.at_zero_fpr(score=score)
    if values is not None:
        by += f"; by seed {', '.join(number(value) for value in values)}"
    reached = None if values is None else sum(values) / len(values)
    what = f"`{RECOMMENDED}`: CCR with no unknown accepted"
    return [*found, Aim("mnist", what, None, reached, by)]


def _without_negatives_aims(entries: Sequence[Entry]) -> list[Aim]:
    found = []
    for column, aim in WITHOUT_NEGATIVES_CCR.items():
        what = f"best of those trained without negatives: CCR at FPR {column}"
        best, count = best_entry(entries, column, lambda entry: not entry.sees_negatives)
        if best is None:
            found.append(Aim("mnist", what, aim, None, "", _command("softmax", "mnist")))
        else:
            by = f"{entry_name(best)}, best of {count} ways to train{_seeds_to_add(best)}"
            found.append(Aim("mnist", what, aim, best.mean(column), by))
    return found


def _fewer_missed_aims(entries: Sequence[Entry]) -> list[Aim]:
    ours = recommended_entry(entries)
    found = []
    for (column, aim), (whose, is_baseline) in itertools.product(
        FEWER_MISSED.items(),
        (("", is_plain_thesis), (" with the published code", is_published_thesis)),
    ):
        what = f"`{RECOMMENDED}`: share fewer knowns missed at FPR {column} than by the best thesis loss{whose}"
        theirs, count = best_entry(entries, column, is_baseline)
        missing = [RECOMMENDED] * (ours is None) + ["cos_eos"] * (theirs is None)
        if ours is None or theirs is None:
            found.append(Aim("emnist", what, aim, None, "", _command(",".join(missing), "emnist")))
            continue
        score = recommended_score(ours)
        mean, other = ours.mean(column, score=score), theirs.mean(column)
        reached = (
            None if mean is None or other is None or other == 1 else 1 - (1 - mean) / (1 - other)
        )
        by = f"{entry_name(ours)}, {score}, against {entry_name(theirs)}, best of {count} ways to train"
        by += _seeds_to_add(ours) + _seeds_to_add(theirs)
        found.append(Aim("emnist", what, aim, reached, by))
    return found


def is_plain_thesis(entry: Entry) -> bool:
    """A loss of the thesis under its preset, by the published code or as the text defines it."""
    return entry.loss in THESIS_LOSSES and entry.setting.preset == "thesis" and not entry.options


def is_published_thesis(entry: Entry) -> bool:
    """A loss of the thesis under its preset by the published code, which departs from the text."""
    return is_plain_thesis(entry) and entry.setting.as_published


def recommended_entry(entries: Iterable[Entry]) -> Entry | None:
    """What ``recommended`` stands for; None where it was not run."""
    return next((entry for entry in entries if entry.is_recommended), None)


def best_entry(
    entries: Iterable[Entry], column: str, is_candidate: Callable[[Entry], bool]
) -> tuple[Entry | None, int]:
    """The candidate with the largest CCR on unknowns, softmax scores; and of how many."""
    means = {
        entry: mean
        for entry in entries
        if is_candidate(entry) and (mean := entry.mean(column)) is not None
    }
    return (max(means, key=lambda entry: means[entry]) if means else None), len(means)


def recommended_score(entry: Entry) -> str:
    """The recommendation's score; of several the one with the best CCR@1e-2 on the validation part's negatives."""
    names = recommendation(entry.setting.protocol, entry.setting.digits).scores
    return max(
        names, key=lambda name: entry.mean("0.01", group=VALIDATION_GROUP, score=name) or 0.0
    )


def entry_name(entry: Entry) -> str:
    """Loss and all options; the preset where it is not the thesis', and whether by the published code."""
    parts = [f"`{entry.full_label}`"]
    if entry.setting.preset != "thesis":
        parts.append(f"{entry.setting.preset} preset")
    if entry.setting.as_published:
        parts.append("published code")
    return ", ".join(parts)


def _seeds_to_add(entry: Entry) -> str:
    """How many of the seeds an entry has, with the command for the others; empty where it has all."""
    missing = [seed for seed in SEEDS if seed not in entry.seeds]
    if not missing:
        return ""
    # A number alone would be how many.
    seeds = ",".join(map(str, missing)) if len(missing) > 1 else f"{missing[0]}-{missing[0]}"
    if entry.is_recommended:
        asked = _command(RECOMMENDED, entry.setting.digits or "", seeds)
    else:
        asked = command(entry.setting, entry.loss, seeds=seeds, options=options_text(entry.options))
    return f"; `{entry.full_label}` has {len(entry.seeds)} of {len(SEEDS)} seeds, for the rest: {asked}"


def _command(losses: str, digits: str, seeds: int | str = len(SEEDS)) -> str:
    return command(replace(published_setting("toy"), digits=digits), losses, seeds=seeds)


def aims_table(found: Sequence[Aim]) -> str:
    """Aim, reached, distance; what is missing with its command."""
    lines = []
    for aim in found:
        wanted = "" if aim.aim is None else f"≥ {number(aim.aim, 3)}"
        distance = "" if aim.distance is None else signed(aim.distance)
        reached = "" if aim.reached is None else number(aim.reached)
        if aim.reached is None and aim.by:
            reached = "–"
        by = f"not run: {aim.command}" if aim.command else aim.by
        lines.append([aim.what, aim.digits.upper(), wanted, reached, distance, by])
    headings = ["figure, on unknowns", "digits", "aim", "reached", "distance", "by"]
    return table(headings, lines) if lines else ""
