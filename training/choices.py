"""What a command line offers: names and places, without the modules behind them.

Those import torch, which takes seconds; a mistaken argument is answered before. A test holds each list against its table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.protocols import PUBLISHED

PRECISIONS = ("auto", "float32", "bfloat16")
RULES = ("inclusive", "strict")
DIGITS = ("mnist", "emnist")
LOSSES = (
    "arc_bg", "arc_bg_sfn", "arc_eos", "arc_eos_sfn", "arc_os", "arc_os_nonsym", "arcface", "bg", "cos_bg", "cos_bg_sfn",
    "cos_eos", "cos_eos_sfn", "cos_os", "cos_os_nonsym", "cosface", "eos", "norm_bg", "norm_eos", "norm_os", "os",
    "sfn_arcface", "sfn_cosface", "sfn_norm", "sm_softmax", "softmax", "sphereface",
)  # fmt: skip

RUNS = Path("runs")
GRID_RUNS = RUNS / "reproduce"
RESULTS = Path("docs/results")
IMAGE_CACHE = Path(".cache") / "images"


def published_protocol(name: str) -> str:
    """A protocol on the command line that has a grid.

    Raises:
        argparse.ArgumentTypeError: none of that name.
    """
    if name not in PUBLISHED:
        raise argparse.ArgumentTypeError(
            f"there is no published grid for {name!r}, only for {', '.join(PUBLISHED)}; own classes are judged one run at "
            "a time (make train, make evaluate)"
        )
    return name


def seed_list(text: str) -> list[int]:
    """Seeds on the command line: ``1,2,3``, ``2-3``, or both; ``3`` is that one alone.

    Raises:
        argparse.ArgumentTypeError: none of these.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            named = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            named = range(0)
        if not named:
            raise argparse.ArgumentTypeError(f"expected seeds (1,2,3 or 2-3), got {text!r}")
        seeds += named
    return list(dict.fromkeys(seeds))


def seed_count_or_list(text: str) -> list[int]:
    """The same from 1 on, but a number alone is how many: ``3`` for 1, 2 and 3.

    Raises:
        argparse.ArgumentTypeError: neither, or a seed below 1.
    """
    seeds = list(range(1, int(text) + 1)) if text.isdecimal() else seed_list(text)
    if not seeds or min(seeds) < 1:
        raise argparse.ArgumentTypeError(
            f"expected how many seeds (3: the seeds 1, 2 and 3) or which, from 1 on (1,3 or 2-3), got {text!r}"
        )
    return seeds
