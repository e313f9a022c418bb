"""ResNet-50 on real JPEG files: what decoding, cropping and copying cost beside the arithmetic, and what an epoch costs."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.plain import PictureFiles, PlainLoop, photograph_transform
from benchmarks.training.rows import Row, seconds_side_by_side, wait_for_gpu
from training.data import ProtocolData
from training.engine import Trainer
from training.runs import TrainConfig, make_config

# Training images of the protocols (science reference, section 5), for the projection.
_EPOCHS = {"P1": 185_898, "P2": 60_689, "P3": 252_724}
_GPU_COMMAND = "python benchmarks/train.py --only photographs --device cuda --data <ImageNet tree>"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        data: root of an ImageNet tree.
        folder: for caches and runs.
        device: "cpu" or "cuda".
        image_size: side of the input, pixels.
        batch_size: N.
        steps: of each measurement.
        repeats: of each measurement.
    """

    data: Path
    folder: Path
    device: str
    image_size: int
    batch_size: int
    steps: int
    repeats: int


def missing() -> list[Row]:
    """The rows of a GPU that is not there."""
    names = {
        "ResNet-50, GPU, 224 px, real JPEGs in the cache": ("the same step on one resident batch", ">= 0.95"),
        "ResNet-50, GPU, 224 px, cache and bfloat16": ("float32 eager, DataLoader decoding JPEGs", ">= 5"),
        "GPU memory and cost of an epoch of P1, P2, P3": ("", "table"),
    }  # fmt: skip
    return [
        Row(name, None, "images/s", baseline, aim=aim, command=_GPU_COMMAND)
        for name, (baseline, aim) in names.items()
    ]


def _config(plan: Plan, **changes: Any) -> TrainConfig:
    options = {
        "allow_missing_classes": True, "image_size": plan.image_size, "batch_size": plan.batch_size,
        **changes.pop("options", {}),
    }  # fmt: skip
    return make_config(
        "p1", "cos_os", preset="modern", data=plan.data, options=options, device=plan.device,
        cache=plan.folder / "cache", **changes,
    )  # fmt: skip


def _enough(data: ProtocolData, images: int) -> ProtocolData:
    """A small tree's training part several times over; the files then repeat."""
    times = -(-images // len(data.train))
    return dataclasses.replace(
        data, train=data.train.subset(np.tile(np.arange(len(data.train)), times)[:images])
    )


class _Batches:
    """An endless row of training batches."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.batches: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.trainer.progress.epoch += 1
            self.batches = self.trainer._batches()
            batch = next(self.batches)
        return batch


def _steps(trainer: Trainer, batches: Iterator[Any], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            trainer._step(*next(batches))

    return run


def _same(batch: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield batch


def measure(plan: Plan) -> list[Row]:
    """Rows of one device; the trainers stay in training mode and nothing is validated or saved."""
    images = plan.batch_size * plan.steps
    config = _config(plan)
    started = time.perf_counter()
    loaded = config.load_data(("train", "validation"), decoded=True)
    built = time.perf_counter() - started
    data = _enough(loaded, images)
    trainer = Trainer(config, data, plan.folder / "run", show_progress=False)
    trainer.model.train()
    on_gpu = plan.device == "cuda"
    # Before the synthetic batch and the plain loop, which would be counted too, lie on the device.
    peak = _peak_memory(trainer, plan.steps) if on_gpu else 0.0
    size = (plan.batch_size, 3, plan.image_size, plan.image_size)
    synthetic = (
        torch.randint(0, 256, size, dtype=torch.uint8, device=trainer.device),
        torch.randint(-1, len(data.class_ids), (plan.batch_size,), device=trainer.device),
    )
    files = _config(plan, options={"precision": "float32"}).load_data(("train",))
    paths = [Path(path) for path in _enough(files, images).train.images.paths]
    plain = PlainLoop(
        "resnet50", feature_dim=config.feature_dim(len(data.class_ids)), num_classes=len(data.class_ids),
        samples=PictureFiles(
            paths, data.train.labels.tolist(), "RGB", photograph_transform(plan.image_size)
        ),
        batch_size=plan.batch_size, workers=len(os.sched_getaffinity(0)), device=plan.device,
    )  # fmt: skip
    seconds = seconds_side_by_side(
        {
            "cached": _steps(trainer, _Batches(trainer), plan.steps),
            "resident": _steps(trainer, _same(synthetic), plan.steps),
            "plain": plain.epoch,
        },
        repeats=plan.repeats,
    )
    rate = {name: images / value for name, value in seconds.items()}
    what = (
        f"ResNet-50, {plan.device}, {plan.image_size} px, batch {plan.batch_size}, "
        f"{config.training.precision}, {len(loaded.train)} JPEG files"
        + (", repeated" if len(loaded.train) < images else "")
    )
    feeding, whole = rate["cached"] / rate["resident"], rate["cached"] / rate["plain"]
    rows = [
        Row(f"{what}: from the cache", rate["cached"], "images/s",
            f"the same step on one synthetic resident batch: {rate['resident']:.4g}", feeding, ">= 0.95", feeding >= 0.95),
        Row(f"{what}: from the cache", rate["cached"], "images/s",
            f"plain float32 loop, DataLoader decoding the files: {rate['plain']:.4g}", whole,
            ">= 5" if on_gpu else "", whole >= 5 if on_gpu else None),
        Row(f"{what}: opening the cache", built, "s", "", note="decoding included unless it was there"),
    ]  # fmt: skip
    if on_gpu:
        rows += _gpu_rows(plan, trainer, what, rate["cached"], peak)
    return rows


def _peak_memory(trainer: Trainer, count: int) -> float:
    """What the device's memory holds at most in so many steps from the cache, the cache included, GB."""
    torch.cuda.reset_peak_memory_stats()
    _steps(trainer, _Batches(trainer), count)()
    wait_for_gpu()
    return torch.cuda.max_memory_allocated() / 1e9


def _gpu_rows(plan: Plan, trainer: Trainer, what: str, rate: float, peak: float) -> list[Row]:
    batches = _Batches(trainer)
    next(batches)
    wait_for_gpu()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        _steps(trainer, batches, min(plan.steps - 1, 10))()
        torch.cuda.set_sync_debug_mode("default")
    rows = [
        Row(f"{what}: times the host waits for the device in 10 steps", len(waits), "", "", None, "0", not waits),
        Row(f"{what}: GPU memory at its peak, cache included", peak, "GB", ""),
    ]  # fmt: skip
    for protocol, images in _EPOCHS.items():
        rows.append(
            Row(f"{what}: an epoch of {protocol}", images / rate / 60, "min", f"projected from {images:,} training images")
        )  # fmt: skip
    return rows
