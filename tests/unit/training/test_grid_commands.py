"""Commands that train what the grid lacks."""

from __future__ import annotations

from dataclasses import replace

from training.grid.commands import command
from training.grid.results import published_setting


def test_command_for_photographs_names_another_tree_than_that_of_characters() -> None:
    photographs = published_setting("p3")
    assert "DATA=/imagenet" in command(photographs, "eos")
    assert "DATA=$TINY" in command(replace(photographs, classes="15/12/35"), "eos")
    assert "DATA=$DATA" in command(published_setting("toy"), "eos")
