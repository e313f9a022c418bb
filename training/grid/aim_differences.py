"""What the aims are made of: the models that they are judged by beside the others with the same digits."""

from __future__ import annotations

from collections.abc import Sequence

from training.grid.aims import (
    FEWER_MISSED,
    RECOMMENDED_CCR,
    WITHOUT_NEGATIVES_CCR,
    best_entry,
    entry_name,
    full_trainings,
    is_plain_thesis,
    is_published_thesis,
    recommended_entry,
    recommended_score,
)
from training.grid.results import Entry, Setting
from training.grid.tables import BENCHMARKS, pair_table


def aim_differences(settings: dict[Setting, list[Entry]], protocol: str) -> dict[str, str]:
    """For each source of digits a table of the judged models minus the others; none but for toy.

    The recommended model is taken with its score, all others with softmax.
    """
    if protocol != "toy":
        return {}
    found = {}
    for digits in ("mnist", "emnist"):
        entries = full_trainings(settings, digits)
        pairs: list[tuple[Entry, Entry]] = []
        for entry in _judged(entries, digits):
            pairs += [
                (entry, other)
                for other in _opponents(entry, entries)
                if (other, entry) not in pairs
            ]
        if pairs:
            found[digits] = pair_table(pairs, name=_name, score=_score)
    return found


def _judged(entries: Sequence[Entry], digits: str) -> list[Entry]:
    found = [recommended_entry(entries)]
    if digits == "mnist":
        found += [
            best_entry(entries, column, lambda entry: not entry.sees_negatives)[0]
            for column in WITHOUT_NEGATIVES_CCR
        ]
    return list(dict.fromkeys(entry for entry in found if entry is not None))


def _opponents(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """All others of its setting, the published code's benchmarks, and the best thesis losses at the rates of the aims.

    The best of those that see negatives, or of those that see none, as it does: by the published code, and of either
    definition.
    """
    alike = [one for one in entries if one.sees_negatives == entry.sees_negatives]
    best = {
        best_entry(alike, column, is_baseline)[0]
        for column in (*RECOMMENDED_CCR, *FEWER_MISSED)
        for is_baseline in (is_plain_thesis, is_published_thesis)
    }
    benchmarks = BENCHMARKS[entry.sees_negatives]
    return [
        one
        for one in entries
        if one is not entry
        and (
            one.setting == entry.setting
            or one in best
            or (is_published_thesis(one) and one.loss in benchmarks)
        )
    ]


def _score(entry: Entry) -> str:
    return recommended_score(entry) if entry.is_recommended else "softmax"


def _name(entry: Entry) -> str:
    """The entry's name, and its score where it is another than softmax."""
    score = _score(entry)
    return entry_name(entry) + (f", {score}" if score != "softmax" else "")
