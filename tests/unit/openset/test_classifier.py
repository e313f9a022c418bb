"""What a classifier does to its process: nothing that outlives a prediction."""

from __future__ import annotations

import pytest
import torch

from openset.classifier import exact_convolutions


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.mark.usefixtures("rounding")
def test_rounding_of_convolutions_is_off_within_a_prediction_alone() -> None:
    with exact_convolutions(True):
        assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is True
    with pytest.raises(RuntimeError), exact_convolutions(True):
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32 is True
    with exact_convolutions(False):
        assert torch.backends.cudnn.allow_tf32 is True
