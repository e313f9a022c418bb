"""How long a step of the toy grid takes: one model or several side by side, recorded or not, compiled or not.

    python benchmarks/stacks.py [--device cuda] [--stacks 1 4 8 12] [--steps 400] [--images 90240] [--compiled] [--json FILE]

Each row is the time a step of one model takes while all are at work (LeNet++, cos_eos as published, batches of 32 from as many
images as the toy protocol trains on; pixels and labels are random, which changes no time). The baseline is one model whose
kernels are started one by one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import numpy as np
import torch

from benchmarks.training.rows import Row, Table, wait_for_gpu
from openset.labels import NEGATIVE
from training.characters import CHARACTER_PREPROCESSING
from training.data import ProtocolData, Split, on_device
from training.precision import fast_convolutions
from training.runs import make_config
from training.stacked import StackedTrainer, ask_for_queues

# Before what is timed: three ordinary steps, then one that is recorded, then some that find the caches warm.
_WARM_UP = 10


def random_data(images: int, device: torch.device) -> ProtocolData:
    """As large as the toy protocol's training part, or smaller; a little less than half are negatives."""
    random = np.random.default_rng(0)

    def part(count: int) -> Split:
        pixels = torch.from_numpy(random.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8))
        labels = random.integers(0, 10, count)
        labels[random.random(count) < 0.47] = NEGATIVE
        names = np.array([str(number) for number in range(count)])
        return Split(pixels, labels, np.where(labels < 0, "A", labels.astype(str)), names)

    digits = [str(digit) for digit in range(10)]
    data = ProtocolData(
        "toy", digits, digits, CHARACTER_PREPROCESSING, part(images), part(256), part(10), []
    )
    return replace(data, train=on_device([data.train], device)[0])


def trainers(
    count: int, data: ProtocolData, folder: Path, device: str, *, precision: str, graphs: bool = True, compiled: bool = False,
) -> list[StackedTrainer]:  # fmt: skip
    """Models of their own seeds at the start of an epoch."""
    made = []
    wait_for_gpu()  # the data must be there before another stream looks at them
    for seed in range(count):
        config = make_config(
            "toy", "cos_eos", seed=seed, device=device, data="unread", name=f"{precision}-{graphs}-{compiled}-{seed}",
            options={"precision": precision, "as_published": True, "compile": compiled},
        )  # fmt: skip
        trainer = StackedTrainer(config, data, folder / config.name, graphs=graphs)
        with trainer.on_stream():
            trainer._start_epoch()
        made.append(trainer)
    return made


def take_steps(running: list[StackedTrainer], count: int) -> float:
    """So many steps of each, in turns; seconds."""
    wait_for_gpu()
    started = time.perf_counter()
    left = dict.fromkeys(running, count)
    while left:
        for trainer in list(left):
            with trainer.on_stream():
                if trainer.progress.step == len(trainer._whole_batches):
                    trainer.progress.step = 0
                    trainer._position.zero_()
                trainer._next_step()
            left[trainer] -= 1
            if not left[trainer]:
                del left[trainer]
    wait_for_gpu()
    return time.perf_counter() - started


def measure(
    device: str, *, stacks: list[int], steps: int, images: int, compiled: bool, table: Table
) -> None:
    """All rows."""
    place = torch.device(device)
    data = random_data(images, place)
    with tempfile.TemporaryDirectory() as name, fast_convolutions(place):
        folder = Path(name)

        def step_time(models: list[StackedTrainer]) -> float:
            take_steps(models, _WARM_UP)
            return take_steps(models, steps) / steps / len(models)

        [alone] = trainers(1, data, folder, device, precision="bfloat16", graphs=False)
        baseline = step_time([alone])

        def add(label: str, seconds: float) -> None:
            row = Row(
                f"{label}, {device}", 1e6 * seconds, "µs a step of a model",
                f"one model, bfloat16, not recorded: {1e6 * baseline:.0f}", baseline / seconds,
            )  # fmt: skip
            table.add([row])

        add("1 model, bfloat16, not recorded", baseline)
        for kind in [False, True] if compiled else [False]:
            for precision in ("bfloat16", "float32"):
                models = trainers(
                    max(stacks), data, folder, device, precision=precision, compiled=kind
                )
                for count in stacks:
                    what = "recorded" if place.type == "cuda" else "in turns"
                    label = (
                        f"{count} side by side, {precision}, {what}{', compiled' if kind else ''}"
                    )
                    add(label, step_time(models[:count]))


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--stacks", nargs="+", type=int, default=[1, 4, 8, 12])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=90_240, help="default: the toy protocol's")
    parser.add_argument(
        "--compiled", action="store_true", help="also compiled (half a minute more)"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    ask_for_queues()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine offers no CUDA device to torch")
    if min(arguments.steps, *arguments.stacks) < 1:
        parser.error("--steps and --stacks must be at least 1")
    if arguments.images < 32:
        parser.error(f"--images must be at least 32, one batch, got {arguments.images}")
    measure(
        device, stacks=arguments.stacks, steps=arguments.steps, images=arguments.images,
        compiled=arguments.compiled, table=Table(json=arguments.json),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
