"""The threshold's guarantee, by pinned values, by simulation and by breaking it one step."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from openset.calibration import (
    NotCertifiable,
    OperatingPoint,
    ScoreSet,
    SortedScores,
    Threshold,
    choose_threshold,
    load_score_sets,
    negatives_needed,
    operating_point,
    p_value,
    save_score_sets,
    smallest_attainable_fpr,
)
from openset.labels import NEGATIVE, UNKNOWN
from openset.metrics import ccr_at_tau


@pytest.mark.parametrize(
    ("n", "fpr", "k"),
    [
        (10_560, 0.1, 1005), (10_560, 0.01, 88), (10_560, 0.001, 5),
        (17_420, 0.1, 1676), (17_420, 0.01, 152), (17_420, 0.001, 10),
        (7_949, 0.1, 750), (7_949, 0.01, 64), (7_949, 0.001, 3),
        (24_549, 0.1, 2377), (24_549, 0.01, 219), (24_549, 0.001, 16),
        (299, 0.01, 0), (1_000, 0.01, 4),
    ],
)  # fmt: skip
def test_allowed_count_of_the_published_protocols(n: int, fpr: float, k: int) -> None:
    threshold = choose_threshold(np.random.default_rng(0).normal(size=n), fpr=fpr)
    assert (threshold.k, threshold.n) == (k, n)
    assert threshold.accepted == k
    assert threshold.fpr_upper_bound <= fpr
    assert threshold.expected_fpr == pytest.approx((k + 1) / (n + 1))


def test_bound_of_four_in_a_thousand() -> None:
    assert choose_threshold(np.arange(1000.0), fpr=0.01).fpr_upper_bound == pytest.approx(
        0.00913, abs=5e-6
    )


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.5), (2, 0.75), (3, 0.875)])
def test_count_whose_probability_is_exactly_the_risk_is_allowed(n: int, confidence: float) -> None:
    assert choose_threshold(np.arange(float(n)), fpr=0.5, confidence=confidence).k == 0


@pytest.mark.parametrize(
    ("confidence", "fpr", "needed"),
    [
        (0.9, 0.1, 22),
        (0.9, 1e-4, 23_025),
        (0.95, 0.05, 59),
        (0.95, 0.01, 299),
        (0.95, 0.001, 2_995),
        (0.99, 0.01, 459),
        (0.814697981115, 0.1, 17),  # a hair more than 16 can promise
        (0.931280523264, 0.2, 12),  # a hair less than 12 can
    ],
)
def test_fewest_negatives_and_one_less_is_refused(
    confidence: float, fpr: float, needed: int
) -> None:
    assert negatives_needed(fpr, confidence=confidence) == needed
    assert choose_threshold(np.arange(float(needed)), fpr=fpr, confidence=confidence).k == 0
    with pytest.raises(NotCertifiable) as caught:
        choose_threshold(np.arange(needed - 1.0), fpr=fpr, confidence=confidence)
    assert caught.value.smallest_attainable_fpr > fpr
    named = float(re.search(r"attainable rate is ([0-9.e-]+),", str(caught.value))[1])
    assert named == pytest.approx(caught.value.smallest_attainable_fpr, rel=0.011)
    assert choose_threshold(np.arange(needed - 1.0), fpr=named, confidence=confidence).k == 0


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_smallest_attainable_rate_is_attainable_as_named(confidence: float) -> None:
    for n in (1, 2, 3, 10, 100, 997, 4096, 100_000):
        smallest = smallest_attainable_fpr(n, confidence=confidence)
        assert smallest == pytest.approx(1 - (1 - confidence) ** (1 / n), rel=1e-9)
        threshold = choose_threshold(
            np.arange(float(n)), fpr=smallest, confidence=confidence, dtype=np.float64
        )
        assert threshold.k == 0
        with pytest.raises(NotCertifiable):
            choose_threshold(np.arange(float(n)), fpr=smallest * (1 - 1e-9), confidence=confidence)
    assert smallest_attainable_fpr(0) == 1.0


def _broken_share(n: int, fpr: float, step: int) -> float:
    """How often FPR(tau) > fpr over 4,000 calibration draws of uniform scores; ``step`` loosens k."""
    random = np.random.default_rng(1)
    k = choose_threshold(random.random(n), fpr=fpr).k + step
    # FPR at a threshold just above the (k+1)-th largest of n uniforms is 1 minus that order statistic.
    realised = 1 - np.sort(random.random((4000, n)), axis=1)[:, n - k - 1]
    return float((realised > fpr).mean())


@pytest.mark.parametrize(("n", "fpr"), [(299, 0.01), (1000, 0.01), (500, 0.1)])
def test_guarantee_holds_over_thousands_of_draws_and_one_step_looser_breaks_it(
    n: int, fpr: float
) -> None:
    noise = 3.5 * np.sqrt(0.05 * 0.95 / 4000)
    k = choose_threshold(np.arange(float(n)), fpr=fpr).k
    for step in (0, 1):
        assert _broken_share(n, fpr, step) == pytest.approx(
            stats.binom.cdf(k + step, n, fpr), abs=noise
        )
    assert stats.binom.cdf(k, n, fpr) <= 0.05 < stats.binom.cdf(k + 1, n, fpr)


def test_tau_rejects_the_score_it_sits_on_in_float32() -> None:
    scores = np.full(400, 7.1, np.float64)
    threshold = choose_threshold(scores, fpr=0.01)
    assert np.float32(7.1) < np.float32(threshold.tau)
    assert threshold.tau == float(np.float32(threshold.tau))
    assert threshold.accepted == 0


def test_ties_lower_the_accepted_count_never_raise_it() -> None:
    scores = np.concatenate([np.zeros(900), np.ones(100)])
    threshold = choose_threshold(scores, fpr=0.01)
    assert threshold.k == 4
    assert threshold.accepted == 0


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, float("nan"), 1e-320, 1e-10, 1 - 1e-10])
def test_targets_outside_the_unit_interval_are_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_threshold(np.arange(1000.0), fpr=fpr)


@pytest.mark.parametrize("confidence", [1e-17, 1 - 1e-12])
def test_confidence_that_rounds_to_the_boundary_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_threshold(np.arange(1000.0), fpr=0.1, confidence=confidence)


def test_sorted_scores_choose_what_the_score_set_itself_gives() -> None:
    score_set = make_score_set()
    scores = score_set.scores["softmax"].round(1)  # ties
    score_set = replace(score_set, scores={"softmax": scores})
    kept = SortedScores.of(score_set, "softmax")
    for fpr in (0.01, 0.05, 0.3):
        point = kept.operating_point(fpr=fpr, confidence=0.9)
        expected = choose_threshold(score_set.negative_scores("softmax"), fpr=fpr, confidence=0.9)
        assert Threshold(*(getattr(point, field.name) for field in fields(Threshold))) == expected
        assert point == operating_point(score_set, score_type="softmax", fpr=fpr, confidence=0.9)
        assert point.expected_ccr == ccr_at_tau(
            scores, score_set.predictions, score_set.labels, tau=np.float32(point.tau)
        )


def test_scores_that_are_not_finite_or_not_one_row_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        choose_threshold([np.nan] * 1000, fpr=0.1)
    with pytest.raises(ValueError, match="one-dimensional"):
        choose_threshold(np.zeros((1000, 1)), fpr=0.1)


def test_no_negatives_can_promise_nothing() -> None:
    with pytest.raises(NotCertifiable, match="with 0 calibration negatives"):
        choose_threshold([], fpr=0.1)


def test_p_value_counts_ties_as_at_least() -> None:
    negatives = np.array([1.0, 2.0, 2.0, 3.0], np.float32)
    assert [p_value(score, negatives) for score in (0.0, 2.0, 2.5, 4.0)] == [1.0, 0.8, 0.4, 0.2]


def test_p_value_below_alpha_keeps_the_average_rate() -> None:
    random = np.random.default_rng(0)
    accepted = []
    for _ in range(2000):
        negatives = np.sort(random.normal(size=99)).astype(np.float32)
        accepted.append(p_value(float(random.normal()), negatives) <= 0.05)
    assert stats.binomtest(int(np.sum(accepted)), 2000, 0.05, alternative="greater").pvalue > 0.01


def make_score_set() -> ScoreSet:
    random = np.random.default_rng(0)
    labels = np.where(np.arange(2000) % 2, NEGATIVE, np.arange(2000) % 10)
    return ScoreSet(
        path="cpu-float32-eager-0",
        scores={"softmax": (random.normal(size=2000) + 3 * (labels >= 0)).astype(np.float32)},
        predictions=np.where(np.arange(2000) % 7, labels.clip(0), 9),
        labels=labels,
        groups=labels.astype(str),
        sample_ids=np.arange(2000).astype(str),
    )


def test_unknowns_take_no_part_in_a_calibration() -> None:
    score_set = make_score_set()
    labels = score_set.labels.copy()
    labels[1::4] = UNKNOWN
    point = operating_point(replace(score_set, labels=labels), score_type="softmax", fpr=0.05)
    negatives = score_set.scores["softmax"][3::4]
    assert point.tau == choose_threshold(negatives, fpr=0.05).tau
    np.testing.assert_array_equal(
        replace(score_set, labels=labels).negative_scores("softmax"), negatives
    )


def test_score_set_without_knowns_promises_no_ccr() -> None:
    score_set = make_score_set()
    score_set = replace(score_set, labels=np.full(2000, NEGATIVE))
    assert operating_point(score_set, score_type="softmax", fpr=0.05).expected_ccr is None


def test_score_set_is_refused_with_a_broken_score_or_an_impossible_target() -> None:
    score_set = make_score_set()
    with pytest.raises(ValueError, match="between 0 and 1"):
        operating_point(score_set, score_type="softmax", fpr=1.0)
    score_set.scores["softmax"][4] = np.nan
    with pytest.raises(ValueError, match="must be finite, got 1"):
        operating_point(score_set, score_type="softmax", fpr=0.05)
    with pytest.raises(ValueError, match=r"predictions must have shape \(2000,\)"):
        replace(score_set, predictions=np.zeros(3, np.int64))


def test_score_sets_survive_the_file_and_its_bytes(tmp_path: Path) -> None:
    score_set = make_score_set()
    save_score_sets(tmp_path / "calibration.npz", [score_set])
    for source in (tmp_path / "calibration.npz", (tmp_path / "calibration.npz").read_bytes()):
        back = load_score_sets(source)["cpu-float32-eager-0"]
        np.testing.assert_array_equal(back.scores["softmax"], score_set.scores["softmax"])
        np.testing.assert_array_equal(back.labels, score_set.labels)
        assert back.groups.tolist() == score_set.groups.tolist()


def test_operating_point_states_its_price_and_survives_json() -> None:
    score_set = make_score_set()
    point = operating_point(score_set, score_type="softmax", fpr=0.05)
    negatives = score_set.negative_scores("softmax")
    assert (negatives >= np.float32(point.tau)).sum() == point.accepted == point.k
    is_right = (score_set.predictions == score_set.labels)[score_set.labels >= 0]
    is_accepted = score_set.scores["softmax"][score_set.labels >= 0] >= np.float32(point.tau)
    assert point.expected_ccr == pytest.approx((is_right & is_accepted).mean())
    assert OperatingPoint.from_dict(point.to_dict()) == point
    with pytest.raises(ValueError, match="must have the keys"):
        OperatingPoint.from_dict(point.to_dict() | {"area": 1.0})


def test_unknown_score_type_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="softmax"):
        operating_point(make_score_set(), score_type="energy", fpr=0.05)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="calibration scores"):
        load_score_sets(tmp_path / "other.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"no zip at all"])
def test_damaged_score_file_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a file of calibration scores"):
        load_score_sets(content)


def with_a_broken_stream(content: bytes) -> bytes:
    """The first member begins with a kind of block that deflate does not have."""
    name_length, extra_length = struct.unpack_from("<HH", content, 26)
    at = 30 + name_length + extra_length
    return content[:at] + b"\xff" + content[at + 1 :]


def with_broken_array_headers(content: bytes) -> bytes:
    """Each array's header ends in an open bracket, and the checksums are right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"}", b"(", 1))
    return stream.getvalue()


