"""The published tables, as carried over, against the figures quoted in the thesis' text."""

from __future__ import annotations

import pytest

from training.losses import AS_PUBLISHED, LOSSES
from training.published import (
    TARGETS,
    comparisons,
    has_replicates,
    is_published,
    published_interval,
    published_value,
    replicate,
)


@pytest.mark.parametrize(
    ("protocol", "loss", "values"),
    [
        ("toy", "arc_eos", (0.9853, 0.9933, 0.9933, 0.9933)),
        ("toy", "sfn_arcface", (0.0617, 0.5522, 0.9140, 0.9939)),
        ("toy", "sm_softmax", (None, 0.2789, 0.8310, 0.9921)),
        ("p1", "os", (0.3095, 0.5214, 0.6666, 0.6843)),
        ("p2", "norm_os", (0.0660, 0.1853, 0.4420, 0.6800)),
        ("p3", "sfn_norm", (0.0809, 0.2351, 0.5275, 0.7597)),
    ],
)
def test_rows_of_the_thesis(protocol: str, loss: str, values: tuple[float | None, ...]) -> None:
    found = tuple(published_value(protocol, loss, column) for column in (*TARGETS, "accuracy"))
    assert found == values


def test_every_published_loss_is_one_of_ours_and_each_table_is_complete() -> None:
    for protocol, rows in {"toy": 14, "p1": 12, "p2": 12, "p3": 12}.items():
        losses = {loss for _, group in comparisons(protocol) for loss in group}
        assert len(losses) == rows
        assert losses <= LOSSES.keys()
        assert all(is_published(protocol, loss) for loss in losses)
    assert comparisons("glyphs") == []
    assert not is_published("toy", "softmax")


def test_spread_of_a_run_is_that_of_replicates_where_there_are_any() -> None:
    assert published_interval("toy", "arc_eos", "0.01") == pytest.approx((0.9873, 0.9993))
    assert published_interval("toy", "arc_eos", "0.001") == pytest.approx((0.9653, 1.0))
    assert published_interval("toy", "cosface", "accuracy") == pytest.approx((0.9919, 0.9949))
    assert published_interval("toy", "cosface", "0.01") == pytest.approx((0.1089, 0.4489))
    # Two runs without negatives differ by a factor of about three at the lowest rate.
    assert published_interval("toy", "cosface", "0.001") == pytest.approx((0.0361 / 3, 0.1083))
    assert published_interval("p1", "softmax", "0.01") == pytest.approx((0.3798, 0.4298))
    # Four losses ran twice on P2; elsewhere no second run is known, and the test set's sampling error stands in.
    assert published_interval("p2", "os", "0.1") == pytest.approx((0.3903, 0.4283))
    assert published_interval("p2", "os", "0.01") == pytest.approx((0.1077, 0.2137))
    assert published_interval("p2", "os", "accuracy") == pytest.approx((0.611, 0.653))
    assert not has_replicates("p2", "0.001")
    assert not has_replicates("p1", "0.01")
    assert published_interval("toy", "sm_softmax", "0.001") is None
    assert published_interval("glyphs", "softmax", "0.01") is None


def test_later_runs_of_the_author_name_their_settings() -> None:
    assert replicate("toy", "softmax", "0.01") == (0.2159, "equal")
    assert replicate("toy", "eos", "0.01") == (0.979, "equal")  # there was one on the day before
    assert replicate("toy", "os", "0.001") == (0.9365, "xi 15")
    assert replicate("toy", "cos_eos_sfn", "0.01") is None


@pytest.mark.parametrize("protocol", ["toy", "p1", "p2", "p3"])
def test_comparison_of_hard_and_soft_heads_compares_what_the_published_code_has(
    protocol: str,
) -> None:
    heads = {
        title: [AS_PUBLISHED[loss].normalization for loss in losses]
        for title, losses in comparisons(protocol)
    }
    expected = {"hard or soft": {"hard", "soft"}, "hard normalization": {"hard"}}
    for beginning, normalizations in expected.items():
        found = [set(compared) for title, compared in heads.items() if title.startswith(beginning)]
        assert found == [normalizations] * (2 if protocol == "toy" else 0)
