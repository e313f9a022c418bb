"""An epoch of characters: our engine against the plain loop, same network, loss, batch size and number of images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.training.plain import CHARACTER_TRANSFORM, PictureFiles, PlainLoop
from benchmarks.training.rows import Row, seconds_side_by_side, wait_for_gpu
from training.data import ProtocolData, load_protocol
from training.engine import Trainer
from training.grid.plan import RANKING
from training.losses import LOSSES
from training.precision import fast_convolutions, has_native_bfloat16
from training.runs import make_config
from training.stacked import StackedTrainer, take_turns

BATCH_SIZE = 32
_AIMS = {"float32": 1.05, "bfloat16": 1.6}
_COMMAND = "python benchmarks/train.py --only toy"
_GRID, _GRID_AIM = "toy grid (stacked models), GPU", 20
_GRID_BASELINE = "the same plain loop, one model after the other"


def measure(folder: Path, *, data: Path | None, images: int, repeats: int) -> list[Row]:
    """Rows of both precisions on the processor.

    Args:
        folder: for the plain loop's PNG files.
        data: root of EMNIST; None takes rendered glyphs.
        images: of the epoch.
        repeats: of each measurement.
    """
    protocol, loaded, samples = _characters(folder, data, images)
    count = len(loaded.train)
    candidates = _plain_loops(samples, "cpu")
    precisions = [name for name in _AIMS if name == "float32" or has_native_bfloat16("cpu")]
    for precision in precisions:
        options = {"batch_size": BATCH_SIZE, "precision": precision}
        config = make_config(protocol, "eos", data=data, options=options, device="cpu")
        trainer = Trainer(config, loaded, folder / precision, show_progress=False)
        candidates[precision] = lambda trainer=trainer: _epoch(trainer)
    seconds = seconds_side_by_side(candidates, repeats=repeats)
    plain = _faster_plain(seconds)
    rows = []
    for precision, aim in _AIMS.items():
        name = f"{protocol} epoch of {count} images, CPU, batch {BATCH_SIZE}, {precision}"
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


def _rewind(trainer: Trainer) -> None:
    trainer.progress.step = trainer.progress.sample_count = 0
    trainer.progress.loss_sum = 0.0


def _epoch(trainer: Trainer) -> None:
    _rewind(trainer)
    trainer._train_epoch(None)


def _characters(
    folder: Path, data: Path | None, images: int
) -> tuple[str, ProtocolData, PictureFiles]:
    """Protocol, its data with so many training images, and these as PNG files."""
    protocol = "glyphs" if data is None else "toy"
    # The small set where it is enough, since the full one takes a while to render.
    size = "full" if images > 2000 else "small"
    loaded = load_protocol(protocol, data=data, size=size)
    chosen = np.random.default_rng(0).permutation(len(loaded.train))[:images]
    loaded = dataclasses.replace(loaded, train=loaded.train.subset(chosen))
    assert isinstance(loaded.train.images, Tensor)
    files = []
    for number, pixels in enumerate(loaded.train.images[:, 0].numpy()):
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    labels = loaded.train.labels.tolist()
    return protocol, loaded, PictureFiles(files, labels, "L", CHARACTER_TRANSFORM)


def _plain_loops(samples: PictureFiles, device: str) -> dict[str, Callable[[], Any]]:
    loops: dict[str, Callable[[], Any]] = {}
    for workers in {0, len(os.sched_getaffinity(0))}:
        loop = PlainLoop(
            "lenet_plus_plus", feature_dim=10, num_classes=10, samples=samples, batch_size=BATCH_SIZE,
            workers=workers, device=device,
        )  # fmt: skip
        loops[f"plain, {workers} workers"] = loop.epoch
    return loops


def _faster_plain(seconds: dict[str, float]) -> str:
    return min((name for name in seconds if name.startswith("plain")), key=lambda n: seconds[n])


def measure_grid(
    folder: Path,
    *,
    data: Path | None,
    images: int,
    repeats: int,
    device: str = "cuda",
    stack: int = 8,
) -> list[Row]:
    """Cells of the grid trained side by side against the plain loop, which trains one after the other.

    Args:
        folder: for the plain loop's PNG files.
        data: root of EMNIST; None takes rendered glyphs.
        images: of the epoch.
        repeats: of each measurement.
        device: of both.
        stack: cells side by side; their losses all see the negatives, as the plain loop's does.
    """
    protocol, loaded, samples = _characters(folder, data, images)
    losses = [loss for loss in RANKING if LOSSES[loss].uses_negatives]
    candidates = _plain_loops(samples, device)
    for precision in _AIMS:
        trainers = []
        for number in range(stack):
            loss, seed = losses[number % len(losses)], 1 + number // len(losses)
            config = make_config(
                protocol, loss, seed=seed, data=data, device=device,
                options={"batch_size": BATCH_SIZE, "precision": precision},
            )  # fmt: skip
            place = folder / precision / str(number)
            trainers.append(StackedTrainer(config, loaded, place))
        candidates[precision] = lambda trainers=trainers: _epoch_side_by_side(trainers)
    wait_for_gpu()
    with fast_convolutions(torch.device(device)):
        seconds = seconds_side_by_side(candidates, repeats=repeats)
    plain = _faster_plain(seconds)
    rows = []
    for precision in _AIMS:
        ratio = stack * seconds[plain] / seconds[precision]
        rows.append(
            Row(
                f"{_GRID}, {protocol}, {stack} cells, batch {BATCH_SIZE}, {precision}",
                stack / seconds[precision], f"epochs of {len(loaded.train)} images/s",
                f"{_GRID_BASELINE} ({plain.removeprefix('plain, ')}, the faster choice): {1 / seconds[plain]:.3f}/s",
                ratio, f">= {_GRID_AIM}", ratio >= _GRID_AIM,
            )
        )  # fmt: skip
    return rows


def _epoch_side_by_side(trainers: list[StackedTrainer]) -> None:
    for trainer in trainers:
        _rewind(trainer)
    running = {trainer: trainer.epoch_steps(None) for trainer in trainers}
    for diverged in take_turns(running):
        if diverged:
            raise RuntimeError(f"the benchmark's training broke down: {diverged}")


def missing_grid() -> Row:
    """Several small models side by side, where there is no GPU."""
    return Row(
        _GRID, None, "x", _GRID_BASELINE, aim=f">= {_GRID_AIM}", command=f"{_COMMAND} --device cuda --emnist $DATA",
    )  # fmt: skip
