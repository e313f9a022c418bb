"""The grid from end to end: trained, interrupted, resumed, gathered, reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.factories import emnist_files
from training import grid_report, reproduce
from training.grid import pages
from training.grid.rows import read_rows
from training.losses.criterion import OpenSetCriterion
from training.protocols import get_protocol
from training.runs import Run

# Of ten images a class eight are for training: 80 digits and 88 letters in batches of 32; softmax sees the digits alone.
STEPS = {"cos_eos": 6, "softmax": 3}


class StepCounter:
    """Counts training steps, and sends this process a signal in the middle of one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.signals = 0, {}
        original = OpenSetCriterion.forward

        def forward(criterion, output, labels):
            self.steps += 1
            if self.steps in self.signals:
                os.kill(os.getpid(), self.signals.pop(self.steps))
            return original(criterion, output, labels)

        monkeypatch.setattr(OpenSetCriterion, "forward", forward)


def command(root: Path, *more: str) -> int:
    arguments = [
        "--protocol", "toy", "--data", str(root / "data"), "--digits", "emnist", "--losses", "cos_eos,softmax",
        "--seeds", "1", "--epochs", "1", "--runs", str(root / "runs"), "--results", str(root / "results"), "--quiet",
    ]  # fmt: skip
    return reproduce.main([*arguments, *more])


def test_grid_is_interrupted_resumed_gathered_and_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    counter = StepCounter(monkeypatch)
    emnist_files(tmp_path / "data")
    file = tmp_path / "results/toy.json"

    # Ctrl-C in the first cell.
    counter.signals = {3: signal.SIGINT}
    assert command(tmp_path) == 130
    assert read_rows(file) == []

    # The first cell goes on and gets its rows; in the second the budget's clock rings.
    counter.signals = {STEPS["cos_eos"] + 2: signal.SIGALRM}
    assert command(tmp_path, "--budget-minutes", "60") == 0
    assert (
        "1 trained, 0 were there, 0 diverged, 0 failed, 1 left; the same command goes on"
        in caplog.text
    )
    assert {row["loss"] for row in read_rows(file)} == {"cos_eos"}

    # The second goes on; nothing is trained twice but the steps that were broken off.
    assert command(tmp_path) == 0
    assert sum(STEPS.values()) <= counter.steps <= sum(STEPS.values()) + 2
    rows = read_rows(file)
    in_float32 = ("negatives", "unknowns")
    assert {(row["loss"], row["group"], row["score"]) for row in rows} == {
        (loss, group, score)
        for loss in STEPS
        for group in (*in_float32, "unknowns_other_digits", "validation_negatives")
        for score in ("softmax", "logit", "softmax_float32")
        if score != "softmax_float32" or group in in_float32
    }
    for loss in STEPS:
        assert len(list((tmp_path / "runs").glob(f"*-{loss}-*/figures/false_positives.png"))) == 1

    # The report comes again from the stored scores; nothing is trained for it.
    page = file.with_suffix(".md")
    text = page.read_text()
    page.unlink()
    done = counter.steps
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert grid_report.main(folders) == 0
    assert page.read_text() == text
    assert counter.steps == done
    # One epoch of fifteen, EMNIST's digits: beside the published values stands nothing.
    assert "| `cos_eos` |  | .9849 |  | .9919 |" in text
    assert "| `cos_eos` | 1 |" in text

    # Rows of another machine count as done and stand in the report, without their scores.
    foreign = [row | {"seed": 2, "run": "elsewhere"} for row in rows]
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"rows": [*rows, *foreign]}))
    assert command(tmp_path, "--seeds", "2") == 0
    assert counter.steps == done
    assert len(read_rows(file)) == 2 * len(rows)
    assert "| `cos_eos` | 2 |" in page.read_text()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_stacked_cells_stop_and_go_on_together_and_get_the_rows_of_single_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    counter = StepCounter(monkeypatch)
    emnist_files(tmp_path / "data")

    # The budget's clock rings in the first round of steps, Ctrl-C comes in the third, softmax' last.
    counter.signals = {1: signal.SIGALRM, 5: signal.SIGINT}
    assert command(tmp_path, "--stack", "2", "--budget-minutes", "60") == 0
    assert "0 diverged, 0 failed, 2 left; the same command goes on" in caplog.text
    assert command(tmp_path, "--stack", "2") == 130
    file = tmp_path / "results/toy.json"
    assert read_rows(file) == []
    steps = {
        Run(folder).config.loss: Run(folder).load_checkpoint()["progress"]["step"]
        for folder in (tmp_path / "runs").iterdir()
    }
    assert steps == {"cos_eos": 3, "softmax": 3}

    assert command(tmp_path, "--stack", "2") == 0
    assert counter.steps == sum(STEPS.values())
    stacked = read_rows(file)
    shutil.rmtree(tmp_path / "runs")
    file.unlink()
    assert command(tmp_path) == 0
    assert {row["loss"] for row in stacked} == STEPS.keys()
    for one, other in zip(stacked, read_rows(file), strict=True):
        assert one | {"evaluated": None} == other | {"evaluated": None}


