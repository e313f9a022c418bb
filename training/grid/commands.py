"""The commands that train what the grid lacks."""

from __future__ import annotations

from training.grid.plan import default_epochs
from training.grid.results import Setting, option_text
from training.protocols import get_protocol

SEEDS = (1, 2, 3)  # that a mean should be of


def command(setting: Setting, losses: str = "", *, seeds: int | str = 1, options: str = "") -> str:
    """The command that trains cells of a setting; without losses all of the thesis'. A number of seeds, or which."""
    parts = [f"make reproduce PROTOCOL={setting.protocol}"]
    parts += [f"LOSSES={losses}"] if losses else []
    parts.append(f"SEEDS={seeds}")
    if setting.digits:
        parts.append(f"DIGITS={setting.digits}")
    if setting.epochs != default_epochs(setting.protocol):
        parts.append(f"EPOCHS={setting.epochs}")
    if setting.preset != "thesis":
        parts.append(f"PRESET={setting.preset}")
    elif not setting.as_published:
        options = f"as_published=false {options}".strip()
    options = " ".join([options, *(option_text(*pair) for pair in setting.data_options)]).strip()
    if get_protocol(setting.protocol).is_of_characters:
        parts += ["DATA=$DATA"] * (setting.protocol != "glyphs")
    else:
        parts.append("DATA=/imagenet" if setting.is_complete else "DATA=$TINY")
    if options:
        parts.append(f'OPTIONS="{options}"' if " " in options else f"OPTIONS={options}")
    return f"`{' '.join(parts)}`"
