"""All losses of the thesis, ours beyond it and what they are made of; the public face is ``build_loss``."""

from training.losses.criterion import OpenSetCriterion, build_loss
from training.losses.table import (
    AS_PUBLISHED,
    LOSSES,
    THESIS_LOSSES,
    LossSpec,
    protocol_defaults,
)

__all__ = [
    "AS_PUBLISHED",
    "LOSSES",
    "THESIS_LOSSES",
    "LossSpec",
    "OpenSetCriterion",
    "build_loss",
    "protocol_defaults",
]
