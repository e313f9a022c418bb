"""Own classes: the tree, the split that added files leave alone, and what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openset.artifact import read_card
from openset.image_headers import UnreadableImage
from openset.labels import NEGATIVE, UNKNOWN
from tests.factories import fill_with_images as fill
from training import compare_losses, cures, engine, folders, recommend
from training.artifact_export import export
from training.data import MissingClasses, ProtocolData, load_protocol
from training.engine import Trainer
from training.evaluation import evaluate
from training.folders import FEWEST_IMAGES, parts_of_class
from training.path_calibration import calibrate
from training.report import print_report
from training.runs import Run, make_config
from training.train import main, train

COLORS = {
    "known/ant": (220, 30, 30), "known/bee": (30, 200, 40), "negative/moss": (30, 40, 220),
    "unknown": (200, 200, 30),
}  # fmt: skip
PARTS = ("train", "validation", "test")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two known classes and a negative one of 14 images, and five unknown images without a class folder."""
    root = tmp_path / "tree"
    for name, color in COLORS.items():
        fill(root / name, 5 if name == "unknown" else 14, color)
    return root


def load(tree: Path, **changes: Any) -> ProtocolData:
    return load_protocol("folders", data=tree, **({"image_size": 28} | changes))


def part_of(data: ProtocolData) -> dict[str, str]:
    return {name: part for part in PARTS for name in getattr(data, part).sample_ids.tolist()}


# -- the tree --------------------------------------------------------------------------------------------------------


def test_folders_name_the_classes_and_their_rank_is_the_label(tree: Path) -> None:
    data = load(tree)
    assert data.class_ids == data.class_names == ["ant", "bee"]
    for part in PARTS:
        split = getattr(data, part)
        for sample, label, group in zip(split.sample_ids, split.labels, split.groups, strict=True):
            kind, *rest = sample.split("/")
            expected = {"negative": NEGATIVE, "unknown": UNKNOWN}.get(kind)
            assert label == (data.class_ids.index(rest[0]) if expected is None else expected)
            assert group == (kind if len(rest) == 1 else rest[0])
    assert len(part_of(data)) == 3 * 14 + 5
    assert data.preprocessing.resize == 32


def test_every_class_is_in_each_part_and_unknowns_are_in_the_test_alone(tree: Path) -> None:
    data = load(tree)
    for part in PARTS:
        assert {0, 1, NEGATIVE} <= set(getattr(data, part).labels.tolist())
    assert data.counts["test"]["unknown"] == 5
    assert data.counts["train"]["unknown"] == data.counts["validation"]["unknown"] == 0


def test_loose_negatives_are_one_group_beside_class_folders(tree: Path) -> None:
    fill(tree / "negative", 9)
    data = load(tree)
    assert set(data.train.groups[data.train.labels == NEGATIVE]) == {"moss", "negative"}


def test_other_files_hidden_ones_and_hidden_folders_are_left_alone(tree: Path) -> None:
    before = load(tree)
    (tree / "known/ant/notes.txt").write_text("no image")
    (tree / "known/ant/._000.png").write_bytes(b"a file manager's")
    (tree / "known/.thumbnails").mkdir()
    (tree / "README.md").write_text("mine")
    after = load(tree)
    assert part_of(after) == part_of(before)
    assert after.notes == before.notes == []


def test_misspelt_folder_is_named(tree: Path) -> None:
    (tree / "negative").rename(tree / "negatives")
    assert "negatives" in " ".join(load(tree).notes)


