"""What an arm changed against its baseline: paired over seeds and over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openset.labels import UNKNOWN, is_known
from training.intervals import (
    Floats,
    ModelScores,
    bootstrap_by_class,
    percentile_interval,
    seed_interval,
    widened,
)
from training.scoring import Scored

REPLICATES = "replicates"  # of a row; too many to be written


def ccr_replicates(scored: Scored, score: str, targets: Sequence[float]) -> dict[str, Any]:
    """Class-clustered bootstrap of CCR@FPR against unknowns; the same classes are drawn for all models.

    Returns:
        By f"{target:g}", (repeats,) each; and "classes", of knowns or of unknowns, whichever are fewer. Empty without unknowns.
    """
    unknown = scored.labels == UNKNOWN
    if not unknown.any():
        return {}
    sample = ModelScores(scored.scores, scored.predictions, scored.labels, scored.groups)
    columns = bootstrap_by_class(
        sample, score=score, against=UNKNOWN, targets=targets, rule="inclusive"
    )
    found: dict[str, Any] = {f"{target:g}": columns[f"{target:g}"] for target in targets}
    kinds = (len(np.unique(scored.groups[mask])) for mask in (unknown, is_known(scored.labels)))
    return found | {"classes": min(kinds)}


def baseline_of(arm: str, losses: dict[str, str]) -> str:
    """The first arm of the same loss; for that arm itself the first of all.

    Args:
        arm: its name.
        losses: of all arms by their names, in their order.
    """
    first_of_loss = next(name for name, loss in losses.items() if loss == losses[arm])
    return next(iter(losses)) if first_of_loss == arm else first_of_loss


def differences(
    rows: Sequence[dict[str, Any]], *, score: str, targets: Sequence[float]
) -> list[dict[str, Any]]:
    """Of every arm that has a baseline: mean CCR@FPR against unknowns and the paired difference, by target.

    All seeds count that both arms were run with. Where one of them diverged or does not reach the rate there is neither mean
    nor difference: the seeds that are left would flatter it.

    Args:
        rows: of ``cures.rows_of_arms``, with replicates where there is to be an interval over classes.
        score: that accepts.
        targets: FPRs.

    Returns:
        "arm", "baseline" and by f"{target:g}" "mean", "baseline_mean", "difference", "by_seed", "over_seeds" and
        "over_classes" (95 % intervals or None); None for a target that not all common seeds reach, or without one.
    """
    losses: dict[str, str] = {}
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        losses.setdefault(row["arm"], row["loss"])
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    found = []
    for arm in losses:
        baseline = baseline_of(arm, losses)
        if baseline == arm:
            continue
        entry: dict[str, Any] = {"arm": arm, "baseline": baseline}
        for target in (f"{target:g}" for target in targets):
            entry[target] = _difference(by_arm[arm], by_arm[baseline], score, target)
        found.append(entry)
    return found


def _difference(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], score: str, target: str
) -> dict[str, Any] | None:
    def value(row: dict[str, Any]) -> float | None:
        if "diverged" in row:
            return None
        figure: float | None = row["ccr_at_fpr"][score].get("unknown", {}).get(target)
        return figure

    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    found = [[value(one), value(other)] for one, other in pairs]
    if not pairs or any(None in both for both in found):
        return None
    values = np.array(found)
    by_seed = (values[:, 0] - values[:, 1]).tolist()
    difference = float(np.mean(by_seed))
    return {
        "mean": float(values[:, 0].mean()),
        "baseline_mean": float(values[:, 1].mean()),
        "difference": difference,
        "by_seed": by_seed,
        "over_seeds": seed_interval(by_seed),
        "over_classes": _over_classes(pairs, target, difference),
    }


def _over_classes(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], target: str, difference: float
) -> tuple[float, float] | None:
    if not all(row.get(REPLICATES) for pair in pairs for row in pair):
        return None
    paired: list[Floats] = [
        one[REPLICATES][target] - other[REPLICATES][target] for one, other in pairs
    ]
    interval = percentile_interval(np.mean(paired, axis=0))
    classes = min(row[REPLICATES]["classes"] for pair in pairs for row in pair)
    return None if interval is None or classes < 2 else widened(interval, difference, classes)
