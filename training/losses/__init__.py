"""All losses of the thesis and what they are made of; the public face is ``build_loss``."""

from training.losses.criterion import OpenSetCriterion, build_loss
from training.losses.table import AS_PUBLISHED, LOSSES, LossSpec, protocol_defaults

__all__ = [
    "AS_PUBLISHED",
    "LOSSES",
    "LossSpec",
    "OpenSetCriterion",
    "build_loss",
    "protocol_defaults",
]
