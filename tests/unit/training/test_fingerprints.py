"""Images that are no longer those of the training: what would then calibrate may have been trained on."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openset.labels import NEGATIVE
from openset.preprocessing import Preprocessing
from tests.factories import begun_run, character_data, emnist_files, fill_with_images
from training.artifact_export import export
from training.checkpoints import read_checkpoint, write_checkpoint
from training.data import ProtocolData, at_most
from training.engine import Trainer
from training.evaluation import REPORT, SCORES_FILE, evaluate
from training.fingerprints import IMAGES, VALIDATION, require_former_validation
from training.grid.cell_evaluation import evaluate_cell
from training.path_calibration import calibrate
from training.protocols import get_protocol
from training.runs import Run, TrainConfig, make_config

LOADED = ("train", "validation")
WNIDS = [name for group in ("known", "negative") for name in getattr(get_protocol("p2"), group)[:2]]


def untrained(config: TrainConfig, data: ProtocolData, folder: Path) -> Run:
    begun_run(folder, config)
    Trainer(config, data, folder, show_progress=False).save()
    return Run(folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two known classes of p2 and two negative ones, 20 images each, and a run that was trained on them from a cache."""
    root = tmp_path_factory.mktemp("photographs")
    for number, wnid in enumerate(WNIDS):
        color = (60 * number, 200 - 60 * number, 90)
        fill_with_images(root / "tree/train" / wnid, 20, color)
        fill_with_images(root / "tree/val" / wnid, 2, color)
    options = {"image_size": 32, "allow_missing_classes": True}
    config = make_config(
        "p2", "cos_eos", data=root / "tree", options=options, device="cpu", cache=root / "cache", name="run"
    )  # fmt: skip
    untrained(config, config.load_data(LOADED, decoded=True), root / "run")
    return root


