"""The figures of a trained cell."""

from __future__ import annotations

import numpy as np

from tests.grid_runs import scored
from training.grid.cell_evaluation import float32_probabilities
from training.scoring import Scored


def test_published_score_ties_where_the_log_odds_do_not() -> None:
    sample = scored(5.0, 1)
    logits = np.zeros_like(sample.logits)
    logits[:, 0] = np.linspace(20, 40, len(logits), dtype=np.float32)
    saturated = Scored(**{**vars(sample), "logits": logits})
    values = float32_probabilities(saturated)
    assert values.dtype == np.float32
    assert len(np.unique(values)) < len(values) / 2
    assert values.max() == 1.0
