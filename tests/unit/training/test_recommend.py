"""The choice of ``recommended``: what it may look at, how it chooses, and that it can be trained and served."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from openset.fitted_scores import ALL_SCORES
from openset.labels import NEGATIVE, UNKNOWN, is_known
from tests.factories import FOREIGN_DEG, KNOWN_DEG, begun_run, scored_at
from training import cures, recommend
from training.arms import CANDIDATES, CURES, candidates, on_request
from training.data import ProtocolData, Split, at_most, load_protocol, split_validation
from training.decoded import CachedImages, DecodedImages
from training.engine import Trainer, TrainingDiverged
from training.fingerprints import require_former_validation
from training.intervals import percentile_interval, widened
from training.losses import LOSSES
from training.presets import PRESETS
from training.protocols import PROTOCOLS
from training.recommendations import (
    RECOMMENDATIONS,
    RECOMMENDATIONS_WITH_MNIST,
    recommendation,
)
from training.runs import Run, TrainConfig, make_config
from training.train import _tell_recommended, build_parser

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> ProtocolData:
    return load_protocol("glyphs", size="small", cache_dir=tmp_path_factory.mktemp("cache"))


def test_hidden_classes_are_seen_by_nobody_but_the_judge(glyphs: ProtocolData) -> None:
    shown, judges = recommend.hide_negatives(glyphs)
    hidden = set(judges.groups[judges.labels == UNKNOWN])
    assert 0 < len(hidden) < len(set(glyphs.train.groups[glyphs.train.labels == NEGATIVE]))
    for part in (shown.train, shown.validation):
        assert not hidden & set(part.groups)
        assert (part.labels == NEGATIVE).any()
    assert not set(judges.sample_ids) & set(shown.train.sample_ids)


def test_judges_hold_no_test_image_and_none_that_will_calibrate(glyphs: ProtocolData) -> None:
    _, judges = recommend.hide_negatives(glyphs)
    parts = split_validation(glyphs.validation.groups, verify_share=0.2, best=False)
    later = {
        *glyphs.test.sample_ids,
        *glyphs.validation.sample_ids[parts.calibration],
        *glyphs.validation.sample_ids[parts.verification],
    }
    assert not set(judges.sample_ids) & later
    assert set(judges.labels) == {*range(10), UNKNOWN}
    unknown = set(glyphs.test.groups[glyphs.test.labels == UNKNOWN])
    assert not set(judges.groups) & unknown


def test_images_of_the_judges_belong_to_their_labels(glyphs: ProtocolData) -> None:
    _, judges = recommend.hide_negatives(glyphs)
    row = int(np.flatnonzero(judges.labels == UNKNOWN)[3])
    (original,) = np.flatnonzero(glyphs.train.sample_ids == judges.sample_ids[row])
    assert (judges.images[row] == glyphs.train.images[int(original)]).all()


def test_subset_takes_the_same_images_of_every_class_each_time(glyphs: ProtocolData) -> None:
    few = at_most(glyphs.train, 5)
    assert set(few.counts().values()) == {50, 55, 0}
    assert (few.sample_ids == at_most(glyphs.train, 5).sample_ids).all()
    assert at_most(glyphs.train, None) is glyphs.train


def test_single_negative_class_cannot_be_split(glyphs: ProtocolData) -> None:
    one = np.flatnonzero(is_known(glyphs.train.labels) | (glyphs.train.groups == "A"))
    few = ProtocolData(**{**vars(glyphs), "train": glyphs.train.subset(one)})
    with pytest.raises(ValueError, match="at least 2"):
        recommend.hide_negatives(few)


def row_of(arm: str, seed: int, **by_score: float | None) -> dict[str, Any]:
    ccr = {score: {"0.001": None, "0.01": 0.1, "0.1": 0.1} for score in ALL_SCORES}
    ccr |= {score: {"0.001": 1.0, "0.01": v, "0.1": v} for score, v in by_score.items()}
    return {
        "arm": arm, "seed": seed, "loss": arm, "options": {}, "preset": "modern", "ccr_at_fpr": ccr,
    }  # fmt: skip


def test_largest_mean_over_the_seeds_wins_and_says_its_score() -> None:
    rows = [
        row_of("a", 1, softmax=0.78), row_of("b", 1, neco=0.8), row_of("a", 2, softmax=0.68),
        row_of("b", 2, neco=0.7), row_of("a", 3, softmax=0.7), row_of("b", 3, neco=0.72),
    ]  # fmt: skip
    chosen = recommend.choose(rows)
    assert (chosen["loss"], chosen["score"]) == ("b", "neco")
    assert chosen["mean_ccr"] == pytest.approx(0.74)


def compared(replicates: dict[str, float], seeds: int = 1, **by_score: float) -> dict[str, Any]:
    """One arm whose scores have these figures and, around them, replicates that scatter alike but for a shift."""
    noise = np.random.default_rng(0).normal(0, 0.01, 1000)
    rows = []
    for seed in range(1, seeds + 1):
        row = row_of("a", seed, **by_score) | {"classes": 5}
        zero = dict.fromkeys(ALL_SCORES, np.zeros(1000))
        row["replicates"] = zero | {
            name: by_score[name] + scatter * noise for name, scatter in replicates.items()
        }
        rows.append(row)
    return recommend.choose(rows)


def test_simpler_score_wins_within_a_standard_error_of_the_best() -> None:
    assert compared({"softmax": 1.0, "neco": 3.0}, softmax=0.8, neco=0.805)["score"] == "softmax"
    # The scatter that both share does not count against their difference.
    assert compared({"softmax": 1.0, "neco": 1.01}, softmax=0.8, neco=0.805)["score"] == "neco"
    # The simpler one stays where it leads.
    assert compared({"softmax": 3.0, "neco": 1.0}, softmax=0.805, neco=0.8)["score"] == "softmax"
    # Without a standard error nothing is as good as the best.
    assert compared({}, softmax=0.8, neco=0.805)["score"] == "neco"


def of_two(with_option: dict[int, float], plain: dict[int, float], **more: float) -> dict[str, Any]:
    """Two candidates by seed, the first with an option; ``more`` are other scores of the first."""
    rows = [row_of("turned", seed, softmax=value, **more) for seed, value in with_option.items()]
    for row in rows:
        row["options"] = {"turned_negatives": 0.875}
    rows += [row_of("plain", seed, softmax=value) for seed, value in plain.items()]
    return recommend.choose(rows)


def test_simpler_candidate_wins_within_a_standard_error_of_the_best() -> None:
    # Differences of .10 and .00: .05 with a standard error of .05.
    assert of_two({1: 0.8, 2: 0.7}, {1: 0.7, 2: 0.7001})["loss"] == "plain"
    # Differences of .10 and .02: .06 with .04.
    chosen = of_two({1: 0.8, 2: 0.7}, {1: 0.7, 2: 0.68})
    assert chosen["loss"] == "turned"
    assert chosen["best_two"]["standard_error"] == pytest.approx(0.04)
    assert chosen["provisional"]  # two seeds do not tell them apart for certain
    assert chosen["why_provisional"] == ["the best two candidates cannot be told apart"]
    assert not of_two({1: 0.8, 2: 0.7}, {1: 0.7, 2: 0.6001})["provisional"]
    # A difference of exactly one standard error is within it.
    assert of_two({1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.5})["loss"] == "plain"
    # Of two that are equal the simpler one leads.
    assert of_two({1: 0.8}, {1: 0.8})["best_two"]["first"] == ["plain", "softmax"]


def test_all_within_a_standard_error_are_named_the_simplest_first() -> None:
    # The first one's energy leads its softmax score by .06 and -.04 and the other candidate by .16 and .05, or .02 and -.02.
    def names(plain: dict[int, float]) -> list[tuple[str, list[str]]]:
        found = of_two({1: 0.8, 2: 0.7}, plain, energy=0.76)
        return list(found["within_one_standard_error"].items())

    turned = ("turned", ["softmax", "energy"])
    assert names({1: 0.6, 2: 0.71}) == [turned]
    assert names({1: 0.74, 2: 0.78}) == [("plain", ["softmax"]), turned]


@pytest.mark.parametrize(("arms", "chosen"), [("ab", "a"), ("ba", "b")])
def test_of_candidates_with_as_many_options_the_earlier_is_simpler(arms: str, chosen: str) -> None:
    figures = {"a": {1: 0.7, 2: 0.7001}, "b": {1: 0.8, 2: 0.7}}
    rows = [row_of(arm, seed, softmax=figures[arm][seed]) for seed in (1, 2) for arm in arms]
    assert recommend.choose(rows)["loss"] == chosen


def of_two_with_classes(
    scatter: dict[int, float], *, classes: tuple[int, int] = (5, 7)
) -> tuple[dict[str, Any], np.ndarray]:
    """Two candidates with differences of .10 and .02 by seed, and so many classes; the first one's replicates scatter so."""
    noise = np.random.default_rng(0).normal(0, 1, 1000)
    rows = []
    for seed, value, other in ((1, 0.8, 0.7), (2, 0.7, 0.68)):
        for arm, figure, spread, count in (
            ("a", value, scatter[seed], classes[0]),
            ("b", other, 0.0, classes[1]),
        ):
            row = row_of(arm, seed, softmax=figure) | {"classes": count}
            rows.append(row | {"replicates": dict.fromkeys(ALL_SCORES, figure + spread * noise)})
    return recommend.choose(rows)["best_two"], 0.06 + np.mean(list(scatter.values())) * noise


