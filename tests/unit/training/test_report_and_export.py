"""Report, figures, export and calibrate on a tiny trained run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openset import metrics
from openset.artifact import load_artifact, read_card
from openset.calibration import NotCertifiable, load_score_sets
from openset.labels import NEGATIVE, UNKNOWN
from training.artifact_export import choose_score, export
from training.data import split_validation
from training.evaluation import evaluate, write_report
from training.path_calibration import calibrate
from training.report import build_report, own_or_nearest_angle
from training.runs import Run, make_config
from training.scoring import Scored, score_split
from training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = {"size": "small", "learning_rate": 1e-2, "feature_dim": 2}
    config = make_config("glyphs", "cos_os", epochs=1, options=options, device="cpu")
    return train(config, runs=tmp_path_factory.mktemp("runs"), show_progress=False)


@pytest.fixture(scope="module")
def exported(run: Run) -> Run:
    export(run, fpr=0.05, name="small", show_progress=False)
    return run


def synthetic(count: int = 600) -> Scored:
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 2, NEGATIVE, UNKNOWN], count)
    cosines = random.uniform(-1, 1, (count, 3)).astype(np.float32)
    cosines[np.arange(count), labels.clip(0)] += np.where(labels >= 0, 0.8, 0)
    cosines = cosines.clip(-1, 1)
    logits = 10 * cosines
    scores = logits.max(axis=1)
    return Scored(
        features=random.normal(size=(count, 4)).astype(np.float32),
        logits=logits,
        cosines=cosines,
        scores={"softmax": scores, "logit": -scores},
        predictions=logits.argmax(axis=1),
        labels=labels,
        groups=labels.astype(str),
        sample_ids=np.arange(count).astype(str),
        centers=np.eye(3, 4, dtype=np.float32),
    )


def test_report_holds_every_figure_and_its_interval() -> None:
    scored = synthetic()
    factory = {"score_type": "softmax", "tau": 5.0, "fpr": 0.1, "confidence": 0.95}
    report = build_report(scored, config={}, notes=[], counts={}, factory=factory, repeats=50)
    json.dumps(report)
    for name, scores in scored.scores.items():
        for group, label in (("negative", NEGATIVE), ("unknown", UNKNOWN)):
            row = report["scores"][name][group]
            curve = metrics.oscr_curve(scores, scored.predictions, scored.labels, against=label)
            for target in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
                cell = row["ccr_at_fpr"][f"{target:g}"]
                assert cell["value"] == metrics.ccr_at_fpr(curve, max_fpr=target)
                # A replicate may draw the top score twice and miss a low target: then there is no interval.
                assert target < 0.1 or cell["interval"] is not None
                if cell["interval"] is not None:
                    assert cell["interval"][0] <= cell["value"] <= cell["interval"][1]
    accepted = scored.scores["softmax"] >= 5.0
    assert report["factory"]["false_negative_rate"] == pytest.approx(
        1 - accepted[scored.labels >= 0].mean()
    )
    assert (
        report["factory"]["realised_fpr"]["unknown"]["fpr"]
        == accepted[scored.labels == UNKNOWN].mean()
    )
    assert report["center_angles_deg"]["min"] == report["center_angles_deg"]["max"] == 90.0
    assert set(report["feature_magnitudes"]) == {"known", "negative", "unknown"}


def test_angles_are_to_the_own_center_for_knowns_and_the_nearest_for_others() -> None:
    scored = synthetic(50)
    angles = own_or_nearest_angle(scored)
    for row in range(50):
        cosine = (
            scored.cosines[row, scored.labels[row]]
            if scored.labels[row] >= 0
            else scored.cosines[row].max()
        )
        assert angles[row] == pytest.approx(np.arccos(cosine), abs=1e-6)


def test_score_with_the_better_selection_ccr_is_chosen() -> None:
    scored = synthetic()
    assert choose_score(scored, 0.1)[0] == "softmax"
    swapped = Scored(
        **{
            **vars(scored),
            "scores": {"softmax": -scored.scores["softmax"], "logit": scored.scores["softmax"]},
        }
    )
    assert choose_score(swapped, 0.1)[0] == "logit"


@pytest.mark.parametrize("left", ["knowns", "negatives", "nothing"])
def test_score_is_the_default_where_nothing_can_tell(left: str) -> None:
    scored = synthetic()
    kept = {"knowns": scored.labels >= 0, "negatives": scored.labels == NEGATIVE}
    some = scored.subset(np.flatnonzero(kept.get(left, np.zeros(len(scored), dtype=bool))))
    name, found = choose_score(some, 0.1)
    assert name == "softmax"
    assert set(found.values()) == {None}


@pytest.mark.parametrize("best", [False, True])
def test_validation_parts_are_disjoint_and_stratified(best: bool) -> None:
    groups = np.repeat(["a", "b", "c"], [100, 200, 300])
    parts = split_validation(groups, verify_share=0.2, best=best)
    joined = np.concatenate([parts.selection, parts.verification, parts.calibration])
    assert sorted(joined) == list(range(600))
    share = 0.5 if best else 0.2
    assert [(groups[parts.selection] == g).sum() for g in "abc"] == [
        100 * share,
        200 * share,
        300 * share,
    ]


def test_export_calibrates_on_what_selected_and_checked_nothing(exported: Run) -> None:
    classifier = load_artifact(exported.artifact)
    factory = classifier.card.factory
    assert factory is not None
    assert (factory["fpr"], factory["path"]) == (0.05, classifier.path.key)
    stored = load_score_sets(exported.artifact / "calibration.npz")[classifier.path.key]
    verification = Scored.load(exported.folder / "verification.npz")
    assert not set(stored.sample_ids) & set(verification.sample_ids)
    negatives = stored.negative_scores(factory["score_type"])
    assert (
        int((negatives >= np.float32(factory["tau"])).sum()) == factory["accepted"] <= factory["k"]
    )
    assert classifier.card.name == "small"
    assert UNKNOWN not in stored.labels


def test_stored_calibration_scores_are_those_of_the_served_classifier(exported: Run) -> None:
    classifier = load_artifact(exported.artifact)
    data = exported.protocol_data(("validation",))
    again = score_split(classifier, data.validation, data.preprocessing, show_progress=False)
    of_id = dict(zip(again.sample_ids, again.scores["softmax"], strict=True))
    stored = load_score_sets(exported.artifact / "calibration.npz")[classifier.path.key]
    expected = np.array([of_id[sample] for sample in stored.sample_ids])
    np.testing.assert_allclose(stored.scores["softmax"], expected, atol=1e-4, rtol=0)


def test_unattainable_factory_target_is_refused(run: Run) -> None:
    with pytest.raises(NotCertifiable, match="smallest attainable"):
        export(run, fpr=1e-5, show_progress=False)
    export(run, fpr=0.05, name="small", show_progress=False)


def test_another_path_is_added_beside_the_first(exported: Run) -> None:
    before = load_score_sets(exported.artifact / "calibration.npz")
    path = calibrate(exported, device="cpu", precision="bfloat16")
    after = load_score_sets(exported.artifact / "calibration.npz")
    assert set(after) == set(before) | {path}
    first = next(iter(before))
    assert after[path].sample_ids.tolist() == after[first].sample_ids.tolist()
    assert not np.array_equal(after[path].scores["softmax"], after[first].scores["softmax"])
    assert read_card(exported.artifact).factory["path"] == first  # type: ignore[index]


def test_evaluation_writes_report_scores_and_figures(exported: Run) -> None:
    report = evaluate(exported, show_progress=False)
    assert report["counts"]["test"]["unknown"] == 550
    assert {file.name for file in (exported.folder / "figures").iterdir()} == {
        "oscr.png", "angles.png", "scores.png", "features.png", "false_positives.png",
    }  # fmt: skip
    assert json.loads((exported.folder / "report.json").read_text())["scores"] == json.loads(
        json.dumps(report["scores"])
    )


def test_report_regenerates_from_stored_scores_alone(
    exported: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, Any] = evaluate(exported, show_progress=False)
    monkeypatch.setattr(Run, "load_model", None)
    monkeypatch.setattr(Run, "protocol_data", None)
    assert json.dumps(write_report(exported)) == json.dumps(first)


def test_folder_that_is_no_run_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.train"):
        Run(tmp_path)


def test_strict_rule_allows_one_false_positive_fewer() -> None:
    """Twenty unknowns with scores 1..20 and a known above each: at 10 % two may pass, or one."""
    unknown = np.arange(20) + 1.0
    scores = np.concatenate([unknown + 0.5, unknown]).astype(np.float32)
    labels = np.array([0] * 20 + [UNKNOWN] * 20)
    scored = dataclasses.replace(
        synthetic(40),
        labels=labels,
        groups=labels.astype(str),
        predictions=np.zeros(40, np.int64),
        scores={"softmax": scores, "logit": scores},
    )
    inclusive, strict = (
        build_report(scored, config={}, notes=[], counts={}, factory=None, rule=rule, repeats=2)
        for rule in ("inclusive", "strict")
    )
    values = [
        report["scores"]["softmax"]["unknown"]["ccr_at_fpr"]["0.1"]["value"]
        for report in (inclusive, strict)
    ]
    assert values == [0.1, 0.05]
    assert strict["rule"] == "strict"
