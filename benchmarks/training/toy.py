"""An epoch of characters: our engine against the plain loop, same network, loss, batch size and number of images."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.training.plain import CHARACTER_TRANSFORM, PictureFiles, PlainLoop
from benchmarks.training.rows import Row, seconds_side_by_side
from training.data import load_protocol
from training.engine import Trainer
from training.precision import has_native_bfloat16
from training.runs import make_config

BATCH_SIZE = 32
_AIMS = {"float32": 1.05, "bfloat16": 1.6}
_COMMAND = "python benchmarks/train.py --only toy"


def measure(folder: Path, *, data: Path | None, images: int, repeats: int) -> list[Row]:
    """Rows of both precisions on the processor.

    Args:
        folder: for the plain loop's PNG files.
        data: root of EMNIST; None takes rendered glyphs.
        images: of the epoch.
        repeats: of each measurement.
    """
    protocol = "glyphs" if data is None else "toy"
    # The small set where it is enough, since the full one takes a while to render.
    size = "full" if images > 2000 else "small"
    loaded = load_protocol(protocol, data=data, size=size)
    chosen = np.random.default_rng(0).permutation(len(loaded.train))[:images]
    loaded = dataclasses.replace(loaded, train=loaded.train.subset(chosen))
    files = []
    for number, pixels in enumerate(loaded.train.images[:, 0].numpy()):
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    samples = PictureFiles(files, loaded.train.labels.tolist(), "L", CHARACTER_TRANSFORM)
    candidates: dict[str, Any] = {}
    for workers in {0, len(os.sched_getaffinity(0))}:
        loop = PlainLoop(
            "lenet_plus_plus", feature_dim=10, num_classes=10, samples=samples, batch_size=BATCH_SIZE,
            workers=workers, device="cpu",
        )  # fmt: skip
        candidates[f"plain, {workers} workers"] = loop.epoch
    precisions = [name for name in _AIMS if name == "float32" or has_native_bfloat16("cpu")]
    for precision in precisions:
        options = {"batch_size": BATCH_SIZE, "precision": precision}
        config = make_config(protocol, "eos", data=data, options=options, device="cpu")
        trainer = Trainer(config, loaded, folder / precision, show_progress=False)
        candidates[precision] = lambda trainer=trainer: _epoch(trainer)
    seconds = seconds_side_by_side(candidates, repeats=repeats)
    plain = min((name for name in seconds if name.startswith("plain")), key=lambda n: seconds[n])
    rows = []
    for precision, aim in _AIMS.items():
        name = f"{protocol} epoch of {len(chosen)} images, CPU, batch {BATCH_SIZE}, {precision}"
        baseline = (
            f"plain PyTorch loop in float32 ({plain.removeprefix('plain, ')}, the faster choice)"
        )
        if precision not in seconds:
            rows.append(
                Row(
                    name, None, "s", baseline, aim=f">= {aim}", command=_COMMAND,
                    note="this processor has no bfloat16 arithmetic; torch emulates it, slower than float32",
                )
            )  # fmt: skip
            continue
        ratio = seconds[plain] / seconds[precision]
        rows.append(
            Row(name, seconds[precision], "s", f"{baseline}: {seconds[plain]:.3f} s", ratio, f">= {aim}", ratio >= aim)
        )  # fmt: skip
    return rows


def _epoch(trainer: Trainer) -> None:
    trainer.progress.step = trainer.progress.sample_count = 0
    trainer.progress.loss_sum = 0.0
    trainer._train_epoch(None)


def grid_row() -> Row:
    """Several small models trained as one."""
    return Row(
        "toy grid (stacked models), GPU", None, "x", "the same plain loop, one model after the other", aim=">= 20",
        note="the stacked trainer is not written",
    )  # fmt: skip
