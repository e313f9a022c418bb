"""All losses of the thesis, ours beyond it and what they are made of; the public face is ``build_loss``."""

from training.losses.criterion import OpenSetCriterion, build_loss
from training.losses.table import (
    AS_PUBLISHED,
    LOSSES,
    THESIS_LOSSES,
    Deviation,
    LossSpec,
    protocol_defaults,
    published_deviations,
)

__all__ = [
    "AS_PUBLISHED",
    "LOSSES",
    "THESIS_LOSSES",
    "Deviation",
    "LossSpec",
    "OpenSetCriterion",
    "build_loss",
    "protocol_defaults",
    "published_deviations",
]
