"""The rule that decides, once for curves, calibration, evaluation and serving."""

from __future__ import annotations

from typing import Any

# What is promised where nobody says otherwise: at most this share of foreign images accepted, with this confidence.
DEFAULT_FPR = 1e-2
DEFAULT_CONFIDENCE = 0.95


def accept(scores: Any, tau: Any) -> Any:
    """Accept a sample as known iff its score reaches tau (inclusive); numpy or torch, elementwise.

    A NaN score is never accepted, whatever tau is.
    """
    return scores >= tau
