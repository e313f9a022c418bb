"""Scores of a run from training data to artifact and report: fitted where, chosen where, judged with which state."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from openset.artifact import CALIBRATION, load_artifact, read_card
from openset.calibration import load_score_sets
from openset.fitted_scores import ALL_SCORES, FITTED_SCORES
from openset.labels import NEGATIVE, UNKNOWN, is_known
from tests.factories import DIGITS, begun_run, character_data, write_idx
from training import evaluate as evaluate_module
from training import export as export_module
from training import score_fitting
from training.artifact_export import export
from training.data import ProtocolData
from training.engine import Trainer
from training.evaluation import REPORT, SCORES_FILE, evaluate, write_report
from training.grid import runner
from training.grid.cell_evaluation import evaluate_cell
from training.grid.plan import plan
from training.grid.results import Model, group_rows
from training.grid.rows import OTHER_DIGITS_GROUP, cell_columns, replaced_scores, stored_rows
from training.runs import Run, make_config
from training.scoring import Scored, score_split


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The parts that were loaded, call by call."""
    asked: list[tuple[str, ...]] = []

    def protocol_data(self: Run, parts: Any = ()) -> ProtocolData:
        asked.append(tuple(parts))
        return DATA

    monkeypatch.setattr(Run, "protocol_data", protocol_data)
    return asked


DATA = character_data(
    train=(*range(10), NEGATIVE), validation=(*range(10), *[NEGATIVE] * 10),
    test=(*range(10), NEGATIVE, UNKNOWN), count=20,
)  # fmt: skip


def run_of(tmp_path: Path, **options: Any) -> Run:
    config = make_config("glyphs", "cos_eos", epochs=1, device="cpu", name="small", options=options)
    begun_run(tmp_path / "small", config)
    Trainer(config, DATA, tmp_path / "small", show_progress=False).save("last.pt")
    return Run(tmp_path / "small")


@pytest.fixture
def exported(tmp_path: Path, loaded: list[tuple[str, ...]]) -> Run:
    run = run_of(tmp_path)
    export(run, fpr=0.1, scores=ALL_SCORES, show_progress=False)
    return run


def test_default_export_loads_no_training_data_and_holds_no_state(
    tmp_path: Path, loaded: list[tuple[str, ...]]
) -> None:
    run = run_of(tmp_path)
    export(run, fpr=0.1, show_progress=False)
    assert loaded == [("validation",)]
    assert read_card(run.artifact).scores == ["softmax", "logit"]
    with safe_open(run.artifact / "weights.safetensors", framework="numpy") as weights:
        assert {name.partition(".")[0] for name in weights.keys()} == {"network", "head"}  # noqa: SIM118


def test_state_is_fitted_on_known_training_images_alone(exported: Run) -> None:
    plain = exported.classifier(DATA)
    knowns = DATA.train.subset(is_known(DATA.train.labels).nonzero()[0])
    scored = score_split(plain, knowns, DATA.preprocessing, show_progress=False)
    arrays = [torch.from_numpy(a) for a in (scored.features, scored.predictions, scored.labels)]
    stored = load_artifact(exported.artifact).fitted
    for name, kind in FITTED_SCORES.items():
        expected = kind.fit(*arrays, len(DIGITS)).state_dict()
        for tensor, value in stored[name].state_dict().items():
            torch.testing.assert_close(value, expected[tensor], atol=1e-6, rtol=1e-5)


