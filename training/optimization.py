"""Optimizer, learning rate and averaged weights of a preset; nothing here makes the host wait for the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.presets import Preset


def build_optimizer(model: nn.Module, preset: Preset) -> torch.optim.SGD:
    """SGD as one fused operation over all parameters."""
    return torch.optim.SGD(
        _parameter_groups(model, preset.weight_decay),
        lr=preset.learning_rate,
        momentum=preset.momentum,
        nesterov=preset.nesterov,
        fused=True,
    )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on weights alone: not on norms, biases, activations or centers."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or name.startswith("head.") else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def learning_rate_factor(
    preset: Preset, epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Share of the preset's learning rate at each step.

    Raises:
        ValueError: no such schedule.
    """
    warmup, total = preset.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if preset.schedule not in ("constant", "cosine"):
        raise ValueError(f'schedule must be "constant" or "cosine", got {preset.schedule!r}')

    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if preset.schedule == "constant":
            return ramp
        return ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(total, 1))))

    return factor


class AveragedWeights:
    """Exponential average of weights and running statistics.

    Its memory grows with the number of updates, so that short runs are not held back. The count lives on the host:
    torch's ``AveragedModel`` keeps it on the device and asks for it at every update.

    Args:
        model: a copy of it is averaged, in ``module``.
        decay: the memory's limit, e.g. 0.999.
    """

    def __init__(self, model: nn.ModuleDict, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.count = 0
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = [own for own, _ in pairs if own.is_floating_point()]
        self._current = [source for own, source in pairs if own.is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        if self.count:
            decay = min(self.decay, (1.0 + self.count) / (10.0 + self.count))
            get_ema_multi_avg_fn(decay)(self._averaged, self._current, None)
        else:
            for own, source in zip(self._averaged, self._current, strict=True):
                own.copy_(source)
        for own, source in self._counters:
            own.copy_(source)
        self.count += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
