"""Every loss against a slow reference of its own, and at the edges of what a batch can hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from openset.heads import build_head
from openset.labels import NEGATIVE
from tests.references import RECIPES, loss_and_gradients, margin_cosine
from training.losses import LOSSES, build_loss
from training.losses.margins import (
    AngularMargin,
    CosineMargin,
    LogitMargin,
    MultiplicativeAngularMargin,
    margin_logits,
)

CLASSES, WIDTH, SCALE = 5, 4, 6.0


def batch(labels: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(len(labels), WIDTH)) * 3, random.normal(size=(CLASSES, WIDTH))


def product(
    name: str, features: np.ndarray, centers: np.ndarray, labels: list[int], **options: Any
) -> tuple[float, np.ndarray, np.ndarray]:
    head, criterion = build_loss(
        name, num_classes=CLASSES, feature_dim=WIDTH, scale=SCALE, **options
    )
    head.weight.data = torch.from_numpy(centers).clone()
    inputs = torch.from_numpy(features).clone().requires_grad_()
    loss = criterion(head(inputs), torch.tensor(labels))
    loss.backward()
    assert inputs.grad is not None
    assert head.weight.grad is not None
    return loss.item(), inputs.grad.numpy(), head.weight.grad.numpy()


@pytest.mark.parametrize(
    "labels",
    [[0, 3, NEGATIVE, 1, NEGATIVE, 4, 2, 0], [1, 4, 0, 2], [NEGATIVE, 2]],
    ids=["mixed", "known only", "one known"],
)
@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_gradients_equal_the_slow_reference(name: str, labels: list[int]) -> None:
    features, centers = batch(labels)
    expected = loss_and_gradients(name, features, centers, labels, scale=SCALE)
    found = product(name, features, centers, labels)
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", RECIPES)
def test_batch_without_knowns_is_finite_and_has_no_cross_entropy(name: str) -> None:
    labels = [NEGATIVE, NEGATIVE, NEGATIVE]
    features, centers = batch(labels)
    loss, gradient, _ = product(name, features, centers, labels)
    expected = (
        loss_and_gradients(name, features, centers, labels, scale=SCALE)[0]
        if LOSSES[name].uses_negatives
        else 0.0
    )
    assert loss == pytest.approx(expected, rel=1e-9)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", RECIPES)
def test_empty_batch_is_an_error(name: str) -> None:
    head, criterion = build_loss(name, num_classes=CLASSES, feature_dim=WIDTH, scale=SCALE)
    with pytest.raises(ValueError, match="empty batch"):
        criterion(head(torch.empty(0, WIDTH)), torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize("name", RECIPES)
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    labels = [0, 3, NEGATIVE, 1, NEGATIVE, 4]
    features, centers = batch(labels)
    order = np.random.default_rng(1).permutation(len(labels))
    loss, gradient, _ = product(name, features, centers, labels)
    other, permuted, _ = product(name, features[order], centers, [labels[i] for i in order])
    assert other == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(permuted, gradient[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_feature_of_length_zero_gives_finite_values(name: str) -> None:
    labels = [0, 1, NEGATIVE]
    features, centers = batch(labels)
    features[0] = features[2] = 0.0
    loss, gradient, of_centers = product(name, features, centers, labels)
    assert math.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert np.isfinite(of_centers).all()


@pytest.mark.parametrize(
    ("name", "plain", "options"),
    [
        ("cos_os", "norm_os", {"cosine_margin": 0.0}),
        ("arc_os", "norm_os", {"angular_margin": 0.0}),
        ("cos_eos", "norm_eos", {"cosine_margin": 0.0}),
        ("arc_eos", "norm_eos", {"angular_margin": 0.0}),
        ("sfn_cosface", "sfn_norm", {"cosine_margin": 0.0}),
        ("sm_softmax", "softmax", {"logit_margin": 0.0}),
        ("sphereface", "cosface", {"multiplicative_margin": 1.0}),
    ],
)
def test_margin_of_nothing_is_the_plain_loss(
    name: str, plain: str, options: dict[str, float]
) -> None:
    labels = [0, 3, 1, 4, 2]
    features, centers = batch(labels)
    found = product(name, features, centers, labels, **options)
    expected = product(
        plain, features, centers, labels, **({"cosine_margin": 0.0} if plain == "cosface" else {})
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "margin"),
    [
        ("cosine", CosineMargin(0.35)),
        ("angular", AngularMargin(0.5)),
        ("multiplicative", MultiplicativeAngularMargin(1.2)),
    ],
)
def test_margins_over_the_whole_half_circle(kind: str, margin: Any) -> None:
    """Includes theta + m > pi (cut) and m theta > pi (SphereFace's second branch)."""
    angles = torch.linspace(0, math.pi, 721, dtype=torch.float64)
    found = margin.margin_cosine(torch.cos(angles), 1.0)
    expected = [margin_cosine(kind, math.cos(angle)) for angle in angles.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    assert (found[1:] <= found[:-1] + 1e-12).all()  # more angle is never better


def test_monotone_margin_keeps_falling_where_the_plain_one_is_cut() -> None:
    angles = torch.linspace(math.pi - 0.5, math.pi, 100, dtype=torch.float64)[1:]
    cosines = torch.cos(angles)
    plain = AngularMargin(0.5).margin_cosine(cosines, 1.0)
    monotone = AngularMargin(0.5, monotone=True).margin_cosine(cosines, 1.0)
    assert (plain == -1.0).all()
    np.testing.assert_allclose(monotone, cosines - 0.5 * math.sin(0.5))
    assert (monotone[1:] < monotone[:-1]).all()
    half = AngularMargin(1.0, monotone=True).margin_cosine(cosines, 0.5)
    torch.testing.assert_close(half, monotone)


@pytest.mark.parametrize(
    "margin", [CosineMargin(), AngularMargin(), MultiplicativeAngularMargin(), LogitMargin()]
)
@pytest.mark.parametrize("normalization", ["none", "soft", "hard"])
def test_margin_changes_the_target_of_knowns_alone(normalization: str, margin: Any) -> None:
    labels = [0, 3, NEGATIVE, 1]
    head = build_head(normalization, num_classes=CLASSES, feature_dim=WIDTH, scale=SCALE)
    output = head(torch.randn(len(labels), WIDTH))
    expected = torch.zeros(len(labels), CLASSES)
    for row, label in ((0, 0), (1, 3), (3, 1)):
        cosine, radius = output.cosines[row, label], output.radii.expand(-1, CLASSES)[row, label]
        expected[row, label] = (
            -margin.logit_margin
            if isinstance(margin, LogitMargin)
            else radius * (margin.margin_cosine(cosine, 1.0) - cosine)
        )
    change = margin_logits(output, torch.tensor(labels), margin) - output.logits
    torch.testing.assert_close(change, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "nothing", "full"),
    [
        ("cos_eos", "cosine_margin", 0.0, 0.35), ("arc_eos", "angular_margin", 0.0, 0.5),
        ("sphereface", "multiplicative_margin", 1.0, 1.2), ("sm_softmax", "logit_margin", 0.0, 0.3),
    ],
)  # fmt: skip
def test_margin_warm_up_grows_linearly_to_the_full_margin(
    name: str, option: str, nothing: float, full: float
) -> None:
    labels = [0, 3, 1, 4]
    features, centers = batch(labels)
    head, criterion = build_loss(
        name, num_classes=CLASSES, feature_dim=WIDTH, scale=SCALE, margin_warmup_epochs=4
    )
    head.weight.data = torch.from_numpy(centers)
    output = head(torch.from_numpy(features))
    for epoch, share in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        criterion.set_epoch(epoch)
        margin = {option: nothing + share * (full - nothing)}
        expected = product(name, features, centers, labels, **margin)[0]
        assert criterion(output, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-9)
