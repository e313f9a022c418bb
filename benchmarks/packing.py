"""What packing a backbone for a CPU gains: ``python benchmarks/packing.py [--json FILE]``.

Images per second of the network as it is (bfloat16 by autocast) and packed (``openset.packing``) with random weights, in turn,
for every number of threads and of images; medians. ``--compiled`` adds torch.compile with frozen weights (needs a compiler).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import torch
from torch import Tensor, nn

from benchmarks.serving.report import Report, say
from openset.compilation import compile_backbone
from openset.networks import build_network
from openset.packing import can_pack, packed_backbone

# Shape of an image, (channels, H, W).
SHAPES = {"resnet50": (3, 224, 224), "lenet_plus_plus": (1, 28, 28)}

Backbone = Callable[[Tensor], Tensor]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--threads", nargs="+", type=int, help="default: all cores, and half of them")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    cores = torch.get_num_threads()
    threads = arguments.threads or sorted({cores, max(1, cores // 2)}, reverse=True)
    report = Report(arguments.json)
    for network in arguments.networks:
        for precision in ("float32", "bfloat16"):
            if not can_pack(precision):
                say(f"{precision} is not packed on this processor")
                continue
            backbones = backbones_of(network, precision, compiled=arguments.compiled)
            for count in threads:
                for batch in arguments.batches:
                    torch.set_num_threads(count)
                    seconds = in_turn(backbones, (batch, *SHAPES[network]), arguments.repeats)
                    torch.set_num_threads(cores)
                    rates = {name: batch / taken for name, taken in seconds.items()}
                    eager = rates.pop("eager")
                    what = f"{network}, {precision}, {count} threads, batch {batch}"
                    for name, rate in rates.items():
                        report.ratio(f"{what}, {name}", rate, "images/s", eager, "eager", at_least=None)  # fmt: skip
    return 0


@torch.inference_mode()
def backbones_of(name: str, precision: str, *, compiled: bool) -> dict[str, Backbone]:
    """By how it is computed; the same weights."""
    torch.manual_seed(0)
    network = build_network(name, feature_dim=116).eval().to(memory_format=torch.channels_last)
    backbones = {
        "eager": as_it_is(network, precision),
        "packed": packed_backbone(network, torch.zeros(1, *SHAPES[name]), precision),
    }
    if compiled:
        backbones["compiled"] = as_it_is(compile_backbone(network, torch.device("cpu")), precision)
    return backbones


def as_it_is(network: nn.Module, precision: str) -> Backbone:
    """The network as ``openset.classifier`` calls one that is not packed."""

    def features(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            computed: Tensor = network(images)
        return computed.float()

    return features


@torch.inference_mode()
def in_turn(
    backbones: dict[str, Backbone], shape: tuple[int, ...], repeats: int
) -> dict[str, float]:
    """Median seconds of each; the first call, which may compile, is left out."""
    images = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {name: [] for name in backbones}
    for turn in range(repeats + 1):
        for name, backbone in backbones.items():
            started = time.perf_counter()
            backbone(images)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
