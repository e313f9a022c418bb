"""What the Makefile runs is what the commands take: each target's command line, expanded, is read by its own parser."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from training.cures import common_options
from training.grid.commands import command
from training.grid.plan import plan
from training.grid.results import Setting, published_setting

ROOT = Path(__file__).parents[2]


def parsed(*words: str) -> tuple[str, argparse.Namespace]:
    """Module and arguments of the Python command that `make words` would run."""
    printed = subprocess.run(
        # A newer installation than the lock: nothing is to be installed, only the command is wanted.
        ["make", "--dry-run", "--assume-old=.venv/installed", *words],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    joined = re.sub(r"\\\n", " ", printed)
    [line] = re.findall(r"^\.venv/bin/python +-m training\..*$", joined, re.MULTILINE)
    _, _, module, *arguments = shlex.split(line)
    return module, importlib.import_module(module).build_parser().parse_args(arguments)


@pytest.mark.parametrize(
    "words",
    [
        ["reproduce"], ["report"], ["cures", "CURE=scale"], ["recommend"], ["train"],
        ["evaluate", "RUN=runs/x", "DIGITS=emnist"], ["shortcut"],
        ["shortcut", "PROTOCOL=toy", "DATA=/data", "DIGITS=mnist", "IMAGE_SIZE=64", "PER_CLASS=50", "WORKERS=1",
         "JSON=a", "FIGURE=b"],
        ["reproduce", "PROTOCOL=p1", "SEEDS=1", "LOSSES=eos,os", "DATA=/data", "EPOCHS=2", "PRESET=modern", "IMAGE_SIZE=64",
         "BUDGET_MINUTES=5", "DEVICE=cpu", "PRECISION=bfloat16", "WORKERS=1", "OPTIONS=scale=adacos compile=true"],
        ["report", "PROTOCOL=toy", "MERGE=other.json"],
        ["compare-losses", "PROTOCOL=folders", "DATA=/data", "EPOCHS=2", "LOSSES=eos", "JSON=a"],
        ["recommend", "PROTOCOL=toy", "SEEDS=1,2,3", "DIGITS=mnist", "DATA=/data"],
        ["train", "PROTOCOL=folders", "DATA=/data", "PRESET=modern", "EPOCHS=20", "OPTIONS=initial_weights=w.pth", "CACHE=none"],
    ],
)  # fmt: skip
def test_target_gives_arguments_that_its_command_takes(words: list[str]) -> None:
    module, _ = parsed(*words)
    names = {"report": "grid_report", "compare-losses": "compare_losses"}
    assert module == f"training.{names.get(words[0], words[0])}"


@pytest.mark.parametrize("words", [["cures", "CURE=arc_os_stress"], ["recommend"]])
def test_arms_take_part_of_the_images_and_classes(words: list[str]) -> None:
    part = [
        "PROTOCOL=p3",
        "DATA=/data",
        "IMAGE_SIZE=64",
        "PER_CLASS=100",
        "ALLOW_MISSING_CLASSES=1",
        "JSON=a",
    ]
    _, arguments = parsed(*words, *part)
    found = (
        arguments.protocol,
        arguments.image_size,
        arguments.per_class,
        arguments.allow_missing_classes,
        arguments.json,
    )
    assert found == ("p3", 64, 100, True, Path("a"))


@pytest.mark.parametrize("words", [["cures", "CURE=preset"], ["recommend"]])
def test_arms_take_the_options_of_training(words: list[str]) -> None:
    _, arguments = parsed(*words, "PROTOCOL=p1", "OPTIONS=batch_size=32 learning_rate=0.01")
    assert common_options(arguments) == {
        "precision": "auto",
        "batch_size": 32,
        "learning_rate": 0.01,
    }


@pytest.mark.parametrize("target", ["reproduce", "report"])
def test_grid_of_own_classes_is_refused_in_a_sentence(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(target, "PROTOCOL=folders")
    assert "no published grid for 'folders'" in capsys.readouterr().err


def test_empty_preset_is_left_to_the_command() -> None:
    _, arguments = parsed("reproduce")
    assert arguments.preset is None
    assert arguments.protocol == "toy"


@pytest.mark.parametrize(
    "setting",
    [
        published_setting("toy"),
        published_setting("p1"),
        Setting("toy", "modern", "emnist", 3, "10/11/11", False),
        Setting("toy", "thesis", "emnist", 15, "10/11/11", False),
        Setting("p3", "thesis", None, 5, "9/9/9", True, (("allow_missing_classes", True), ("image_size", 64))),
        Setting("glyphs", "thesis", None, 3, "10/11/11", True, (("size", "small"),)),
    ],
    ids=lambda setting: setting.title,
)  # fmt: skip
def test_command_of_an_empty_cell_trains_a_cell_of_its_setting(setting: Setting) -> None:
    words = shlex.split(command(setting, "arc_os", seeds=2, options="feature_dim=40").strip("`"))
    module, given = parsed(*[word.replace("$DATA", "/data") for word in words[1:]])
    assert module == "training.reproduce"
    cells = plan(
        given.protocol, seeds=given.seeds, losses=given.losses.split(","), preset=given.preset, epochs=given.epochs,
        digits=given.digits.split(",") if given.digits else None, options=dict(given.option), device="cpu",
    )  # fmt: skip
    expected = {"feature_dim": 40} | dict(setting.data_options)
    if setting.as_published:
        expected["as_published"] = True
    for cell in cells:
        assert (cell.loss, cell.preset, cell.digits, cell.epochs) == (
            "arc_os", setting.preset, setting.digits, setting.epochs,
        )  # fmt: skip
        assert cell.options == expected
    assert len(cells) == 2


# Not a person's choice of a target: set-up, or what make itself knows.
_INNER = {"PY", "PYTHON", "VENV", "COMPOSE", "MAKECMDGOALS", "MAKEFILE_LIST"}


def recipes() -> dict[str, str]:
    """Target -> its recipe, of all that `make help` lists."""
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", (ROOT / "Makefile").read_text()):
        head, _, recipe = block.partition("\n")
        if match := re.match(r"([a-z-]+):.*## ", head):
            found[match.group(1)] = recipe
    return found


@pytest.mark.parametrize("target", sorted(recipes()))
def test_help_names_every_variable_that_a_target_takes(target: str) -> None:
    recipe = recipes()[target].replace("$(chosen-protocol)", "$(PROTOCOL)")
    [shared] = re.findall(r"(?m)^arm-flags = (.*\n.*)$", (ROOT / "Makefile").read_text())
    recipe = recipe.replace("$(arm-flags)", shared)
    recipe = recipe.replace(
        "$(or $(MODEL),none)", ""
    )  # fills a place in compose's file, changes nothing
    taken = set(re.findall(r"call (?:flag|need),([A-Z_]+)", recipe))
    taken |= set(re.findall(r"\$\(([A-Z_]+)\)", recipe))
    helped = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    plain = re.sub(r"\x1b\[\d+m", "", helped)
    [lines] = re.findall(rf"(?m)^  {target} .*\n(?:   .*\n)*", plain)
    assert {name for name in taken - _INNER if not re.search(rf"\b{name}=", lines)} == set()
