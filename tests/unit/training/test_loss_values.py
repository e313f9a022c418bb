"""Every loss against the pinned values and gradients of the science reference (section 2.4, 2.6, 8.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openset.labels import NEGATIVE
from training.losses import LOSSES, THESIS_LOSSES, build_loss

CENTERS = [[2.0, 0.0], [0.0, 0.5], [-0.6, -0.8]]
FEATURES = [[3.0, 1.0], [-1.0, 2.0], [1.0, -1.0], [-0.5, -6.0]]
LABELS = [0, 1, NEGATIVE, 2]
OPTIONS = {
    "cosine_margin": 0.35,
    "angular_margin": 0.5,
    "multiplicative_margin": 1.2,
    "logit_margin": 0.3,
}

# loss: value, d loss / d phi_1
EXPECTED = {
    "softmax": (0.058884, -0.002872, 0.000629),
    "eos": (0.457758, -0.002154, 0.000472),
    "os": (0.472291, -0.006128, -0.000853),
    "sm_softmax": (0.077412, -0.003871, 0.000848),
    "sphereface": (0.042395, -0.013474, 0.040422),
    "cosface": (0.138576, -0.040992, 0.122977),
    "arcface": (0.114587, -0.031686, 0.095057),
    "sfn_norm": (0.102592, -0.046635, 0.036974),
    "sfn_cosface": (0.219040, -0.072786, 0.103110),
    "sfn_arcface": (0.192757, -0.067482, 0.082847),
    "norm_os": (0.081944, -0.034976, 0.027730),
    "cos_os": (0.169280, -0.054590, 0.077333),
    "arc_os": (0.149568, -0.050612, 0.062136),
    "cos_os_nonsym": (0.159071, -0.054590, 0.077333),
    "arc_os_nonsym": (0.139359, -0.050612, 0.062136),
    "norm_eos": (0.713325, -0.009307, 0.027922),
    "cos_eos": (0.789438, -0.030744, 0.092233),
    "arc_eos": (0.771446, -0.023764, 0.071293),
    "cos_eos_sfn": (0.529422, -0.054590, 0.077333),
    "arc_eos_sfn": (0.509710, -0.050612, 0.062136),
}
NEGATIVE_GRADIENT = {
    "eos": (0.264295, 0.006722),
    "os": (0.269295, 0.001722),
    **dict.fromkeys(
        ["norm_os", "cos_os", "arc_os", "cos_os_nonsym", "arc_os_nonsym"], (0.005, -0.005)
    ),
    **dict.fromkeys(["norm_eos", "cos_eos", "arc_eos"], (0.203116, 0.203116)),
    **dict.fromkeys(["cos_eos_sfn", "arc_eos_sfn"], (0.072754, -0.042883)),
}


def run(
    name: str, *, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient for the fixture's features; recipes without negatives see samples 1, 2 and 4."""
    kept = [0, 1, 2, 3] if LOSSES[name].uses_negatives else [0, 1, 3]
    head, criterion = build_loss(name, num_classes=3, feature_dim=2, scale=4.0, **options)
    head.weight.data = torch.tensor(CENTERS, dtype=dtype)
    features = torch.tensor(FEATURES, dtype=dtype)[kept].requires_grad_()
    loss = criterion(head(features), torch.tensor(LABELS)[kept])
    loss.backward()
    assert features.grad is not None
    return loss.detach(), features.grad


def test_table_holds_the_twenty_losses() -> None:
    assert set(THESIS_LOSSES) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_value_and_gradient(name: str) -> None:
    value, *gradient = EXPECTED[name]
    loss, gradients = run(name)
    assert loss.item() == pytest.approx(value, abs=6e-7)
    assert gradients[0].tolist() == pytest.approx(gradient, abs=6e-7)


@pytest.mark.parametrize("name", NEGATIVE_GRADIENT)
def test_gradient_of_the_negative(name: str) -> None:
    assert run(name)[1][2].tolist() == pytest.approx(NEGATIVE_GRADIENT[name], abs=6e-7)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("sfn_norm", {"unit_centers": False}, 0.085207),
        ("norm_os", {"cce_mean": "known"}, 0.101012),
        ("cos_os", {"cce_mean": "known"}, 0.217459),
        ("arc_os", {"cce_mean": "known"}, 0.191177),
        ("cos_os_nonsym", {"cce_mean": "known"}, 0.207250),
        ("arc_os_nonsym", {"cce_mean": "known"}, 0.180967),
    ],
)
def test_published_deviation(name: str, options: dict[str, Any], value: float) -> None:
    assert run(name, **options)[0].item() == pytest.approx(value, abs=6e-7)
    assert run(name, as_published=True)[0].item() == pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize(("name", "value"), [("cos_eos_sfn", 0.825896), ("arc_eos_sfn", 0.807904)])
def test_published_deviation_of_the_hard_head(name: str, value: float) -> None:
    assert run(name, head="hard")[0].item() == pytest.approx(value, abs=6e-7)
    assert run(name, as_published=True)[0].item() == pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize(
    ("name", "gradient"), [("cos_os", (-0.079164, 0.069141)), ("arc_os", (-0.066159, 0.056953))]
)
def test_detached_radius_keeps_the_value_and_changes_the_gradient(
    name: str, gradient: tuple[float, float]
) -> None:
    loss, gradients = run(name, detach_radial=True)
    assert loss.item() == pytest.approx(EXPECTED[name][0], abs=6e-7)
    assert gradients[0].tolist() == pytest.approx(gradient, abs=6e-7)


@pytest.mark.parametrize("name", EXPECTED)
def test_float32_agrees_with_float64(name: str) -> None:
    assert run(name, dtype=torch.float32)[0].item() == pytest.approx(EXPECTED[name][0], abs=2e-6)


@pytest.mark.parametrize("name", THESIS_LOSSES)
def test_centers_are_projected_as_published(name: str) -> None:
    options = {"num_classes": 3, "feature_dim": 2, "scale": 4.0}
    assert build_loss(name, as_published=True, **options)[1].spec.center_norm == "projected"
    assert build_loss(name, **options)[1].spec.center_norm == "differentiable"
