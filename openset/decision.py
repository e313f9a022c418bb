"""The rule that decides, once for curves, calibration, evaluation and serving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def accept(scores: Any, tau: Any) -> Any:
    """Accept a sample as known iff its score reaches tau (inclusive); numpy or torch, elementwise.

    A NaN score is never accepted, whatever tau is.
    """
    return scores >= tau


@dataclass(frozen=True, slots=True)
class Decision:
    """One answer: ``predicted_class`` is None when the sample was rejected."""

    is_known: bool
    predicted_class: int | None
    score: float
