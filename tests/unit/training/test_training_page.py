"""Figures of docs/training.md that the code decides."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from openset.calibration import choose_threshold
from training.arms import CURES, candidates
from training.data import split_validation
from training.grid.thesis_table import switches
from training.losses import THESIS_LOSSES, protocol_defaults
from training.presets import SHARES

PAGE = (Path(__file__).parents[3] / "docs/training.md").read_text()


def test_table_of_what_more_negatives_bring_is_what_the_rule_gives() -> None:
    table = PAGE.split("| calibration negatives | of them may pass")[1].split("\n\n")[0]
    lines = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\.\d{4}) \|$", table, re.MULTILINE)
    assert len(lines) == 4
    for count, passing, expected in lines:
        negatives = np.arange(int(count.replace(",", "")), dtype=np.float32)
        found = choose_threshold(negatives, fpr=0.01, confidence=0.95)
        assert (found.k, f"{found.expected_fpr:.4f}"[1:]) == (int(passing), expected)


def test_shares_of_the_negatives_that_calibrate_are_those_of_the_split() -> None:
    groups = np.repeat("moss", 1000)
    for verify_share, best, percent in ((0.2, False, "12.8 %"), (0.0, False, "16 %"), (0.2, True, "8 %")):  # fmt: skip
        parts = split_validation(groups, verify_share=verify_share, best=best)
        assert (
            f"{len(parts.calibration) / 1000 * 20:g} %" == percent
        )  # a fifth of the images validates
        assert re.search(rf"(?<![\d.]){re.escape(percent)}", PAGE)


def test_cost_of_choosing_and_comparing_own_classes_is_what_is_trained() -> None:
    of_characters = set(SHARES)
    sizes = [
        len(arms)
        for arms in CURES.values()
        if not any(of_characters & set(arm.options) for arm in arms)
    ]
    epochs = protocol_defaults("folders", "eos")["epochs"]
    told = (
        f"`make recommend` trains {len(candidates('folders'))} candidates and `make cures` {min(sizes)} to {max(sizes)} "
        f"variants, each from random weights (no `initial_weights`) and for {epochs} epochs"
    )
    assert told in " ".join(PAGE.split())


def test_what_the_published_code_does_otherwise_is_told_of_the_losses_that_it_concerns() -> None:
    table = PAGE.split("### As published")[1].split("\n## ")[0]
    told: dict[str, set[str]] = {}
    normalized = {loss for loss, spec in THESIS_LOSSES.items() if spec.normalization != "none"}
    for line in table.splitlines():
        cells = line.strip("|").split("|")
        if len(cells) == 3 and (option := re.search(r"`(\w+=\w+)`", cells[2])):
            named = set(re.findall(r"`(\w+)`", cells[1]))
            everyone = normalized if "hard or soft head" in cells[1] else set(THESIS_LOSSES)
            told[option[1]] = everyone - named if cells[1].strip().startswith("all") else named
    assert told.pop("digits=emnist") == set(THESIS_LOSSES)
    done: dict[str, set[str]] = {}
    for loss in THESIS_LOSSES:
        for option, value in switches("toy", loss).items():
            text = value if isinstance(value, str) else str(value).lower()
            done.setdefault(f"{option}={text}", set()).add(loss)
    assert told == done