def test_standard_error_is_the_larger_of_that_over_seeds_and_that_over_classes() -> None:
    assert of_two_with_classes({1: 0.02, 2: 0.02})[0]["standard_error"] == pytest.approx(0.04)
    found, replicates = of_two_with_classes({1: 0.0, 2: 0.2})
    assert found["standard_error"] == pytest.approx(np.sqrt(5 / 4) * replicates.std())
    assert of_two_with_classes({1: 0.0, 2: 0.2}, classes=(5, 1))[0]["standard_error"] == np.inf


def test_two_candidates_are_told_apart_by_both_intervals() -> None:
    found, replicates = of_two_with_classes({1: 0.0, 2: 0.02})
    expected = widened(percentile_interval(replicates), 0.06, 5)
    assert found["over_classes"] == pytest.approx(expected)
    assert expected[0] > 0 > found["over_seeds"][0]
    assert not found["separable"]


def test_candidates_are_compared_with_each_other_and_not_with_their_own_scores() -> None:
    plain = {1: 0.75, 2: 0.78}
    alone = of_two({1: 0.8, 2: 0.76}, plain)
    with_a_copy = of_two({1: 0.8, 2: 0.76}, plain, logit=0.779, energy=0.779)
    assert alone["loss"] == with_a_copy["loss"] == "plain"
    assert with_a_copy["best_two"]["first"] == ["turned", "softmax"]
    assert with_a_copy["best_two"]["second"] == ["plain", "softmax"]


