"""Training speed, each claim against its baseline in one run.

    python benchmarks/train.py [--json FILE] [--markdown FILE] [--quick] [--only toy losses metrics photographs]
                               [--data FOLDER] [--emnist FOLDER] [--device cpu|cuda]

Times are medians of turns taken one after the other. Files are written anew after every group of rows; a Markdown page with the
lines ``<!-- table begins -->`` and ``<!-- table ends -->`` keeps what stands around them. Rows that this machine cannot measure
stay empty and name the command that fills them. ``--data`` is an ImageNet tree (``train/<wnid>/*.JPEG``, ``val/...``; classes
may be missing).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import torch

from benchmarks.training import losses, metrics, photographs, toy
from benchmarks.training.rows import Row, Table
from training.stacked import ask_for_queues

PARTS = ("toy", "losses", "metrics", "photographs")


def measure(arguments: argparse.Namespace, folder: Path, add: Callable[[list[Row]], None]) -> None:
    """All rows asked for, handed over as they come."""
    quick, on_gpu = arguments.quick, arguments.device == "cuda"
    if "toy" in arguments.only:
        images, repeats = (640, 1) if quick else (6400, 5)
        add(toy.measure(folder, data=arguments.emnist, images=images, repeats=repeats))
        if on_gpu:
            add(toy.measure_grid(folder, data=arguments.emnist, images=images, repeats=repeats))
        else:
            add([toy.missing_grid()])
    if "losses" in arguments.only:
        repeats = 1 if quick else 31  # turns are short, and a disturbance lasts for some
        add(losses.measure("cpu", compiled=False, repeats=repeats, aim=2.0))
        if quick or not shutil.which("g++"):
            add([losses.missing("cpu", aim=2.0)])
        else:
            add(losses.measure("cpu", compiled=True, repeats=repeats, aim=2.0))
        if on_gpu:
            add(losses.measure("cuda", compiled=True, repeats=repeats, aim=1.5))
        else:
            add([losses.missing("cuda", aim=1.5)])
    if "metrics" in arguments.only:
        size = {"loop_images": 2000, "images": 20_000, "repeats": 1} if quick else {
            "loop_images": 50_000, "images": 1_000_000, "repeats": 5,
        }  # fmt: skip
        add(metrics.measure(**size))
    if "photographs" in arguments.only:
        if arguments.data is not None:
            default = 256 if on_gpu else 16
            steps, repeats = (30, 5) if on_gpu else (2, 3)  # a step takes seconds on a few cores
            plan = photographs.Plan(
                data=arguments.data, folder=folder, device=arguments.device, image_size=arguments.image_size,
                batch_size=arguments.batch_size or default, steps=3 if quick else steps,
                repeats=1 if quick else repeats,
            )  # fmt: skip
            add(photographs.measure(plan))
        if not (on_gpu and arguments.data is not None):
            add(photographs.missing())


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--data", type=Path, help="ImageNet tree; without it no photograph is measured"
    )
    parser.add_argument(
        "--emnist", type=Path, help="root of EMNIST; without it glyphs are trained on"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--batch-size", type=int, help="of photographs; default 256 on a GPU, else 16"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn: does it run?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    ask_for_queues()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine offers no CUDA device to torch")
    table = Table(json=arguments.json, markdown=arguments.markdown)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder), table.add)
    return 0


if __name__ == "__main__":
    sys.exit(main())
