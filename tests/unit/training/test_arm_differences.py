"""What an arm changed: which arm it is set against, what is paired, and how sure that is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from openset.labels import NEGATIVE, UNKNOWN
from tests.factories import scored_at
from training.arm_differences import REPLICATES, baseline_of, ccr_replicates, differences
from training.intervals import widened
from training.scoring import Scored


def row(arm: str, seed: int, figure: float | None, *, loss: str = "cos_eos", spread: float = 0.0) -> dict[str, Any]:  # fmt: skip
    """A row whose replicates lie evenly within ``spread`` around the figure, the same way for all rows."""
    found: dict[str, Any] = {
        "arm": arm, "loss": loss, "seed": seed, "ccr_at_fpr": {"softmax": {"unknown": {"0.01": figure}}},
    }  # fmt: skip
    if spread:
        replicates = figure + spread * np.linspace(-1, 1, 101)
        found[REPLICATES] = {"0.01": replicates, "classes": 11}
    return found


def found_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {entry["arm"]: entry for entry in differences(rows, score="softmax", targets=(1e-2,))}


def test_baseline_is_the_first_arm_of_the_loss_and_of_other_losses_the_first_of_all() -> None:
    losses = {"norm_os": "norm_os", "arc_os": "arc_os", "arc_os, detached": "arc_os", "bg": "bg"}
    assert {arm: baseline_of(arm, losses) for arm in losses} == {
        "norm_os": "norm_os", "arc_os": "norm_os", "arc_os, detached": "arc_os", "bg": "norm_os",
    }  # fmt: skip


def test_differences_are_means_over_the_seeds_that_both_arms_have() -> None:
    rows = [
        row("a", 1, 0.5),
        row("b", 1, 0.7),
        row("a", 2, 0.4),
        row("b", 2, 0.5),
        row("b", 3, 0.9),
    ]
    found = found_of(rows)
    assert found.keys() == {"b"}
    one = found["b"]["0.01"]
    assert one["by_seed"] == pytest.approx([0.2, 0.1])
    assert (one["mean"], one["baseline_mean"], one["difference"]) == pytest.approx(
        (0.6, 0.45, 0.15)
    )
    # Student's t of two values .1 apart: .15 +- 12.706 * .05
    assert one["over_seeds"] == pytest.approx((0.15 - 0.6353, 0.15 + 0.6353), abs=1e-3)


def test_diverged_arms_and_rates_out_of_reach_have_no_difference() -> None:
    diverged = {"arm": "b", "loss": "cos_eos", "seed": 1, "diverged": "nan"}
    found = found_of([row("a", 1, 0.5), diverged, row("c", 1, None)])
    assert found["b"]["0.01"] is None
    assert found["c"]["0.01"] is None


@pytest.mark.parametrize(
    "lost", [{"diverged": "nan"}, {"ccr_at_fpr": {"softmax": {"unknown": {"0.01": None}}}}]
)
@pytest.mark.parametrize("arm", ["a", "b"])
def test_seed_that_is_lost_takes_the_mean_with_it(arm: str, lost: dict[str, Any]) -> None:
    """The seeds that are left are those in which an arm does well."""
    rows = [row(name, seed, 0.5) for seed in (1, 2, 3) for name in ("a", "b", "c")]
    assert found_of(rows)["b"]["0.01"]["mean"] == 0.5
    rows = [one | lost if (one["arm"], one["seed"]) == (arm, 2) else one for one in rows]
    found = found_of(rows)
    assert found["b"]["0.01"] is None
    assert (found["c"]["0.01"] is None) == (arm == "a")  # the baseline of both


def test_what_both_arms_share_is_no_doubt_about_their_difference() -> None:
    alike = found_of([row("a", 1, 0.5, spread=0.3), row("b", 1, 0.6, spread=0.3)])
    low, high = alike["b"]["0.01"]["over_classes"]
    assert (low, high) == pytest.approx((0.1, 0.1))
    other = found_of([row("a", 1, 0.5, spread=0.1), row("b", 1, 0.6, spread=0.3)])
    low, high = other["b"]["0.01"]["over_classes"]
    assert low < 0 < 0.2 < high


def test_interval_over_classes_is_of_the_mean_over_seeds_and_as_wide_as_the_fewest_classes_ask() -> (
    None
):
    rows = [
        row("a", 1, 0.5, spread=0.1), row("b", 1, 0.6, spread=0.3),
        row("a", 2, 0.4, spread=0.1), row("b", 2, 0.6, spread=0.2),
    ]  # fmt: skip
    rows[2][REPLICATES]["classes"] = 5
    half = 0.95 * (0.2 + 0.1) / 2
    expected = widened((0.15 - half, 0.15 + half), 0.15, 5)
    assert found_of(rows)["b"]["0.01"]["over_classes"] == pytest.approx(expected)
    rows[2][REPLICATES]["classes"] = 1
    assert found_of(rows)["b"]["0.01"]["over_classes"] is None


def test_without_replicates_there_is_no_interval_over_classes() -> None:
    found = found_of([row("a", 1, 0.5), row("b", 1, 0.6, spread=0.1)])
    assert found["b"]["0.01"]["over_classes"] is None


def judged(labels: list[int]) -> Scored:
    """Samples of falling score, all taken for class 0."""
    found = scored_at(range(len(labels)), ())
    return replace(found, labels=np.array(labels), groups=np.array(labels).astype(str))


def test_replicates_are_against_unknowns_and_not_negatives() -> None:
    # Negatives lie among the knowns, the unknowns below all of them.
    found = ccr_replicates(
        judged([0, NEGATIVE, 0, NEGATIVE, 0, UNKNOWN, UNKNOWN]), "softmax", (0.5,)
    )
    assert found["classes"] == 1
    assert found["0.5"] == pytest.approx(1.0)
    assert ccr_replicates(judged([0, NEGATIVE, 0]), "softmax", (0.5,)) == {}


@pytest.mark.parametrize(("knowns", "unknowns"), [("0012", "PPQQ"), ("0011", "PQRS")])
def test_classes_of_replicates_are_of_the_group_with_fewer(knowns: str, unknowns: str) -> None:
    labels = [*map(int, knowns), *[UNKNOWN] * len(unknowns)]
    scored = replace(judged(labels), groups=np.array([*knowns, *unknowns]))
    assert ccr_replicates(scored, "softmax", (0.5,))["classes"] == 2
