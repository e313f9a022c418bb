"""Export on a small untrained run: what is kept, what is refused and what is said."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openset.artifact import CALIBRATION, load_artifact, read_card
from openset.calibration import NotCertifiable, load_score_sets
from openset.labels import NEGATIVE, UNKNOWN
from serving.freshness import why_artifact_is_stale
from tests.factories import begun_run, character_data
from training import artifact_export, path_calibration
from training import calibrate as calibrate_module
from training import evaluate as evaluate_module
from training import export as export_module
from training.artifact_export import export
from training.data import split_validation
from training.engine import Trainer
from training.evaluation import evaluate
from training.path_calibration import calibrate
from training.runs import Run, make_config
from training.worth import doubt

DATA = character_data(
    train=(0, 1, NEGATIVE), validation=(*range(10), *[NEGATIVE] * 10), test=(*range(10), NEGATIVE, UNKNOWN),
    count=20, train_count=4,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(Run, "protocol_data", lambda self, parts=(): DATA)
    config = make_config("glyphs", "cos_eos", epochs=3, device="cpu", name="small")
    folder = tmp_path / "small"
    begun_run(folder, config)
    trainer = Trainer(config, DATA, folder, show_progress=False)
    trainer.progress.epoch = 3
    trainer.save("last.pt")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    trainer.save("best.pt")
    return Run(folder)


def quiet_export(run: Run, **options):
    return export(run, show_progress=False, **({"fpr": 0.1} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def score_sets(run: Run):
    return load_score_sets(run.artifact / CALIBRATION)


def test_refused_export_costs_no_scoring_and_leaves_the_artifact_as_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_export(run)
    before = contents(run.artifact)
    monkeypatch.setattr(artifact_export, "score_split", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(NotCertifiable) as refused:
        quiet_export(run, fpr=1e-4)
    # 200 negatives in one group: a fifth selects, a fifth of the rest verifies.
    assert refused.value.n == 128
    assert contents(run.artifact) == before


def test_export_that_breaks_half_way_leaves_the_artifact_as_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_export(run)
    before = contents(run.artifact)

    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact_export, "score_split", broken)
    with pytest.raises(KeyboardInterrupt):
        quiet_export(run, which="best")
    assert contents(run.artifact) == before


def test_rate_that_a_refusal_suggests_is_attainable(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--run", str(run.folder), "--fpr"]
    with caplog.at_level(logging.ERROR):
        assert export_module.main([*arguments, "0.001"]) == 1
    suggested = re.search(r"--fpr ([\d.e-]+)", caplog.text)
    assert suggested is not None
    assert export_module.main([*arguments, suggested.group(1)]) == 0
    assert float(suggested.group(1)) == read_card(run.artifact).factory["fpr"]  # type: ignore[index]


def test_new_operating_point_of_the_same_model_keeps_the_other_paths(run: Run) -> None:
    quiet_export(run)
    other = calibrate(run, device="cpu", precision="bfloat16")
    stored = score_sets(run)[other]
    quiet_export(run, fpr=0.2)
    assert read_card(run.artifact).factory["fpr"] == 0.2  # type: ignore[index]
    assert list(score_sets(run)) == [load_artifact(run.artifact).path.key, other]
    np.testing.assert_array_equal(
        score_sets(run)[other].scores["softmax"], stored.scores["softmax"]
    )


@pytest.mark.parametrize(
    "change", [{"which": "best"}, {"verify_share": 0.5}, {"scores": ["softmax"]}]
)
def test_paths_of_another_model_other_samples_or_other_scores_are_dropped_and_named(
    run: Run, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    quiet_export(run)
    other = calibrate(run, device="cpu", precision="bfloat16")
    caplog.clear()
    quiet_export(run, **change)
    assert list(score_sets(run)) == [load_artifact(run.artifact).path.key]
    assert any(other in record.message for record in caplog.records)


def test_scores_of_a_retrained_model_do_not_survive_although_the_samples_are_the_same(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_export(run)
    other = calibrate(run, device="cpu", precision="bfloat16")
    before = score_sets(run)[other].sample_ids
    shutil.copy(run.folder / "best.pt", run.folder / "last.pt")
    caplog.clear()
    quiet_export(run)
    key = load_artifact(run.artifact).path.key
    assert list(score_sets(run)) == [key]
    np.testing.assert_array_equal(score_sets(run)[key].sample_ids, before)
    assert any(other in record.message for record in caplog.records)


@pytest.mark.parametrize(("which", "other"), [("last", "best"), ("best", "last")])
def test_training_on_after_the_export_is_found_out_from_the_card(
    run: Run, which: str, other: str
) -> None:
    quiet_export(run, which=which)
    shutil.copy(run.folder / f"{other}.pt", run.folder / "kept.pt")
    (run.folder / f"{other}.pt").write_bytes(b"the checkpoint that was not exported is no matter")
    assert why_artifact_is_stale(run.artifact, "small") is None
    shutil.copy(run.folder / "kept.pt", run.folder / f"{which}.pt")
    told = why_artifact_is_stale(run.artifact, "small")
    assert told is not None
    assert f"make export RUN={run.folder} && make archive RUN={run.folder}" in told


def test_epochs_compete_on_images_that_neither_calibrate_nor_verify(run: Run) -> None:
    competed = set(Trainer(run.config, DATA, run.folder, show_progress=False).validation.sample_ids)
    quiet_export(run, which="best", verify_share=0.25)
    kept = set(np.load(run.folder / artifact_export.VERIFICATION)["sample_ids"])
    calibrating = set(next(iter(score_sets(run).values())).sample_ids)
    assert len(competed) == len(DATA.validation) / 2
    assert not competed & (kept | calibrating)
    assert len(competed | kept | calibrating) == len(DATA.validation)


def test_parts_stay_the_same_when_images_turn_out_unreadable() -> None:
    ids = np.array([f"v{i}" for i in range(40)])
    parts = split_validation(np.repeat(["a", "b"], 20), verify_share=0.5, best=True)
    kept = np.delete(ids, [3, 25])
    left = parts.within(kept, ids)
    for name in ("selection", "verification", "calibration"):
        expected = set(ids[getattr(parts, name)]) - {"v3", "v25"}
        assert set(kept[getattr(left, name)]) == expected


def test_verification_slice_holds_ids_that_did_not_calibrate(run: Run) -> None:
    quiet_export(run, verify_share=0.25)
    kept = set(np.load(run.folder / artifact_export.VERIFICATION)["sample_ids"])
    calibrating = set(next(iter(score_sets(run).values())).sample_ids)
    assert len(kept) == (400 - 80) / 4
    assert not kept & calibrating
    assert kept | calibrating < set(DATA.validation.sample_ids)


def test_report_judges_the_factory_threshold_of_the_evaluated_model(run: Run) -> None:
    quiet_export(run)
    report = evaluate(run, show_progress=False)
    assert report["factory"]["operating_point"] == read_card(run.artifact).factory
    assert report["notes"] == ["synthetic"]


def test_report_does_not_judge_a_threshold_of_another_model(run: Run) -> None:
    quiet_export(run, which="best")
    report = evaluate(run, show_progress=False)
    assert report["factory"] is None
    assert any("another model" in note for note in report["notes"])
    assert evaluate(run, which="best", show_progress=False)["factory"] is not None


def test_report_says_when_threshold_and_scores_are_of_different_paths(run: Run) -> None:
    quiet_export(run)
    report = evaluate(run, precision="bfloat16", show_progress=False)
    assert report["factory"] is not None
    assert any("not the served computation" in note for note in report["notes"])


@pytest.mark.parametrize("main", [export_module.main, calibrate_module.main, evaluate_module.main])
def test_missing_cuda_is_one_clear_sentence(
    run: Run, main, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_export(run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--run", str(run.folder), "--device", "cuda"]) == 1
    assert "no CUDA device" in caplog.records[-1].message


def test_run_without_artifact_cannot_be_calibrated(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert calibrate_module.main(["--run", str(run.folder)]) == 1
    assert "export the run first" in caplog.records[-1].message


def test_export_killed_between_its_two_renames_loses_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_export(run)
    other = calibrate(run, device="cpu", precision="bfloat16")
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "artifact.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet_export(run, fpr=0.2)
    assert not run.artifact.exists()
    quiet_export(run, fpr=0.2)
    assert other in score_sets(run)
    assert sorted(file.name for file in run.folder.glob("artifact*")) == [
        "artifact",
        "artifact.lock",
    ]


def test_calibrate_after_a_killed_export_finds_the_artifact(run: Run) -> None:
    quiet_export(run)
    run.artifact.rename(run.artifact.with_name("artifact.old"))
    assert calibrate(run, device="cpu", precision="bfloat16") in score_sets(run)


def scored_meanwhile(monkeypatch: pytest.MonkeyPatch, event: Callable[[], object]) -> None:
    """While ``calibrate`` scores, something else happens to the artifact."""
    score = path_calibration.score_split

    def scoring(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(path_calibration, "score_split", score)
        event()
        return score(*arguments, **options)

    monkeypatch.setattr(path_calibration, "score_split", scoring)


def test_two_calibrations_at_a_time_both_stay(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_export(run)
    inner: list[str] = []
    scored_meanwhile(
        monkeypatch, lambda: inner.append(calibrate(run, device="cpu", precision="bfloat16"))
    )
    outer = calibrate(run, device="cpu", precision="float32")
    assert set(score_sets(run)) == {outer, *inner}


@pytest.mark.parametrize(
    "change", [{"which": "best"}, {"verify_share": 0.5}, {"scores": ["logit"]}]
)
def test_calibration_of_an_artifact_that_was_exported_anew_meanwhile_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    quiet_export(run)
    scored_meanwhile(monkeypatch, lambda: quiet_export(run, **change))
    with pytest.raises(ValueError, match="exported anew while it was scored"):
        calibrate(run, device="cpu", precision="bfloat16")
    assert list(score_sets(run)) == [load_artifact(run.artifact).path.key]


def test_unreadable_calibration_images_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_export(run)
    score = path_calibration.score_split
    monkeypatch.setattr(
        path_calibration,
        "score_split",
        lambda *arguments, **options: (whole := score(*arguments, **options)).subset(np.arange(len(whole) - 2)),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        calibrate(run, device="cpu", precision="bfloat16")
    assert "2 of " in caplog.text
    assert "unreadable" in caplog.text


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.message.startswith("warning: ")]


def test_untrained_model_is_called_near_worthless_with_its_figures_and_where_to_look(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--run", str(run.folder)]
    with caplog.at_level(logging.INFO):
        assert export_module.main([*arguments, "--fpr", "0.1"]) == 0
    [told] = warnings(caplog)
    factory = read_card(run.artifact).factory
    assert factory is not None
    expected = factory["expected_ccr"]
    assert f"CCR {expected:.4f}" in told
    assert "AUROC 0." in told
    assert str(run.folder / "history.json") in told
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert evaluate_module.main(arguments) == 0
    [told] = warnings(caplog)
    assert "AUROC 0." in told
    assert str(run.folder / "figures") in told


@pytest.mark.parametrize(
    ("auroc", "ccr", "said"),
    [
        (0.59, 0.5, ["AUROC 0.590"]), (0.9, 0.049, ["CCR 0.0490"]), (0.5, 0.0, ["AUROC 0.500", "CCR 0.0000"]),
        (0.6, 0.05, []), (None, None, []), (0.99, None, []),
    ],
)  # fmt: skip
def test_doubt_names_what_is_below_its_limit_and_nothing_else(
    auroc: float | None, ccr: float | None, said: list[str]
) -> None:
    told = doubt(Path("runs/x"), auroc=auroc, ccr=ccr, shown_by="runs/x/figures")
    assert (told is None) == (not said)
    assert [name for name in ("AUROC", "CCR") if name in (told or "")] == [
        text.split()[0] for text in said
    ]
    assert all(text in (told or "") for text in said)