def test_diverged_cells_of_a_stack_get_rows_that_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages.drawing, "draw_all", lambda *_: {})
    emnist_files(tmp_path / "data")
    assert command(tmp_path, "--stack", "2", "--option", "learning_rate=1e30") == 1
    rows = read_rows(tmp_path / "results/toy.json")
    assert {row["loss"] for row in rows} == STEPS.keys()
    assert all("the loss is" in row["diverged"] for row in rows)


def photographs(root: Path, classes: dict[str, tuple[int, int]]) -> Path:
    """An ImageNet-like tree: for each class so many training and test images of 40x32 pixels."""
    random = np.random.default_rng(0)
    for wnid, counts in classes.items():
        for part, count in zip(("train", "val"), counts, strict=True):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{index}.JPEG")
    return root


@pytest.mark.parametrize(
    ("name", "table", "published", "classes"),
    [
        ("p1", "6.2 (a)", ".1803", "116/67/166"),
        ("p2", "6.2 (b)", ".0573", "30/31/55"),
        ("p2", "6.2 (b)", ".0573", "4/3/2"),
        ("p3", "6.2 (c)", "–", "151/97/164"),
    ],
)
def test_imagenet_protocol_runs_on_all_its_classes_and_on_some(
    tmp_path: Path, name: str, table: str, published: str, classes: str
) -> None:
    protocol = get_protocol(name)
    restricted = classes == "4/3/2"
    known, negative, unknown = protocol.known, protocol.negative, protocol.unknown
    if restricted:
        known, negative, unknown = known[:4], negative[:3], unknown[:2]
    counts = dict.fromkeys([*known, *negative], (5, 1)) | dict.fromkeys(unknown, (0, 1))
    data = photographs(tmp_path / "tree", counts)
    arguments = [
        "--protocol", name, "--losses", "cos_os", "--seeds", "1", "--epochs", "1", "--data", str(data),
        "--image-size", "32", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--quiet",
    ]  # fmt: skip
    assert reproduce.main(arguments) == int(restricted)
    if restricted:
        assert reproduce.main([*arguments, "--option", "allow_missing_classes=true"]) == 0
    rows = read_rows(tmp_path / f"results/{name}.json")
    assert {row["classes"] for row in rows} == {classes}
    text = (tmp_path / f"results/{name}.md").read_text()
    lines = text.split(f"## The thesis' table {table} and ours")[1].splitlines()
    # Nothing of this stands beside a published value: one epoch of 120, small images, and where restricted fewer classes.
    [line] = [line for line in lines if line.startswith("| `cos_os` |")]
    assert line.startswith(f"| `cos_os` |  | {published} |  |")
    assert ("restricted to 4/3/2" in text) == restricted
    assert "1 of 120 epochs" in text
