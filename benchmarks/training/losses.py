"""Head and loss, forward and backward, against a plain matrix product with cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.nn import functional

from benchmarks.training.rows import Row, seconds_side_by_side
from training.losses import LOSSES, build_loss

BATCH, CLASSES = 256, 151
_CALLS = 20  # of each, in a turn: one alone is too short to be timed


class _HeadAndLoss(nn.Module):
    def __init__(self, loss: str) -> None:
        super().__init__()
        self.head, self.criterion = build_loss(
            loss, num_classes=CLASSES, feature_dim=CLASSES, scale=18.0
        )

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = self.criterion(self.head(features), labels)
        return result


def measure(device: str, *, compiled: bool, repeats: int, aim: float) -> list[Row]:
    """One row a loss: how many times the plain baseline it takes.

    The baseline is never compiled: it is the same for both kinds of rows.
    """
    random = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, CLASSES, generator=random).to(device)
    mixed = torch.randint(-1, CLASSES, (BATCH,), generator=random)
    mixed[::3] = -1
    labels = {True: mixed.to(device), False: mixed.clamp(min=0).to(device)}
    linear = nn.Linear(CLASSES, CLASSES, bias=False).to(device)

    def plain() -> None:
        for _ in range(_CALLS):
            leaf = features.detach().requires_grad_()
            linear.weight.grad = None
            functional.cross_entropy(linear(leaf), labels[False]).backward()

    candidates: dict[str, Callable[[], Any]] = {"plain": plain}
    for name, spec in LOSSES.items():
        module = _HeadAndLoss(name).to(device)
        if compiled:
            module.compile(fullgraph=True, dynamic=False)
        candidates[name] = _repeated(module, features, labels[spec.uses_negatives])
    # All modules share one forward, and torch gives up on one that is compiled more than a few times.
    with dynamo_config.patch(recompile_limit=2 * len(LOSSES)):
        seconds = seconds_side_by_side(candidates, repeats=repeats)
    baseline = seconds.pop("plain")
    how = ", compiled" if compiled else ""
    against = f"matrix product and cross-entropy: {baseline / _CALLS * 1e6:.0f} µs"
    return [
        Row(
            f"head + {name}, forward + backward, B={BATCH}, C=K={CLASSES}, {device}{how}",
            value / _CALLS * 1e6, "µs", against, value / baseline, f"<= {aim}", value / baseline <= aim,
        )
        for name, value in seconds.items()
    ]  # fmt: skip


def _repeated(module: _HeadAndLoss, features: Tensor, labels: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_CALLS):
            leaf = features.detach().requires_grad_()
            module.zero_grad(set_to_none=True)
            module(leaf, labels).backward()

    return run


def missing(device: str, *, aim: float) -> Row:
    """The row of compiled losses that were not measured: without a GPU, a compiler or the minutes that compiling takes."""
    return Row(
        f"head + every loss, forward + backward, B={BATCH}, C=K={CLASSES}, {device}, compiled", None, "µs",
        "matrix product and cross-entropy", aim=f"<= {aim}",
        command=f"python benchmarks/train.py --only losses --device {device}",
        note=None if device == "cuda" else "needs g++ and minutes",
    )  # fmt: skip
