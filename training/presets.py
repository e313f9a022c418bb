"""The two ways to train: as published, and today's."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What happens to negative characters, each a share of them.
SHARES = ("turned_negatives", "composed_negatives")


@dataclass(frozen=True)
class Preset:
    """How a model is trained; science reference section 4 (thesis) and section 8.5 (modern).

    ``precision`` of the backbone may be "auto"; a run's configuration holds what that became on its device.
    ``turned_negatives`` is the share of negative characters that are shown turned or mirrored (``training.augmentation``),
    ``composed_negatives`` the share that is replaced by what was made of known ones (``training.composition``).
    """

    learning_rate: float
    batch_size: int
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    ema_decay: float | None = None
    augmentation: str = "thesis"
    normalize_images: bool = False
    precision: str = "float32"
    max_gradient_norm: float | None = None
    turned_negatives: float = 0.0
    composed_negatives: float = 0.0

    def __post_init__(self) -> None:
        optional = ("ema_decay", "max_gradient_norm")
        numbers = ("learning_rate", "momentum", "weight_decay", "warmup_epochs", *SHARES)
        for name in (*numbers, *optional):
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number, at least 0, got {value!r}")
        for name in SHARES:
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share, at most 1, got {getattr(self, name)}")
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size must be a whole number above 0, got {self.batch_size!r}")


PRESETS = {
    "thesis": Preset(learning_rate=1e-3, batch_size=32),
    "modern": Preset(
        learning_rate=0.0625,  # 0.5 per batch of 1,024
        batch_size=128,
        nesterov=True,
        weight_decay=5e-5,
        schedule="cosine",
        warmup_epochs=1.0,
        ema_decay=0.999,
        augmentation="modern",
        normalize_images=True,
        precision="auto",
        max_gradient_norm=5.0,
    ),
}
