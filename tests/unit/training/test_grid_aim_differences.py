"""Which models stand beside those that the aims are judged by, and with which scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.grid_runs import Judged, settings_of
from training.grid.aim_differences import aim_differences

BY_THE_TEXT = {"as_published": False}
COMPOSED = {"composed_negatives": 1.0}


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, tuple[str, str]]]:
    """Names and scores of what the tables would hold."""
    found: list[tuple[str, str, tuple[str, str]]] = []

    def pair_table(pairs: Any, name: Any, score: Any) -> str:
        found.extend((name(one), name(other), (score(one), score(other))) for one, other in pairs)
        return f"{len(pairs)} pairs"

    monkeypatch.setattr("training.grid.aim_differences.pair_table", pair_table)
    choice = SimpleNamespace(scores=("logit",))
    monkeypatch.setattr("training.grid.aims.recommendation", lambda *_: choice)
    return found


def test_models_are_held_against_their_setting_and_the_published_codes_benchmarks_and_best_of_their_kind(
    pairs: list[tuple[str, str, tuple[str, str]]],
) -> None:
    with_options = {"feature_bias": False}
    settings = settings_of(
        Judged("cos_bg", 0.995, changes=BY_THE_TEXT, is_recommended=True),
        Judged("cos_eos", 0.7, changes=BY_THE_TEXT, options=COMPOSED),
        Judged("softmax", 0.3),
        Judged("os", 0.9),
        # Each leads at one rate of an aim.
        Judged("arc_eos", {"0.001": 0.98, "0.01": 0.97, "0.1": 0.97}),
        Judged("norm_eos", {"0.001": 0.97, "0.01": 0.98, "0.1": 0.98}),
        Judged("cos_eos", 0.96),
        Judged("cos_eos", 0.99, options=with_options),
        Judged("cos_eos", 0.99, preset="modern"),
        Judged("cosface", 0.6),
        Judged("sfn_norm", 0.5),
    )
    assert aim_differences(settings, "toy") == {"mnist": "7 pairs"}
    ours, alone = "`cos_bg`, logit", "`cos_eos (composed_negatives=1.0)`"
    logit, softmax = ("logit", "softmax"), ("softmax", "softmax")
    assert pairs == [
        (ours, alone, logit),
        (ours, "`softmax`, published code", logit),
        (ours, "`os`, published code", logit),
        (ours, "`arc_eos`, published code", logit),
        (ours, "`norm_eos`, published code", logit),
        # The pair of the two stands above; what sees no negatives is held against such.
        (alone, "`softmax`, published code", softmax),
        (alone, "`cosface`, published code", softmax),
    ]


def test_each_source_of_digits_has_its_table_and_other_protocols_have_none(
    pairs: list[tuple[str, str, tuple[str, str]]],
) -> None:
    settings = settings_of(
        Judged("cos_bg", 0.9, is_recommended=True),
        Judged("eos", 0.8),
        Judged("eos", 0.7, digits="emnist", is_recommended=True),
        Judged("os", 0.6, digits="emnist"),
        Judged("softmax", 0.5, digits="emnist"),
    )
    assert aim_differences(settings, "toy") == {"mnist": "1 pairs", "emnist": "2 pairs"}
    assert aim_differences(settings, "p1") == {}
    assert aim_differences({}, "toy") == {}


def test_best_thesis_loss_of_an_aim_stands_there_whatever_the_recommended_models_setting(
    pairs: list[tuple[str, str, tuple[str, str]]],
) -> None:
    modern = {"digits": "emnist", "preset": "modern"}
    settings = settings_of(
        Judged("cos_bg", 0.96, changes=BY_THE_TEXT, is_recommended=True, **modern),
        Judged("norm_os", 0.9, digits="emnist", changes=BY_THE_TEXT),
        Judged("cos_os", 0.8, digits="emnist", changes=BY_THE_TEXT),
        Judged("arc_os", 0.7, digits="emnist"),
        Judged("cos_os", 0.6, digits="emnist"),
    )
    aim_differences(settings, "toy")
    ours = "`cos_bg`, modern preset, logit"
    assert [pair[:2] for pair in pairs] == [
        (ours, "`norm_os`"),
        (ours, "`arc_os`, published code"),
    ]


def test_recommended_model_that_sees_no_negatives_is_judged_once(
    pairs: list[tuple[str, str, tuple[str, str]]],
) -> None:
    settings = settings_of(Judged("cosface", 0.9, is_recommended=True), Judged("softmax", 0.5))
    aim_differences(settings, "toy")
    assert [pair[:2] for pair in pairs] == [
        ("`cosface`, published code, logit", "`softmax`, published code")
    ]
