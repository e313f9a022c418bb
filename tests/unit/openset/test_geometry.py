"""Closed-form gradients of lengths and directions against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from openset.geometry import TINY, cosines, normalize


@pytest.mark.parametrize("length", [1.0, 18.0])
def test_gradient_of_scaled_rows_is_autograds(length: float) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, dtype=torch.float64, generator=random) * 3
    rows[2] = 0.0
    weights = torch.randn(7, 5, dtype=torch.float64, generator=random)
    ours, plain = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    scaled = normalize(ours, length=length)
    expected = length * functional.normalize(plain, dim=1, eps=TINY)
    torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=0)
    (scaled * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-12)


def test_gradient_of_the_gradient_is_refused_not_wrong() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(normalize(rows).pow(3).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_zero_vector_has_cosine_zero_and_rounding_is_clamped() -> None:
    products, lengths = (
        torch.tensor([[0.0, 0.0], [1.0000001, -1.0000001]]),
        torch.tensor([[0.0], [1.0]]),
    )
    assert cosines(products, lengths).tolist() == [[0.0, 0.0], [1.0, -1.0]]