TURNED = {"turned_negatives": 0.875}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recommend-toy.json", TURNED),
        ("recommend-toy-scale.json", TURNED),
        ("recommend-toy-background-seeds.json", TURNED),
        ("recommend-toy-feature-dim.json", TURNED),
        ("recommend-toy-feature-dim-seeds.json", {**TURNED, "feature_dim": 512}),
        ("recommend-toy-composed.json", {**TURNED, "feature_dim": 512}),
    ],
)
def test_rule_chooses_by_the_rows_of_toy_what_the_documentation_says(
    name: str, options: dict[str, Any]
) -> None:
    rows = json.loads((ROOT / "docs" / "results" / name).read_text())["rows"]
    chosen = recommend.choose(rows)
    assert (chosen["loss"], chosen["preset"]) == ("cos_eos", "thesis")
    assert (chosen["options"], chosen["score"]) == (options, "softmax")


@pytest.mark.parametrize(
    ("protocol", "digits"),
    [
        *((protocol, None) for protocol, choice in RECOMMENDATIONS.items() if choice.evidence.endswith(".json")),
        *((protocol, "mnist") for protocol in RECOMMENDATIONS_WITH_MNIST),
    ],
)  # fmt: skip
def test_recommendation_is_what_the_rule_chose_in_its_evidence(
    protocol: str, digits: str | None
) -> None:
    choice = recommendation(protocol, digits)
    evidence = json.loads((ROOT / choice.evidence).read_text())
    chosen = evidence["chosen"]
    assert evidence["protocol"] == protocol
    assert (choice.loss, choice.preset, choice.options, list(choice.scores), choice.provisional) == (
        chosen["loss"], chosen["preset"], chosen["options"], [chosen["score"]], chosen["provisional"],
    )  # fmt: skip