def test_no_class_gives_more_than_its_share_to_the_state(
    tmp_path: Path, loaded: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(classifier, split, *rest, **options):
        seen.append(split)
        return score_split(classifier, split, *rest, **options)

    monkeypatch.setattr(score_fitting, "SAMPLES_PER_CLASS", 7)
    monkeypatch.setattr(score_fitting, "score_split", record)
    run = run_of(tmp_path)
    score_fitting.fit_scores(["neco"], run.classifier(DATA), DATA, show_progress=False)
    assert seen[0].counts() == {"known": 70, "negative": 0, "unknown": 0}


def test_export_offers_every_score_and_names_its_choice(exported: Run) -> None:
    card = read_card(exported.artifact)
    assert card.scores == list(ALL_SCORES)
    selection = card.training["score_selection"]["ccr"]
    assert set(selection) == set(ALL_SCORES)
    best = max(value or 0.0 for value in selection.values())
    assert (selection[card.default_score] or 0.0) == best
    assert card.factory is not None
    assert card.factory["score_type"] == card.default_score
    (score_set,) = load_score_sets(exported.artifact / CALIBRATION).values()
    assert set(score_set.scores) == set(ALL_SCORES)


def test_evaluation_judges_the_artifacts_own_state(
    exported: Run, loaded: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.clear()
    monkeypatch.setattr(score_fitting, "fit_scores", lambda *_, **__: pytest.fail("fitted anew"))
    report = evaluate(exported, show_progress=False)
    assert loaded == [("test",)]
    assert set(report["scores"]) == set(ALL_SCORES)
    assert report["factory"]["operating_point"] == read_card(exported.artifact).factory


def test_evaluation_of_a_run_without_artifact_fits_what_it_is_asked_for(
    tmp_path: Path, loaded: list[tuple[str, ...]]
) -> None:
    report = evaluate(run_of(tmp_path), scores=["softmax", "ghost"], show_progress=False)
    assert loaded == [("train", "test")]
    assert set(report["scores"]) == {"softmax", "ghost"}


def test_evaluation_without_softmax_writes_its_report(
    tmp_path: Path, loaded: list[tuple[str, ...]]
) -> None:
    run = run_of(tmp_path)
    report = evaluate(run, scores=["ghost"], show_progress=False)
    assert json.loads((run.folder / REPORT).read_text()) == json.loads(json.dumps(report))
    assert set(report["scores"]) == {"ghost"}


def test_state_of_another_model_is_not_used(exported: Run, loaded: list[tuple[str, ...]]) -> None:
    state = exported.load_checkpoint()
    state["model"]["head.weight"] += 0.1
    torch.save(state, exported.folder / "last.pt")
    assert score_fitting.scores_in_artifact(exported, "last") == {}


def test_threshold_of_a_score_that_was_not_evaluated_is_not_judged(
    tmp_path: Path, loaded: list[tuple[str, ...]]
) -> None:
    run = run_of(tmp_path)
    export(run, fpr=0.1, scores=["energy"], show_progress=False)
    report = evaluate(run, scores=["softmax"], show_progress=False)
    assert report["factory"] is None
    assert any("energy, which was not evaluated" in note for note in report["notes"])


def test_run_is_exported_and_evaluated_with_the_scores_it_was_configured_for(
    tmp_path: Path, loaded: list[tuple[str, ...]]
) -> None:
    run = run_of(tmp_path, scores="neco")
    assert set(evaluate(run, show_progress=False)["scores"]) == {"softmax", "logit", "neco"}
    export(run, fpr=0.1, show_progress=False)
    assert read_card(run.artifact).default_score == "neco"


@pytest.mark.parametrize(
    "more", [["--rule", "strict"], ["--scores", "all"], ["--which", "best"], ["--device", "cpu"]]
)
def test_what_stored_scores_do_not_change_with_is_refused_beside_them(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate_module.main(["--run", "runs/x", "--from-scores", *more])
    assert f"{more[0]} would not change" in capsys.readouterr().err


@pytest.mark.parametrize("module", [export_module, evaluate_module])
def test_misspelt_score_is_refused_with_the_list(
    module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert module.main(["--run", str(tmp_path), "--scores", "softmax,goast"]) == 1
    assert "neco, got goast" in caplog.records[-1].message


def test_a_run_of_no_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_config("glyphs", "cos_eos", epochs=0)


# -- the digits of another source --------------------------------------------------------------------------------------


@pytest.fixture
def toy_run(tmp_path: Path) -> Run:
    """Of EMNIST's digits; every image is noise of its own."""
    random = np.random.default_rng(0)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        digits, letters = np.repeat(np.arange(10), 4), np.repeat(np.arange(1, 27), 4)
        for name, labels in (
            (f"emnist/emnist-mnist-{part}", digits),
            (f"emnist/emnist-letters-{part}", letters),
            (f"mnist/{prefix}", digits),
        ):
            images = random.integers(0, 256, (len(labels), 28, 28))
            write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
            write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    config = make_config("toy", "cos_eos", epochs=1, device="cpu", name="toy", data=tmp_path)
    begun_run(tmp_path / "toy", config)
    data = config.load_data(("train", "validation"))
    Trainer(config, data, tmp_path / "toy", show_progress=False).save("last.pt")
    return Run(tmp_path / "toy")


def test_run_is_tested_with_the_digits_of_another_source(toy_run: Run) -> None:
    own = evaluate(toy_run, show_progress=False)
    other = evaluate(toy_run, digits="mnist", show_progress=False)
    folder = toy_run.folder / "on-mnist-digits"
    assert json.loads((folder / REPORT).read_text()) == json.loads(json.dumps(other))
    assert json.loads((toy_run.folder / REPORT).read_text()) == json.loads(json.dumps(own))
    assert other["notes"][0] == "digits: MNIST, letters: EMNIST"
    assert "the model was trained with EMNIST's digits" in other["notes"]
    assert set(other["counts"]) == {"test"}
    first, second = (Scored.load(place / SCORES_FILE) for place in (toy_run.folder, folder))
    known = is_known(first.labels)
    # The letters, and with them every threshold, are the same; the digits are not.
    np.testing.assert_array_equal(first.features[~known], second.features[~known])
    assert not np.allclose(first.features[known], second.features[known])
    assert write_report(toy_run, digits="mnist") == other


def test_own_source_of_digits_is_the_plain_evaluation(toy_run: Run) -> None:
    evaluate(toy_run, digits="emnist", show_progress=False)
    assert (toy_run.folder / REPORT).is_file()
    assert not (toy_run.folder / "on-emnist-digits").exists()


def test_digits_of_a_protocol_without_a_choice_are_refused(
    tmp_path: Path, loaded: list[tuple[str, ...]]
) -> None:
    with pytest.raises(ValueError, match="glyphs has no choice of digits"):
        evaluate(run_of(tmp_path), digits="mnist", show_progress=False)


def test_run_is_tested_with_other_digits_where_its_own_are_not(toy_run: Run) -> None:
    for file in (Path(toy_run.config.data or "") / "emnist").glob("emnist-mnist-*"):
        file.unlink()
    assert evaluate(toy_run, digits="mnist", show_progress=False)["accuracy"]


def test_cell_of_the_grid_keeps_what_it_makes_of_the_other_digits(toy_run: Run) -> None:
    found = evaluate_cell(toy_run, "cpu", show_progress=False)["other_digits"]
    own = evaluate(toy_run, show_progress=False)["feature_magnitudes"]
    other = evaluate(toy_run, digits="mnist", show_progress=False)["feature_magnitudes"]
    assert found["feature_magnitudes"] == other
    assert own["known"] != other["known"]
    assert own["unknown"] == other["unknown"]


def test_cell_of_the_grid_keeps_its_figures_and_knows_its_scores(
    toy_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [cell] = plan("toy", losses=["cos_eos"], seeds=1, digits=["emnist"], epochs=1, device="cpu")
    columns = cell_columns(cell, {"classes": "10/11/11"})
    runner._finish(toy_run.config, columns, tmp_path, False, {})
    rows = stored_rows(toy_run.folder)

    def here() -> Model:
        [[entry]] = group_rows(rows, tmp_path, tmp_path / "results").values()
        return entry.models[0]

    assert here().has_scores
    before = (toy_run.folder / REPORT).read_bytes()
    evaluate(toy_run, precision="bfloat16", show_progress=False)
    evaluate(toy_run, digits="mnist", precision="bfloat16", show_progress=False)
    assert (toy_run.folder / REPORT).read_bytes() != before
    assert stored_rows(toy_run.folder) == rows
    assert replaced_scores(toy_run.folder) == [SCORES_FILE, f"on-mnist-digits/{SCORES_FILE}"]
    assert not here().has_scores
    assert here().summary is None
    assert f"{SCORES_FILE} was written by another evaluation" in caplog.text
    assert "--again" in caplog.text

    # The same scores again are the cell's own; without those of the other digits nothing is drawn from these.
    evaluate(toy_run, show_progress=False)
    assert replaced_scores(toy_run.folder) == [f"on-mnist-digits/{SCORES_FILE}"]
    assert here().has_scores
    assert (OTHER_DIGITS_GROUP, "softmax") not in here().summary.replicates
    evaluate(toy_run, digits="mnist", show_progress=False)
    assert replaced_scores(toy_run.folder) == []


@pytest.mark.parametrize("damage", ["missing", "not an idx file"])
def test_other_digits_that_cannot_be_read_cost_the_cell_nothing(toy_run: Run, damage: str) -> None:
    file = Path(toy_run.config.data or "") / "mnist" / "t10k-images-idx3-ubyte.gz"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(gzip.compress(bytes(100)))
    found = evaluate_cell(toy_run, "cpu", show_progress=False)
    assert found["other_digits"] is None
    assert found["validation"] is not None