def move_to_root(tree: Path) -> None:
    shutil.copy(tree / "known/ant/000.png", tree / "known/stray.png")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda tree: shutil.rmtree(tree / "known"), FileNotFoundError, r"known/<class>/"),
        (lambda tree: shutil.rmtree(tree / "known/bee"), MissingClasses, "at least 2 known classes"),
        (lambda tree: (tree / "known/cat").mkdir(), FileNotFoundError, "cat holds no image"),
        (move_to_root, ValueError, r"1 images without a class, e\.g\. stray\.png"),
        (lambda tree: fill(tree / "negative/bee", 9), ValueError, r"bee in known/ and in negative/"),
        (lambda tree: fill(tree / "unknown/moss", 9), ValueError, r"moss in negative/ and in unknown/"),
        (lambda tree: fill(tree / "known/unknown", 9), ValueError, "answer for rejected images"),
        (lambda tree: fill(tree / "negative/rust", 4), ValueError, r"rust holds 4 images; .* at least 5"),
    ],
)  # fmt: skip
def test_tree_that_does_not_fit_is_refused(
    tree: Path, spoil: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    spoil(tree)
    with pytest.raises(error, match=message):
        load(tree)


def test_without_a_tree_the_command_says_what_it_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--protocol", "folders", "--loss", "softmax", "--runs", str(tmp_path)]
    assert main(arguments) == 1
    assert "needs DATA=<folder> with known/<class>/" in caplog.text


def test_unreadable_image_is_fatal_or_skipped_by_name(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Path(load(tree).test.images.paths[1])
    broken.write_bytes(b"no picture")
    data = load(tree)
    with pytest.raises(UnreadableImage, match=broken.name):
        list(data.test.batches(4, data.preprocessing))
    data = load(tree, on_unreadable="skip")
    seen = np.concatenate([indices for _, _, indices in data.test.batches(4, data.preprocessing)])
    assert seen.tolist() == [index for index in range(len(data.test)) if index != 1]
    assert "1 unreadable" in caplog.text


def test_cache_gives_the_images_that_the_files_give(tree: Path, tmp_path: Path) -> None:
    plain, cached = load(tree), load(tree, image_cache=tmp_path / "cache")
    for part in PARTS:
        pairs = [
            np.concatenate([images.numpy() for images, _, _ in getattr(data, part).batches(5, data.preprocessing)])
            for data in (plain, cached)
        ]  # fmt: skip
        assert np.array_equal(*pairs)
    assert list((tmp_path / "cache").glob("*/images.u8"))


# -- the split -------------------------------------------------------------------------------------------------------


def test_added_files_move_no_image(tree: Path) -> None:
    before = part_of(load(tree))
    fill(tree / "known/ant", 30, first=100)
    fill(tree / "known/aardvark", 20)
    fill(tree / "negative/moss", 30, first=100)
    after = part_of(load(tree))
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 80


def test_split_does_not_depend_on_where_the_tree_lies_and_follows_the_seed(
    tree: Path, tmp_path: Path
) -> None:
    before = part_of(load(tree))
    assert part_of(load(tree, seed=1)) != before
    shutil.move(tree, tmp_path / "moved")
    assert part_of(load(tmp_path / "moved")) == before


def test_shares_are_sixty_twenty_twenty() -> None:
    paths = [f"known/ant/{number}.png" for number in range(4000)]
    parts = parts_of_class(paths, seed=4242, name="known/ant")
    assert [len(parts[part]) / 4000 for part in PARTS] == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    assert sorted(path for part in parts.values() for path in part) == sorted(paths)


def test_growing_small_class_never_takes_back_an_image_that_was_used() -> None:
    """Images may only go from test to validation to train: an earlier run must not have seen what judges a later one."""
    use = {"test": 0, "validation": 1, "train": 2}
    refused = moved = 0
    for trial in range(300):
        paths = [f"known/ant/{trial}-{number}.png" for number in range(16)]
        former: dict[str, int] = {}
        for count in range(FEWEST_IMAGES, len(paths) + 1):
            try:
                parts = parts_of_class(sorted(paths[:count]), seed=4242, name="known/ant")
            except ValueError:
                refused += 1
                continue
            assert len(parts["test"]) >= 1
            assert min(len(parts["validation"]), len(parts["train"])) >= 2
            now = {path: use[part] for part, chosen in parts.items() for path in chosen}
            assert all(now[path] >= former[path] for path in former)
            moved += sum(now[path] > former[path] for path in former)
            former = now
    assert moved
    assert refused


def test_class_that_leaves_nothing_to_train_with_is_refused_with_a_way_out() -> None:
    def hashed_to_test(seed: int) -> list[str]:
        names = (f"known/ant/{number}.png" for number in range(10_000))
        return [name for name in names if folders._place(name, seed) < folders.TEST_SHARE][:5]

    with pytest.raises(ValueError, match=r"leaves 0 to train with; add images .*split_seed="):
        parts_of_class(hashed_to_test(4242), seed=4242, name="known/ant")


# -- what is missing -------------------------------------------------------------------------------------------------


def config_for(tree: Path, loss: str, **changes: Any) -> Any:
    options = {"image_size": 32, "batch_size": 16} | changes.pop("options", {})
    return make_config(
        "folders", loss, data=tree, epochs=1, device="cpu", options=options, **changes
    )


def test_defaults_follow_p1_and_the_number_of_classes(tree: Path) -> None:
    config = make_config("folders", "cos_eos", data=tree, device="cpu")
    p1 = make_config("p1", "cos_eos", data=tree, device="cpu")
    assert (config.network, config.epochs) == (p1.network, p1.epochs)
    assert config.loss_options["cosine_margin"] == p1.loss_options["cosine_margin"]
    for classes, scale in ((116, 17), (30, 16), (151, 18)):  # the thesis' own, of p1, p2 and p3
        network, head, _ = config.build_model(classes)
        assert (head.scale, network.fc.out_features) == (scale, classes)


def test_loss_that_needs_negatives_says_so_without_them(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / "negative")
    with pytest.raises(ValueError, match=r"cos_eos learns from negatives.*negative/.*softmax"):
        train(config_for(tree, "cos_eos"), runs=tmp_path, show_progress=False)


# -- batches that batch norm cannot learn from ---------------------------------------------------------------------------


def test_lone_last_image_is_left_out_of_its_epoch_and_the_schedule_ends_with_the_last(
    tree: Path, tmp_path: Path
) -> None:
    count = len(load(tree).train)
    options = {"batch_size": count - 1, "schedule": "cosine"}
    config = replace(config_for(tree, "cos_eos", options=options), epochs=2)
    state = train(config, runs=tmp_path, show_progress=False).load_checkpoint()
    assert [row["epoch"] for row in state["progress"]["history"]] == [1, 2]
    assert state["schedule"]["last_epoch"] == 2
    assert state["schedule"]["_last_lr"] == [0.0, 0.0]


def test_run_that_stopped_at_a_lone_last_image_goes_on_to_the_weights_of_one_that_did_not(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": len(load(tree).train) - 1, "checkpoint_seconds": 0.0}
    config = config_for(tree, "cos_eos", options=options)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "smallest_batch", lambda *_: 1)
        patch.setattr(engine, "LOG_EVERY", 1)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            train(config, runs=tmp_path / "stopped", show_progress=False)
    assert Run(tmp_path / "stopped" / config.name).load_checkpoint()["progress"]["step"] == 1
    stopped, whole = (
        train(config, runs=tmp_path / name, show_progress=False).load_checkpoint()
        for name in ("stopped", "whole")
    )
    assert stopped["progress"]["history"] == whole["progress"]["history"]
    for name, values in whole["model"].items():
        assert torch.equal(values, stopped["model"][name]), name


def test_batch_of_which_one_file_can_be_read_is_left_out(tree: Path, tmp_path: Path) -> None:
    data = load(tree)
    (tree / data.train.sample_ids[0]).write_bytes(b"no image")
    assert len(data.train) % 2 == 0
    options = {"batch_size": 2, "on_unreadable": "skip"}
    state = train(
        config_for(tree, "cos_eos", options=options), runs=tmp_path, show_progress=False
    ).load_checkpoint()
    assert state["schedule"]["last_epoch"] == len(data.train) // 2 - 1


def test_batches_that_would_all_be_left_out_are_refused(tree: Path, tmp_path: Path) -> None:
    config = config_for(tree, "cos_eos", options={"batch_size": 1})
    with pytest.raises(ValueError, match=r"a batch of 2 images or more; got batch_size=1"):
        train(config, runs=tmp_path, show_progress=False)


@pytest.fixture
def arguments(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Of a command that must refuse before it trains."""
    for command in (compare_losses, cures, recommend):
        monkeypatch.setattr(command, "train", lambda *_, **__: pytest.fail("trained"))
    return ["--protocol", "folders", "--data", str(tree), "--runs", str(tmp_path / "runs")]


def test_comparison_on_unknowns_is_refused_without_them(
    tree: Path, arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tree / "unknown")
    assert compare_losses.main(arguments) == 1
    assert cures.main([*arguments, "--cure", "scale"]) == 1
    assert caplog.text.count("compares models on unknown classes") == 2


def test_arm_that_needs_more_classes_is_refused_before_the_others_are_trained(
    arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert cures.main([*arguments, "--cure", "scale"]) == 1
    assert "cos_eos, s=adacos: " in caplog.text


def test_recommendation_without_a_known_image_to_judge_with_is_refused_before_any_training(
    tree: Path, arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fill(tree / "negative/sand", 14, (200, 180, 120))
    shutil.rmtree(tree / "known")
    for name in ("known/ant", "known/bee"):
        fill(tree / name, 6, COLORS[name])
    validation = load(tree).validation
    assert max(np.unique(validation.groups[validation.labels >= 0], return_counts=True)[1]) == 2
    assert recommend.main(arguments) == 1
    assert "no known class has the 3 validation images" in caplog.text


# -- what a model of such a tree is judged by --------------------------------------------------------------------------


def untrained(tree: Path, loss: str, runs: Path) -> Run:
    """A run with random weights: what is there and what is refused does not depend on them."""
    config = config_for(tree, loss)
    trainer = Trainer(config, config.load_data(), runs / config.name, show_progress=False)
    with trainer.opened():
        trainer.save()
    return Run(trainer.folder)


def test_without_unknowns_everything_works_and_their_figures_are_absent(
    tree: Path, tmp_path: Path
) -> None:
    shutil.rmtree(tree / "unknown")
    run = untrained(tree, "cos_eos", tmp_path / "runs")
    assert export(run, fpr=0.9, show_progress=False).n > 0
    report = evaluate(run, show_progress=False)
    assert set(report["scores"]["softmax"]) == {"negative"}
    assert set(report["factory"]["realised_fpr"]) == {"negative"}
    assert "no unknowns" in report["notes"][0]
    card = read_card(run.artifact)
    assert (card.class_names, card.feature_dim, card.scale) == (["ant", "bee"], 2, 7.0)
    # A class added later would give every label another meaning.
    fill(tree / "known/aardvark", 9)
    for use in (
        lambda: evaluate(run, show_progress=False),
        lambda: export(run, fpr=0.9, show_progress=False),
        lambda: calibrate(run, device="cpu", precision="float32"),
    ):
        with pytest.raises(ValueError, match="new: aardvark"):
            use()


def test_model_without_negatives_is_evaluated_but_not_exported_before_there_are_some(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    negatives = tree.parent / "negative"
    shutil.move(tree / "negative", negatives)
    shutil.rmtree(tree / "unknown")
    run = untrained(tree, "softmax", tmp_path / "runs")
    report = evaluate(run, show_progress=False)
    assert report["scores"] == {"softmax": {}, "logit": {}}
    assert not (run.folder / "figures/oscr.png").exists()
    print_report(report)
    assert "no foreign images" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no held-out negatives.*tree/negative/"):
        export(run, show_progress=False)
    # The model showed no negatives: those that come later may set its threshold.
    shutil.move(negatives, tree / "negative")
    assert export(run, fpr=0.9, show_progress=False).n > 0