def test_digits_of_mnist_have_their_own_recommendation_where_their_evidence_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert RECOMMENDATIONS_WITH_MNIST
    for protocol, choice in RECOMMENDATIONS_WITH_MNIST.items():
        assert choice == recommendation(protocol, "mnist") != recommendation(protocol)
        assert recommendation(protocol, "emnist") == recommendation(protocol)
        evidence = json.loads((ROOT / choice.evidence).read_text())
        assert (evidence["protocol"], evidence["digits"]) == (protocol, "mnist")
        # What is published was trained with MNIST's digits.
        for expected, options in (
            (choice, {"digits": "mnist"}),
            (choice, {"as_published": True}),
            (recommendation(protocol), {"as_published": True, "digits": "emnist"}),
        ):
            config = make_config(protocol, "recommended", device="cpu", options=options)
            assert (config.loss, config.scores) == (expected.loss, list(expected.scores))
            # What the log says of it.
            caplog.clear()
            with caplog.at_level("INFO"):
                _tell_recommended(config)
            assert f"options {expected.options}" in caplog.text
            assert expected.evidence in caplog.text
    assert recommendation("p1", "mnist") == recommendation("p1")


def test_scale_is_swept_over_both_margin_aware_bounds() -> None:
    for loss in ("cos_eos", "arc_eos"):
        swept = [arm.options for arm in CURES["scale"] if arm.loss == loss]
        assert {"scale": "margin_aware"} in swept
        assert {"scale": "margin_aware", "scale_probability": 0.999} in swept


def test_evidence_of_a_single_seed_is_provisional() -> None:
    alone, twice = compared({}, softmax=0.8), compared({}, seeds=2, softmax=0.8)
    reasons = ["one seed", "a single candidate"]
    assert (alone["provisional"], alone["why_provisional"]) == (True, reasons)
    assert (twice["provisional"], twice["why_provisional"]) == (True, reasons[1:])
    without_intervals = of_two({1: 0.9}, {1: 0.5})
    assert len(without_intervals["why_provisional"]) == 2


def test_decoded_photographs_of_knowns_and_hidden_classes_are_joined() -> None:
    decoded = DecodedImages(*[np.arange(6)] * 4, 3, {})  # type: ignore[arg-type]
    parts = [
        Split(CachedImages(decoded, np.array(rows)), np.array([0, 0]), np.array(["d", "d"]), np.array(rows).astype(str))
        for rows in ([4, 1], [0, 5])
    ]  # fmt: skip
    joined = recommend._joined(*parts)
    assert joined.images.rows.tolist() == [4, 1, 0, 5]
    assert joined.images.decoded is decoded
    assert joined.labels.tolist() == [0, 0, UNKNOWN, UNKNOWN]


