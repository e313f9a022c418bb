"""Help and mistaken arguments are answered at once: torch, which takes seconds to import, is not needed for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from openset import metrics
from training import choices
from training.losses import LOSSES

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "training.train", "training.evaluate", "training.export", "training.calibrate", "training.reproduce",
    "training.grid_report", "training.shortcut",
    "serving.archive", "serving.serve", "serving.stack", "serving.demo", "api.client.__main__",
)  # fmt: skip
HEAVY = ("torch", "torchvision", "scipy", "sklearn", "matplotlib", "tensorboard")

PROGRAM = f"""
import importlib, sys
module, *arguments = sys.argv[1:]
try:
    importlib.import_module(module).main(arguments)
except SystemExit as end:
    print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
    sys.exit(end.code)
"""


def answered(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_help_and_mistakes_need_nothing_heavy(module: str) -> None:
    helped = answered(module, "--help")
    assert (helped.returncode, helped.stdout.splitlines()[-1]) == (0, "loaded:"), helped.stderr
    mistaken = answered(module, "--nonsense")
    assert (mistaken.returncode, mistaken.stdout) == (2, "loaded:\n"), mistaken.stderr
    assert "error:" in mistaken.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--protocol", "nonsense", "--loss", "eos"], "invalid choice: 'nonsense'"),
        (["--protocol", "glyphs", "--loss", "nonsense"], "invalid choice: 'nonsense'"),
        (["--loss", "eos"], "required: --protocol"),
        (["--protocol", "glyphs", "--loss", "eos", "--option", "nonsense"], "expected key=value"),
    ],
)
def test_mistake_in_training_is_named_without_torch(arguments: list[str], said: str) -> None:
    done = answered("training.train", *arguments)
    assert (done.returncode, done.stdout) == (2, "loaded:\n")
    assert said in done.stderr


def test_choices_are_those_of_their_tables() -> None:
    assert sorted(LOSSES) == list(choices.LOSSES)
    assert choices.RULES == metrics.RULES
