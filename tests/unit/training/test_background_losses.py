"""Losses with a background class: against a slow loop over samples, and what the head says at test time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openset import geometry
from openset.labels import NEGATIVE
from openset.scores import SCORES, class_probabilities
from training.losses import AS_PUBLISHED, LOSSES, THESIS_LOSSES, build_loss

CENTERS = [[2.0, 0.0], [0.0, 0.5], [-0.6, -0.8]]
BACKGROUND = [[0.6, -0.8]]
FEATURES = [[3.0, 1.0], [-1.0, 2.0], [1.0, -1.0], [-0.5, -6.0], [0.3, 0.1]]
LABELS = [0, 1, NEGATIVE, 2, NEGATIVE]
SCALE = 4.0
BACKGROUND_LOSSES = sorted(name for name, spec in LOSSES.items() if spec.background)


def loss_and_gradients(
    name: str, labels: list[int] = LABELS, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    head, criterion = build_loss(name, num_classes=3, feature_dim=2, scale=SCALE, **options)
    assert head.background is not None
    head.weight.data = torch.tensor(CENTERS, dtype=torch.float64)
    head.background.data = torch.tensor(BACKGROUND, dtype=torch.float64)
    features = torch.tensor(FEATURES, dtype=torch.float64)[: len(labels)].requires_grad_()
    loss = criterion(head(features), torch.tensor(labels))
    loss.backward()
    gradients = [features.grad, head.weight.grad, head.background.grad]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), gradients  # type: ignore[return-value]


def g(name: str, cosine: Tensor) -> Tensor:
    if name.startswith("cos"):
        return cosine - 0.35
    if name.startswith("arc"):
        return torch.cos((torch.arccos(cosine) + 0.5).clamp(max=math.pi))
    return cosine


def slow_reference(name: str, margin_on_background: bool) -> tuple[Tensor, list[Tensor]]:
    """The formula of science reference 8.4, sample by sample and class by class."""
    features = torch.tensor(FEATURES, dtype=torch.float64, requires_grad=True)
    known = torch.tensor(CENTERS, dtype=torch.float64, requires_grad=True)
    foreign = torch.tensor(BACKGROUND, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for feature, label in zip(features, LABELS, strict=True):
        target = 3 if label == NEGATIVE else label
        logits = []
        for index, center in enumerate([*known, *foreign]):
            if name == "bg":
                logits.append(center @ feature)
                continue
            cosine = center @ feature / (center.norm() * feature.norm())
            radius = SCALE if not name.endswith("sfn") else feature.norm()
            if index == target and (label != NEGATIVE or margin_on_background):
                cosine = cosine + (g(name, cosine) - cosine).detach()
            logits.append(radius * cosine)
        total = total - torch.log(logits[target].exp() / sum(logit.exp() for logit in logits))
        if name.endswith("sfn"):
            total = total + 0.01 * (SCALE - feature.norm()) ** 2
    loss = total / len(LABELS)
    loss.backward()
    return loss.detach(), [features.grad, known.grad, foreign.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("name", BACKGROUND_LOSSES)
@pytest.mark.parametrize("margin_on_background", [False, True])
def test_value_and_gradients_are_those_of_the_slow_loop(
    name: str, margin_on_background: bool
) -> None:
    has_margin = LOSSES[name].margin is not None
    if margin_on_background and not has_margin:
        with pytest.raises(ValueError, match="background_margin"):
            loss_and_gradients(name, background_margin=True)
        return
    options = {"background_margin": True} if margin_on_background else {}
    loss, gradients = loss_and_gradients(name, **options)
    expected, expected_gradients = slow_reference(name, margin_on_background)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_margin_of_knowns_does_not_reach_negatives_unless_asked() -> None:
    plain, _ = loss_and_gradients("norm_bg", [NEGATIVE] * 5)
    assert loss_and_gradients("cos_bg", [NEGATIVE] * 5)[0] == plain
    assert loss_and_gradients("cos_bg", [NEGATIVE] * 5, background_margin=True)[0] > plain


def test_without_a_margin_the_three_hard_recipes_are_one() -> None:
    plain, _ = loss_and_gradients("norm_bg")
    assert loss_and_gradients("cos_bg", cosine_margin=0.0)[0] == pytest.approx(plain)
    assert loss_and_gradients("arc_bg", angular_margin=0.0)[0] == pytest.approx(plain)


def test_batch_of_negatives_alone_has_a_finite_loss_and_gradient() -> None:
    for name in BACKGROUND_LOSSES:
        loss, gradients = loss_and_gradients(name, [NEGATIVE, NEGATIVE])
        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_probabilities_count_the_background_and_no_score_names_it() -> None:
    head, _ = build_loss("norm_bg", num_classes=3, feature_dim=2, scale=SCALE)
    head.weight.data = torch.tensor(CENTERS)
    assert head.background is not None
    head.background.data = torch.tensor(BACKGROUND)
    output = head(torch.tensor(BACKGROUND) * 7)  # exactly on the background's center
    assert output.logits.shape == (1, 3)
    assert output.logits.max() < output.all_logits[0, 3]
    assert torch.equal(output.all_logits[:, :3], output.logits)
    probability = output.all_logits[0].softmax(0)[: output.logits.shape[1]].max()
    torch.testing.assert_close(SCORES["softmax"](output)[0], torch.logit(probability))
    assert class_probabilities(output).sum() < 0.5
    torch.testing.assert_close(SCORES["magnitude"](output)[0], output.features.norm() * probability)
    # The background is nothing that is known.
    assert SCORES["logit"](output) == output.logits.max()
    torch.testing.assert_close(SCORES["energy"](output), output.logits.logsumexp(1))


@pytest.mark.parametrize("center_norm", ["differentiable", "projected"])
def test_background_center_is_treated_as_the_others_are(center_norm: str) -> None:
    head, _ = build_loss(
        "cos_bg", num_classes=3, feature_dim=2, scale=SCALE, center_norm=center_norm
    )
    assert head.background is not None
    head.background.data *= 3
    output = head(torch.randn(4, 2))
    of_background = geometry.cosines(output.all_logits, output.all_radii)[:, -1]
    assert of_background.abs().max() <= 1
    assert head.background.norm().item() == pytest.approx(3 if center_norm[0] == "d" else 1)


def test_published_table_knows_the_thesis_losses_alone() -> None:
    assert set(AS_PUBLISHED) == set(THESIS_LOSSES) == set(LOSSES) - set(BACKGROUND_LOSSES)
    with pytest.raises(ValueError, match="as published"):
        build_loss("cos_bg", num_classes=3, feature_dim=2, scale=SCALE, as_published=True)
