"""The label law: 0..C-1 known, ``NEGATIVE`` seen in training without a class, ``UNKNOWN`` test only."""

from __future__ import annotations

from typing import Any

NEGATIVE = -1
UNKNOWN = -2

# "unknown" as an answer to a client; never a class name.
UNKNOWN_LABEL = "unknown"

GROUP_NAMES = {NEGATIVE: "negative", UNKNOWN: "unknown"}


def is_known(labels: Any) -> Any:
    """Elementwise: does the label name a known class? Works on numpy arrays and tensors, (N,)."""
    return labels >= 0


def is_negative(labels: Any) -> Any:
    """Elementwise: is the sample a negative (foreign, seen in training)? (N,)."""
    return labels == NEGATIVE
