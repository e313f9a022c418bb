"""Training speed, each claim against its baseline in one run.

    python benchmarks/train.py [--json FILE] [--markdown FILE] [--quick] [--only toy losses metrics photographs]
                               [--data FOLDER] [--emnist FOLDER] [--device cpu|cuda]

Times are medians of turns taken one after the other. Rows that this machine cannot measure stay empty and name the command
that fills them. ``--data`` is an ImageNet tree (``train/<wnid>/*.JPEG``, ``val/...``; classes may be missing).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import torch

from benchmarks.training import losses, metrics, photographs, toy
from benchmarks.training.rows import Row, content, markdown, say
from training.stacked import ask_for_queues

PARTS = ("toy", "losses", "metrics", "photographs")


def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows asked for, said as they come."""
    rows: list[Row] = []

    def add(more: list[Row]) -> None:
        rows.extend(more)
        for row in more:
            say(row)

    quick, on_gpu = arguments.quick, arguments.device == "cuda"
    if "toy" in arguments.only:
        images, repeats = (640, 1) if quick else (6400, 5)
        add(toy.measure(folder, data=arguments.emnist, images=images, repeats=repeats))
        if on_gpu:
            add(toy.measure_grid(folder, data=arguments.emnist, images=images, repeats=repeats))
        else:
            add([toy.missing_grid()])
    if "losses" in arguments.only:
        repeats = 1 if quick else 9
        add(losses.measure("cpu", compiled=False, repeats=repeats, aim=2.0))
        if on_gpu:
            add(losses.measure("cuda", compiled=True, repeats=repeats, aim=1.5))
        else:
            add([losses.missing("python benchmarks/train.py --only losses --device cuda")])
    if "metrics" in arguments.only:
        size = {"loop_images": 2000, "images": 20_000, "repeats": 1} if quick else {
            "loop_images": 50_000, "images": 1_000_000, "repeats": 5,
        }  # fmt: skip
        add(metrics.measure(**size))
    if "photographs" in arguments.only:
        if arguments.data is not None:
            default = 256 if on_gpu else 16
            plan = photographs.Plan(
                data=arguments.data, folder=folder, device=arguments.device, image_size=arguments.image_size,
                batch_size=arguments.batch_size or default, steps=3 if quick else (30 if on_gpu else 8),
                repeats=1 if quick else 5,
            )  # fmt: skip
            add(photographs.measure(plan))
        if not (on_gpu and arguments.data is not None):
            add(photographs.missing())
    return rows


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
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(content(rows), indent=2, ensure_ascii=False) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
