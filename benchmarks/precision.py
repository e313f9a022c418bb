"""Which precision trains faster here: one ResNet-50 step in float32 and in bfloat16 autocast, side by side.

``python benchmarks/precision.py [--json FILE]``. Both are measured in one run, the medians
are printed; the faster is compared with what ``precision=auto`` takes on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import torch

from openset.networks import build_network
from training.precision import resolve_precision

PRECISIONS = ("float32", "bfloat16")


def step_seconds(
    device: str,
    precision: str,
    *,
    batch_size: int,
    image_size: int,
    network: str = "resnet50",
    channels: int = 3,
) -> Iterator[float]:
    """Seconds of a forward, backward and update of random images, step after step without end."""
    torch.manual_seed(0)
    model = build_network(network, feature_dim=116).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.rand(batch_size, channels, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    while True:
        started = time.perf_counter()
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"
        ):
            features = model(images)
        features.float().logsumexp(dim=1).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    medians = {
        precision: statistics.median(
            islice(
                step_seconds(
                    arguments.device,
                    precision,
                    batch_size=arguments.batch_size,
                    image_size=arguments.image_size,
                ),
                1,  # warms up
                arguments.repeats + 1,
            )
        )
        for precision in PRECISIONS
    }
    chosen = resolve_precision("auto", arguments.device)
    faster = min(medians, key=lambda name: medians[name])
    rows: list[dict[str, Any]] = [
        {
            "name": f"resnet50 step, {precision}, batch {arguments.batch_size}, {arguments.image_size} px",
            "value": round(seconds, 4),
            "unit": "s",
            "baseline": "float32",
            "ratio": round(medians["float32"] / seconds, 3),
            "aim": "auto takes the faster",
            "met": faster == chosen if precision == chosen else None,
        }
        for precision, seconds in medians.items()
    ]
    for row in rows:
        print(
            f"{row['name']:48} {row['value']:9.3f} s  {row['ratio']:6.2f}x of float32's speed"
            f"{'   <- auto' if chosen in row['name'] else ''}"
        )
    if arguments.json:
        content = {
            "device": arguments.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
