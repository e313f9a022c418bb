"""Closed-form gradients of products with directions against autograd's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from openset.geometry import TINY, cosines, products


def _by_autograd(
    features: Tensor, centers: Tensor, length: float | None, unit: bool
) -> tuple[Tensor, Tensor]:
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if length is not None:
        features = length * functional.normalize(features, dim=1, eps=TINY)
        lengths = torch.full_like(lengths, length)
    if not unit:
        centers = functional.normalize(centers, dim=1, eps=TINY)
    return features @ centers.T, lengths


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("length", [None, 18.0])
def test_products_and_their_gradients_are_autograds(length: float | None, unit: bool) -> None:
    random = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=random)
    features, centers, weights, of_radii = draw(7, 5) * 3, draw(4, 5), draw(7, 4), draw(7, 1)
    features[2] = 0.0
    found = []
    for compute in (partial(products, length=length, unit=unit), None):
        leaves = features.clone().requires_grad_(), centers.clone().requires_grad_()
        dots, radii = compute(*leaves) if compute else _by_autograd(*leaves, length, unit)
        ((dots * weights).sum() + (radii * of_radii).sum()).backward()
        found.append((dots.detach(), radii.detach(), leaves[0].grad, leaves[1].grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_gradient_is_refused_not_wrong() -> None:
    rows, centers = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    dots, _ = products(rows, centers)
    (gradient,) = torch.autograd.grad(dots.pow(3).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_zero_vector_has_cosine_zero_and_rounding_is_clamped() -> None:
    products, lengths = (
        torch.tensor([[0.0, 0.0], [1.0000001, -1.0000001]]),
        torch.tensor([[0.0], [1.0]]),
    )
    assert cosines(products, lengths).tolist() == [[0.0, 0.0], [1.0, -1.0]]