def copied(photographs: Path, tmp_path: Path) -> tuple[Run, Path]:
    """The run and its tree, at another place."""
    shutil.copytree(photographs, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(Run(photographs / "run").config, data=str(tmp_path / "tree"))
    begun_run(tmp_path / "run", config)
    return Run(tmp_path / "run"), tmp_path / "tree/train"


def quiet_export(run: Run, **options: Any) -> Any:
    return export(run, show_progress=False, **({"fpr": 0.9} | options))


def remove_one(train: Path) -> None:
    (train / WNIDS[0] / "007.png").unlink()


def add_one(train: Path) -> None:
    fill_with_images(train / WNIDS[3], 1, first=20)


def of_earlier_release(run: Run, *lost: str) -> None:
    state = read_checkpoint(run.folder / "last.pt")
    write_checkpoint(run.folder / "last.pt", {key: state[key] for key in state if key not in lost})


@pytest.mark.parametrize("lost", [(), (VALIDATION,)])
@pytest.mark.parametrize("change", [remove_one, add_one])
def test_photographs_that_are_split_anew_are_refused_before_any_is_decoded(
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    lost: tuple[str, ...],
) -> None:
    run, train = copied(photographs, tmp_path)
    of_earlier_release(run, *lost)
    before = run.config.load_data(LOADED)
    change(train)
    after = run.protocol_data(LOADED)
    # What would calibrate was trained on, and its classes are the same.
    assert len(np.intersect1d(after.validation.sample_ids, before.train.sample_ids)) > 1
    monkeypatch.setattr(Preprocessing, "open", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        ValueError, match=r"run was trained and validated on other images than .*tree"
    ):
        quiet_export(run)
    assert not run.artifact.exists()


@pytest.mark.parametrize("lost", [(), (VALIDATION,), (VALIDATION, IMAGES)])
def test_unchanged_photographs_are_taken_with_and_without_cache_and_wherever_they_lie(
    photographs: Path, tmp_path: Path, lost: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    run, train = copied(photographs, tmp_path)
    of_earlier_release(run, *lost)
    (train / WNIDS[0] / "notes.txt").write_text("no image")
    quiet_export(run)
    calibrate(run, device="cpu", precision="float32")
    told = caplog.text.count("nothing here says which images")
    assert told == (2 if IMAGES in lost else 0)
    evaluate(run, show_progress=False)
    # The artifact alone, on another machine.
    (run.folder / "last.pt").unlink()
    calibrate(run, device="cpu", precision="float32")
    assert caplog.text.count("nothing here says which images") == told + 1


def test_another_path_is_not_calibrated_with_other_images(
    photographs: Path, tmp_path: Path
) -> None:
    run, train = copied(photographs, tmp_path)
    quiet_export(run)
    remove_one(train)
    with pytest.raises(ValueError, match="restore the former files, or train anew"):
        calibrate(run, device="cpu", precision="bfloat16")


@pytest.fixture
def toy(tmp_path: Path) -> Run:
    config = make_config(
        "toy", "cos_eos", epochs=1, device="cpu", name="toy", data=emnist_files(tmp_path)
    )
    return untrained(config, config.load_data(LOADED), tmp_path / "toy")


def move_first_digit_to_the_end(run: Run) -> None:
    """Numbers of images and classes stay; which image has which number does not."""
    for kind in ("images-idx3", "labels-idx1"):
        file = Path(run.config.data or "") / f"emnist/emnist-mnist-train-{kind}-ubyte.gz"
        content = gzip.decompress(file.read_bytes())
        size, start = (784, 16) if kind.startswith("images") else (1, 8)
        head, body = content[:start], content[start:]
        file.write_bytes(gzip.compress(head + body[size:] + body[:size]))


def test_cell_of_the_grid_is_not_validated_with_other_images(toy: Run) -> None:
    assert evaluate_cell(toy, "cpu", show_progress=False)["validation"]
    quiet_export(toy)
    move_first_digit_to_the_end(toy)
    # Refused before any file of the former evaluation is written over.
    for name in (SCORES_FILE, REPORT):
        (toy.folder / name).unlink()
    for use in (
        lambda: evaluate_cell(toy, "cpu", show_progress=False),
        lambda: quiet_export(toy),
        lambda: calibrate(toy, device="cpu", precision="float32"),
    ):
        with pytest.raises(ValueError, match="other images"):
            use()
    assert not (toy.folder / SCORES_FILE).exists()
    assert not (toy.folder / REPORT).exists()


def test_run_on_a_part_of_the_training_images_is_calibrated_with_all_of_the_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("toy", "cos_eos", device="cpu", name="n3", data=emnist_files(tmp_path))
    data = config.load_data(LOADED)
    shown = dataclasses.replace(data, train=at_most(data.train, 3))
    quiet_export(untrained(config, shown, tmp_path / "n3"))
    assert "other images" not in caplog.text


def own_classes(folder: Path) -> tuple[Path, TrainConfig]:
    """A tree of two known classes and a negative one, and a run on it."""
    tree = folder / "tree"
    for name in ("known/ant", "known/bee", "negative/moss"):
        fill_with_images(tree / name, 14)
    options = {"image_size": 32}
    return tree, make_config(
        "folders", "cos_eos", data=tree, options=options, device="cpu", name="own"
    )


def test_added_files_of_own_classes_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, config = own_classes(tmp_path)
    run = untrained(config, config.load_data(LOADED), tmp_path / "own")
    quiet_export(run)
    assert "other images" not in caplog.text
    fill_with_images(tree / "negative/moss", 30, first=100)
    quiet_export(run)
    assert "renamed is dealt out anew" in caplog.text


def test_renamed_files_of_own_classes_are_told_with_what_the_test_shows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, config = own_classes(tmp_path)
    before = config.load_data(LOADED)
    run = untrained(config, before, tmp_path / "own")
    kept = evaluate(run, show_progress=False)["notes"]
    assert "other images" not in caplog.text + " ".join(kept)
    for file in (tree / "known/ant").iterdir():
        file.rename(file.with_stem(f"renamed-{file.stem}"))
    trained = {name.replace("ant/", "ant/renamed-") for name in before.train.sample_ids.tolist()}
    assert trained & set(run.protocol_data(("test",)).test.sample_ids.tolist())
    report = evaluate(run, show_progress=False)
    (told,) = [note for note in report["notes"] if note not in kept]
    assert f"own was trained and validated on other images than {tree} now holds" in told
    assert "renamed is dealt out anew" in told
    assert caplog.messages.count(told) == 1


def test_characters_that_are_rendered_differently_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = character_data(
        train=(0, NEGATIVE), validation=(*range(10), *[NEGATIVE] * 10), test=(0,), count=20
    )
    config = make_config("glyphs", "cos_eos", device="cpu", name="run")
    run = untrained(config, data, tmp_path / "run")
    images = data.validation.images
    assert isinstance(images, torch.Tensor)
    images = images.clone()
    images[3, 0, 5, 5] ^= 1
    drawn = dataclasses.replace(data.validation, images=images)
    require_former_validation(run, data)
    assert caplog.text == ""
    require_former_validation(run, dataclasses.replace(data, validation=drawn))
    assert "draws some pixels differently" in caplog.text


def test_other_known_classes_are_named_as_such(photographs: Path, tmp_path: Path) -> None:
    run, train = copied(photographs, tmp_path)
    added = get_protocol("p2").known[2]
    for part, count in (("train", 20), ("val", 2)):
        fill_with_images(train.parent / part / added, count)
    with pytest.raises(ValueError, match=f"new: {added}"):
        quiet_export(run)


# -- weights of another run --------------------------------------------------------------------------------------------


def started_from(run: Run, data: ProtocolData, root: Path | None = None) -> Trainer:
    config = dataclasses.replace(run.config, initial_weights=str(run.folder))
    if root is not None:
        config = dataclasses.replace(config, data=str(root))
    return Trainer(config, data, run.folder.parent / "second", show_progress=False)


def test_weights_are_not_taken_over_from_a_run_on_other_images(toy: Run) -> None:
    before = toy.config.load_data(LOADED)
    started_from(toy, before)
    # Of all that it showed, a run on fewer training images saw nothing that validates.
    started_from(toy, dataclasses.replace(before, train=at_most(before.train, 3)))
    move_first_digit_to_the_end(toy)
    with pytest.raises(
        ValueError, match=r"initial_weights=.*toy was trained and validated on other"
    ):
        started_from(toy, toy.config.load_data(LOADED))


def test_weights_are_taken_over_from_the_same_tree_to_which_files_were_added(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    for name in ("known/ant", "known/bee", "negative/moss"):
        fill_with_images(tree / name, 14)
    shutil.copytree(tree, copy)
    config = make_config("folders", "cos_eos", data=tree, options={"image_size": 32}, device="cpu")
    run = untrained(config, config.load_data(LOADED), tmp_path / "own")

    def start(root: Path) -> Trainer:
        data = dataclasses.replace(config, data=str(root)).load_data(LOADED)
        return started_from(run, data, root)

    start(tree)
    assert caplog.text == ""
    # The same names; whether they are the same pictures nobody can tell.
    start(copy)
    assert "photographs that lay elsewhere" in caplog.text
    assert f"Those in {copy} have the same names and classes" in caplog.text
    for root in (tree, copy):
        fill_with_images(root / "negative/moss", 30, first=100)
    start(tree / "known/..")
    assert "renamed is dealt out anew" in caplog.text
    # Elsewhere another picture may have the name, and the same one another.
    with pytest.raises(ValueError, match="other images"):
        start(copy)