def test_judging_reads_photographs_from_the_cache(
    glyphs: ProtocolData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_data(_: Any, parts: Any, *, decoded: bool = False) -> ProtocolData:
        asked.append(decoded)
        if decoded:
            raise TrainingDiverged("far enough")
        return glyphs

    monkeypatch.setattr(TrainConfig, "load_data", load_data)
    recommend.judge(
        CANDIDATES[:1], protocol="glyphs", epochs=1, seeds=[1], data=None, options={}, runs=tmp_path
    )
    assert asked == [False, True]  # the list of files, to be refused by; then the images


def test_candidate_can_be_exported_with_the_whole_validation_part_none_of_which_it_trained_on(
    glyphs: ProtocolData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    trainers = []

    def trainer_saves(config: TrainConfig, *, runs: Path, data: ProtocolData, **more: Any) -> Run:
        begun_run(runs / config.name, config)
        trainers.append(Trainer(config, data, runs / config.name, **more))
        trainers[-1].save()
        return Run(runs / config.name)

    monkeypatch.setattr("training.runs.load_protocol", lambda *_, **__: glyphs)
    monkeypatch.setattr(recommend, "train", trainer_saves)
    [arm] = [arm for arm in CANDIDATES if arm.name == "cos_eos, thesis"]
    [row] = recommend.judge(
        [arm], protocol="glyphs", epochs=1, seeds=[1], data=None, options={}, runs=tmp_path
    )
    [trainer] = trainers
    assert not set(trainer.data.train.sample_ids) & set(glyphs.validation.sample_ids)
    assert len(trainer.data.validation) < len(glyphs.validation)
    # Nor did an image that calibrates the best checkpoint choose it.
    halves = split_validation(glyphs.validation.groups, verify_share=0.0, best=True)
    calibrating = set(glyphs.validation.sample_ids[halves.calibration])
    assert len(trainer.validation) > 0
    assert not set(trainer.validation.sample_ids) & calibrating
    # Of a protocol whose split changes with the number of images, other ones would be refused.
    monkeypatch.setattr("training.fingerprints._SPLIT_APART", {})
    require_former_validation(Run(tmp_path / row["run"]), glyphs)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    fewer = replace(glyphs, validation=trainer.data.validation)
    with pytest.raises(ValueError, match="other images"):
        require_former_validation(Run(tmp_path / row["run"]), fewer)


def test_unreached_rate_and_divergence_cost_the_choice() -> None:
    rows = [row_of("a", 1, softmax=None), row_of("b", 1, energy=0.2)]
    assert recommend.choose(rows)["loss"] == "b"
    diverged = row_of("b", 2) | {"diverged": "nan"}
    chosen = recommend.choose([*rows, row_of("a", 2), diverged])
    assert chosen["loss"] == "a"
    assert list(chosen["within_one_standard_error"]) == ["a"]
    with pytest.raises(ValueError, match="nothing to recommend"):
        recommend.choose([diverged])


def test_rate_that_is_not_reached_counts_as_zero() -> None:
    assert recommend.figure_of_merit({"0.001": 1.0, "0.01": 0.6, "0.1": 0.8}) == pytest.approx(0.7)
    assert recommend.figure_of_merit({"0.001": 1.0, "0.01": None, "0.1": 0.8}) == pytest.approx(0.4)


def test_replicates_are_of_the_figure_that_ranks_the_candidates() -> None:
    # Scores fall. One unknown of twenty lies above the knowns: 1e-1 is reached with all of them, 1e-2 is not and counts as 0.
    labels = np.array([NEGATIVE, UNKNOWN, *[0] * 5, *[UNKNOWN] * 19])
    scored = replace(scored_at(range(len(labels)), ()), labels=labels, groups=labels.astype(str))
    assert (recommend.criterion_replicates(scored)["softmax"] == 0.5).all()


def test_command_judges_each_candidate_on_the_hidden_classes(
    glyphs: ProtocolData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen, batch_sizes = [], []

    def train(config, *, data, **_):
        batch_sizes.append(config.training.batch_size)
        if config.loss == "os":
            raise TrainingDiverged("the loss of os is nan")
        seen.append(data)
        return SimpleNamespace(folder=tmp_path)

    def figures(scored):
        values = {"0.001": None, "0.01": 0.5, "0.1": 0.75}
        ccr = {score: {"unknown": values} for score in ALL_SCORES}
        return {"accuracy": 0.9, "ccr_at_fpr": ccr, "count": {"known": 3, "unknown": 4}}

    monkeypatch.setattr("training.runs.load_protocol", lambda *_, **__: glyphs)
    monkeypatch.setattr(recommend, "train", train)
    fitted_on, judged = [], []
    monkeypatch.setattr(
        recommend, "scoring_classifier", lambda run, data, *_, **__: fitted_on.append(data)
    )
    monkeypatch.setattr(recommend, "score_split", lambda _, split, *__, **___: judged.append(split))
    monkeypatch.setattr(recommend, "open_set_figures", figures)
    monkeypatch.setattr(
        recommend, "criterion_replicates", lambda _: dict.fromkeys(ALL_SCORES, np.full(10, 0.625))
    )
    target = tmp_path / "out.json"
    arguments = ["--json", str(target), "--candidates", "eos", "os", "cos_eos"]
    assert recommend.main([*arguments, "--option", "batch_size=48"]) == 0
    written = json.loads(target.read_text())
    assert [*batch_sizes, written["batch_size"]] == [48] * 4
    best_two = written["chosen"].pop("best_two")
    reasons = written["chosen"].pop("why_provisional")
    within = written["chosen"].pop("within_one_standard_error")
    assert within == {arm: list(ALL_SCORES) for arm in ("eos", "cos_eos")}
    assert "within one standard error of the best: cos_eos (softmax, logit, " in caplog.text
    assert reasons == ["one seed", "the best two candidates cannot be told apart"]
    assert f"recommended, provisionally ({' and '.join(reasons)}): " in caplog.text
    assert written["chosen"] == {
        "loss": "eos", "options": {}, "preset": "modern", "score": "softmax", "mean_ccr": 0.625, "provisional": True,
    }  # fmt: skip
    assert (best_two["difference"], best_two["separable"]) == (0.0, False)
    assert all("replicates" not in row for row in written["rows"])
    assert "diverged" in written["rows"][1]
    assert len(seen) == 2
    hidden = set("BDFJM")
    # What trains, what states of scores are fitted on, and what judges: three uses, and the hidden classes are in one.
    assert len(seen) == len(fitted_on) == len(judged) == 2
    for data in (*seen, *fitted_on):
        for part in (data.train, data.validation):
            assert not hidden & set(part.groups)
            assert set("ACEHKN") <= set(part.groups)
    _, expected = recommend.hide_negatives(glyphs)
    for split in judged:
        assert split.sample_ids.tolist() == expected.sample_ids.tolist()
        assert split.labels.tolist() == expected.labels.tolist()
        assert set(split.groups[split.labels == UNKNOWN]) == hidden
    assert "0.6250" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_recommended_is_a_configuration_like_any_other(protocol: str) -> None:
    choice = RECOMMENDATIONS[protocol]
    config = make_config(protocol, "recommended", device="cpu")
    assert (config.loss, config.preset) == (choice.loss, choice.preset)
    assert config.scores == list(choice.scores)
    assert set(choice.scores) <= set(ALL_SCORES)
    config.build_model(12)
    ours = make_config(
        protocol, "recommended", device="cpu", preset="thesis", options={"scores": "logit,energy"}
    )
    assert (ours.preset, ours.scores) == ("thesis", ["logit", "energy"])
    assert build_parser().parse_args(["--protocol", protocol, "--loss", "recommended"])


def test_every_protocol_has_a_recommendation_and_without_evidence_it_is_provisional() -> None:
    assert set(RECOMMENDATIONS) == set(PROTOCOLS)
    unmeasured = [one for one in RECOMMENDATIONS.values() if not one.evidence.endswith(".json")]
    assert all(one.provisional and "make recommend" in one.evidence for one in unmeasured)


@pytest.mark.parametrize(
    ("wish", "expected"), [("C-1", 11), ("C", 12), (0, 12), ("C+1", 13), ("4C", 48), (512, 512)]
)
def test_feature_dimension_may_follow_the_classes(wish: Any, expected: int) -> None:
    config = make_config("toy", "cos_eos", device="cpu", options={"feature_dim": wish})
    assert config.build_model(12)[1].weight.shape == (12, expected)


@pytest.mark.parametrize("wish", ["2C", -3, 1.5])
def test_other_feature_dimensions_are_refused(wish: Any) -> None:
    with pytest.raises(ValueError, match="feature_dim must be"):
        make_config("toy", "cos_eos", device="cpu", options={"feature_dim": wish}).build_model(12)


def test_scores_stay_out_of_a_runs_name() -> None:
    plain, more = (
        make_config("glyphs", "cos_eos", device="cpu", options=options)
        for options in ({}, {"scores": "all"})
    )
    assert plain.name == more.name
    assert plain.scores is None
    assert more.scores == list(ALL_SCORES)


@pytest.mark.parametrize("cure", [*sorted(CURES), "candidates"])
def test_every_arm_builds_and_no_two_are_one_run(cure: str) -> None:
    competing = [*candidates("glyphs"), *on_request("glyphs")]
    arms = competing if cure == "candidates" else CURES[cure]
    names = set()
    for arm in arms:
        config = make_config(
            "glyphs", arm.loss, preset=arm.preset, options=dict(arm.options), device="cpu"
        )
        config.build_model(10)
        names.add(config.name)
        assert arm.loss in LOSSES
        assert arm.preset in PRESETS
    assert len(names) == len({arm.name for arm in arms}) == len(arms)


def test_diverged_arm_has_its_row_and_the_others_their_figures(
    glyphs: ProtocolData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    batch_sizes = []

    def train(config, **_):
        batch_sizes.append(config.training.batch_size)
        if config.loss_options.get("detach_radial"):
            raise TrainingDiverged("nan")
        return SimpleNamespace(folder=tmp_path)

    monkeypatch.setattr("training.runs.load_protocol", lambda *_, **__: glyphs)
    monkeypatch.setattr(cures, "train", train)
    scored = scored_at(KNOWN_DEG, FOREIGN_DEG)
    monkeypatch.setattr(cures, "score_test", lambda *_, **__: scored)
    arguments = ["--cure", "arc_os", "--json", str(tmp_path / "rows.json")]
    assert cures.main([*arguments, "--option", "batch_size=48"]) == 0
    assert batch_sizes == [48] * len(CURES["arc_os"])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    detached = ["arc_os, detach_radial", "arc_os, known, detach_radial"]
    assert [row["arm"] for row in rows if "diverged" in row] == detached
    assert rows[0]["ccr_at_fpr"]["softmax"]["unknown"]["0.1"] is None
    assert rows[0]["mean_magnitude"]["unknown"] == pytest.approx(2)
    assert "diverged" in capsys.readouterr().out
    assert cures.main([*arguments, "--arms", "norm_os (no margin)"]) == 0
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1
    assert cures.main([*arguments, "--arms", "norm_os"]) == 1