def with_huge_arrays(content: bytes) -> bytes:
    """Each header of an array of scores claims more values than any memory holds, and the checksums are right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            huge = old.read(name).replace(b"(2000,), }         ", b"(2000000000000,), }")
            new.writestr(name, huge)
    return stream.getvalue()


_FLAGS_AND_METHOD = b"\0\0\x08\0"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (with_a_broken_stream, "invalid block type"),
        (with_broken_array_headers, "TokenError"),
        (with_huge_arrays, "its header says 8000000000128"),
        (lambda content: content.replace(_FLAGS_AND_METHOD, b"\1\0\x08\0"), "encrypted"),
        (lambda content: content.replace(_FLAGS_AND_METHOD, b"\0\0\x61\0"), "compression method"),
    ],
    ids=["stream", "array header", "array size", "flags", "method"],
)
def test_every_damage_to_a_score_file_is_a_value_error(
    tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    save_score_sets(tmp_path / "scores.npz", [make_score_set()])
    content = damage((tmp_path / "scores.npz").read_bytes())
    with pytest.raises(ValueError, match=rf"not a file of calibration scores .*{said}"):
        load_score_sets(content)


def test_score_file_runs_no_code() -> None:
    """An object array would be a pickle, which runs what it likes when it is read."""
    stream = io.BytesIO()
    np.savez(stream, index=np.array([{"path": "x"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickled|allow_pickle"):
        load_score_sets(stream.getvalue())
