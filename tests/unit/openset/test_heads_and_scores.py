"""Heads and scores: geometry one can picture."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from openset.heads import LinearHead, NormalizedHead, OpenSetOutput, build_head
from openset.scores import SCORES, score_probability
from tests.factories import features_at


def head_with(
    weight: list[list[float]], normalization: str, scale: float | None = None
) -> LinearHead | NormalizedHead:
    head = build_head(
        normalization, num_classes=len(weight), feature_dim=len(weight[0]), scale=scale
    ).eval()
    head.weight.data = torch.tensor(weight)
    return head


@pytest.mark.parametrize("normalization", ["none", "soft", "hard"])
def test_logits_are_radii_times_cosines(normalization: str) -> None:
    head = build_head(normalization, num_classes=5, feature_dim=3, scale=7.0)
    output = head(torch.randn(11, 3))
    torch.testing.assert_close(output.logits, output.radii * output.cosines)


def test_angle_of_a_feature_is_the_angle_of_the_picture() -> None:
    head = head_with([[3.0, 0.0], [0.0, 0.2]], "hard", 10.0)
    cosines = head(features_at([0, 30, 90, 180], [1, 5, 2, 9])).cosines
    expected = [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in (0, 30, 90, 180)]
    torch.testing.assert_close(cosines, torch.tensor(expected), atol=1e-6, rtol=0)


def test_hard_logits_ignore_the_magnitude_and_soft_logits_follow_it() -> None:
    features = torch.randn(6, 4)
    hard, soft = (
        build_head(kind, num_classes=3, feature_dim=4, scale=5.0) for kind in ("hard", "soft")
    )
    torch.testing.assert_close(hard(3 * features).logits, hard(features).logits)
    torch.testing.assert_close(soft(3 * features).logits, 3 * soft(features).logits)


@pytest.mark.parametrize("normalization", ["none", "soft", "hard"])
def test_zero_feature_gives_finite_logits_and_gradient(normalization: str) -> None:
    head = build_head(normalization, num_classes=3, feature_dim=4, scale=5.0)
    features = torch.zeros(2, 4, requires_grad=True)
    output = head(features)
    (output.logits.sum() + output.radii.sum()).backward()
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(features.grad).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("normalization", ["none", "soft", "hard"])
def test_head_in_torchscript_gives_the_bits_of_the_head_in_training(normalization: str) -> None:
    head = build_head(normalization, num_classes=5, feature_dim=4, scale=13.0)
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.head(features).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), features)
        logits = traced(features)
    torch.jit.save(traced, io.BytesIO())
    assert torch.equal(logits, head(features.requires_grad_()).logits)


def test_head_computes_in_float32_under_autocast() -> None:
    head = build_head("hard", num_classes=3, feature_dim=4, scale=5.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 4).bfloat16()).logits.dtype == torch.float32


def test_projected_centers_stay_unit_in_training_only() -> None:
    head = NormalizedHead(3, 4, normalization="hard", scale=5.0, center_norm="projected")
    head.weight.data *= 2
    head.eval()(torch.randn(1, 4))
    assert head.weight.norm(dim=1)[0].item() == pytest.approx(2)
    head.train()(torch.randn(1, 4))
    assert head.weight.norm(dim=1)[0].item() == pytest.approx(1)


def test_gradient_of_projected_centers_keeps_its_radial_part() -> None:
    head = NormalizedHead(3, 4, normalization="soft", center_norm="projected")
    features, weights = torch.randn(6, 4), torch.randn(6, 3)
    (head(features).logits * weights).sum().backward()
    torch.testing.assert_close(head.weight.grad, weights.T @ features)


def test_centers_begin_as_xaviers_normal_and_those_of_normalized_heads_are_always_unit() -> None:
    linear = build_head("none", num_classes=300, feature_dim=200)
    assert linear.centers.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    head = build_head("soft", num_classes=3, feature_dim=4)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(3))
    head.weight.data *= 3
    torch.testing.assert_close(head.centers.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("kind", "scale", "message"),
    [
        ("hard", None, "positive scale"),
        ("hard", 0.0, "positive scale"),
        ("cosine", 1.0, "normalization"),
    ],
)
def test_impossible_heads_are_refused(kind: str, scale: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head(kind, num_classes=3, feature_dim=4, scale=scale)


def output_of(logits: list[list[float]]) -> OpenSetOutput:
    tensor = torch.tensor(logits)
    return OpenSetOutput(tensor, tensor, tensor)


def test_log_odds_are_the_logit_of_the_largest_probability() -> None:
    logits = torch.randn(50, 7) * 3
    probability = logits.double().softmax(1).amax(1)
    expected = torch.logit(probability).float()
    torch.testing.assert_close(
        SCORES["softmax"](output_of(logits.tolist())), expected, atol=1e-4, rtol=1e-4
    )


def test_log_odds_separate_what_float32_probabilities_tie() -> None:
    output = output_of([[40.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    probabilities = output.logits.softmax(1).amax(1)
    assert probabilities[0] == probabilities[1] == 1.0
    scores = SCORES["softmax"](output)
    assert scores[1] - scores[0] == pytest.approx(10)


def test_logit_score_is_the_largest_logit() -> None:
    assert SCORES["logit"](output_of([[1.0, 3.0, 2.0]])).item() == 3.0


def test_energy_and_magnitude_are_their_formulas() -> None:
    logits = torch.randn(20, 5)
    output = output_of(logits.tolist())  # whose features are the logits
    torch.testing.assert_close(SCORES["energy"](output), logits.exp().sum(dim=1).log())
    expected = logits.norm(dim=1) * logits.exp().amax(dim=1) / logits.exp().sum(dim=1)
    torch.testing.assert_close(SCORES["magnitude"](output), expected)


def test_log_odds_of_a_single_class_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        SCORES["softmax"](output_of([[1.0]]))


def test_probability_belongs_to_the_softmax_score_only() -> None:
    assert score_probability("softmax", 0.0) == 0.5
    assert score_probability("softmax", 2.0) == pytest.approx(1 / (1 + math.exp(-2)))
    assert score_probability("softmax", -2.0) == pytest.approx(1 / (1 + math.exp(2)))
    assert score_probability("softmax", -2000.0) == pytest.approx(0, abs=1e-300)
    assert score_probability("logit", 2.0) is None
    assert score_probability("softmax", float("nan")) is None


def test_scores_rank_higher_for_features_nearer_to_a_center() -> None:
    head = head_with([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], "hard", 10.0)
    for name, score in SCORES.items():
        values = score(head(features_at([0, 10, 20, 30]))).detach().numpy()
        assert (np.diff(values) < 0).all(), name
