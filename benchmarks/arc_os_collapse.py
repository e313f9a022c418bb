"""Does the margin of Arc-OS shrink the magnitudes of knowns under P1's numbers, and which cure stops it?

``python benchmarks/arc_os_collapse.py [--noise X] [--seeds N ...] [--json FILE]``. A small multilayer network on overlapping
Gaussian clusters stands in for ResNet-50 on photographs; the numbers of the loss are P1's: C = K = 116 knowns, 67 negative
clusters, N / N_k = 1.6, s = xi = 17, lambda = .01, margin .5, SGD as in the thesis preset, with P1's steps per epoch to count by.
A simulation: it shows the mechanism, not what the photographs do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import torch
from torch import Tensor, nn

from openset.labels import NEGATIVE, is_known
from training.losses import build_loss

CLASSES, NEGATIVE_CLASSES, KNOWN_SHARE = 116, 67, 1 / 1.6
INPUTS, WIDTH, BATCH = 64, 256, 32
P1_STEPS_PER_EPOCH = math.ceil(185_898 / BATCH)

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "norm_os": ("norm_os", {}),
    "cos_os": ("cos_os", {}),
    "arc_os": ("arc_os", {}),
    "arc_os, cce_mean=known": ("arc_os", {"cce_mean": "known"}),
    "arc_os, detach_radial": ("arc_os", {"detach_radial": True}),
    "arc_os, lambda above bound": ("arc_os", {"magnitude_weight": "above_bound"}),
    "arc_os, margin warm-up": ("arc_os", {"margin_warmup_epochs": 1}),
    "arc_os, known, detach_radial": ("arc_os", {"cce_mean": "known", "detach_radial": True}),
    "arc_os, known, clipped gradient": ("arc_os", {"cce_mean": "known", "max_gradient_norm": 5.0}),
}


class Clusters:
    """Gaussian clusters around random points on a sphere; ``noise`` sets how far they overlap, ``draws`` seeds the samples."""

    def __init__(self, noise: float, seed: int, *, draws: int) -> None:
        placing = torch.Generator().manual_seed(seed)
        self.random = torch.Generator().manual_seed(draws)
        points = torch.randn(CLASSES + NEGATIVE_CLASSES, INPUTS, generator=placing)
        self.points = nn.functional.normalize(points, dim=1)
        self.noise = noise

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs, (count, 64), and labels, NEGATIVE for the negative clusters."""
        known = torch.rand(count, generator=self.random) < KNOWN_SHARE
        labels = torch.randint(CLASSES, (count,), generator=self.random)
        foreign = torch.randint(NEGATIVE_CLASSES, (count,), generator=self.random) + CLASSES
        cluster = torch.where(known, labels, foreign)
        noise = torch.randn(count, INPUTS, generator=self.random) * self.noise
        return self.points[cluster] + noise, torch.where(known, labels, NEGATIVE)


def train_arm(
    loss: str, options: dict[str, Any], *, steps: int, noise: float, seed: int, measure_every: int
) -> list[dict[str, float]]:
    """Train one arm; at every measurement the share right and the mean magnitudes of fresh samples.

    ``max_gradient_norm`` among the options is the preset's, to which gradients are clipped; ``clipped`` counts the steps in
    which that changed something.
    """
    options = dict(options)
    limit = options.pop("max_gradient_norm", math.inf)
    clipped = 0
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False),
    )  # fmt: skip
    head, criterion = build_loss(
        loss, num_classes=CLASSES, feature_dim=CLASSES, scale=17.0, **options
    )
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    training = Clusters(noise, seed, draws=2 * seed + 1)
    fresh = Clusters(noise, seed, draws=2 * seed + 2)
    inputs, labels = fresh.draw(4000)
    rows = []
    for step in range(1, steps + 1):
        # Warm-up grows step by step here, since a simulation is shorter than its epochs.
        criterion.set_epoch(step / P1_STEPS_PER_EPOCH)
        batch, batch_labels = training.draw(BATCH)
        value = criterion(head(network(batch)), batch_labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        clipped += int(nn.utils.clip_grad_norm_(parameters, limit) > limit)
        optimizer.step()
        if step % measure_every == 0:
            network.eval()
            with torch.no_grad():
                output = head(network(inputs))
            network.train()
            known = is_known(labels)
            lengths = output.features.norm(dim=1)
            right = output.logits.argmax(dim=1) == labels
            rows.append(
                {
                    "step": step,
                    "accuracy": float(right[known].float().mean()),
                    "known_magnitude": float(lengths[known].mean()),
                    "negative_magnitude": float(lengths[~known].mean()),
                    "clipped": clipped,
                }
            )
            if not math.isfinite(value.item()):
                break
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train every arm with every seed, print the last measurement of each, write all to JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=P1_STEPS_PER_EPOCH)
    parser.add_argument(
        "--noise",
        type=float,
        default=0.25,
        help="how far clusters overlap, so how hard the task is",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    print(
        f"{'arm':32} {'seed':>4} {'accuracy':>9} {'|known|':>9} {'|negative|':>11}   (aim of |known|: 17)"
    )
    measured: dict[str, dict[int, list[dict[str, float]]]] = {}
    for seed in arguments.seeds:
        for name in arguments.arms:
            loss, options = ARMS[name]
            rows = train_arm(
                loss, options, steps=arguments.steps, noise=arguments.noise, seed=seed,
                measure_every=max(1, arguments.steps // 10),
            )  # fmt: skip
            measured.setdefault(name, {})[seed] = rows
            print(
                f"{name:32} {seed:4} {rows[-1]['accuracy']:9.4f} {rows[-1]['known_magnitude']:9.2f} "
                f"{rows[-1]['negative_magnitude']:11.2f}",
                flush=True,
            )
    if arguments.json:
        content = {
            "steps": arguments.steps, "noise": arguments.noise, "torch": torch.__version__, "arms": measured,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
