"""The step's parts: the same bits as the plain forms they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from openset.preprocessing import Preprocessing
from training.losses import build_loss
from training.optimization import AveragedWeights, build_optimizer
from training.presets import PRESETS
from training.step import Normalizer, TrainingStep

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(("mean", "std"), [IMAGENET, (None, None)])
def test_images_are_normalized_bit_for_bit_as_in_evaluation(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    form = Preprocessing(mode="RGB", image_size=8, resize=8, mean=mean, std=std)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    ours = Normalizer(form, torch.device("cpu"))(images)
    assert torch.equal(ours, form.normalize(images))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def small_model() -> nn.ModuleDict:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    return nn.ModuleDict({"network": network, "head": nn.Linear(5, 3)})


def test_averaged_weights_are_those_of_torchs_averaged_model() -> None:
    model = small_model()

    def ramped(
        averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor
    ) -> None:
        weight = 1.0 - min(0.9, (1.0 + float(count)) / (10.0 + float(count)))
        for target, source in zip(averaged, current, strict=True):
            if target.is_floating_point():
                target.lerp_(source, weight)
            else:
                target.copy_(source)

    theirs = AveragedModel(model, multi_avg_fn=ramped, use_buffers=True)
    ours = AveragedWeights(model, 0.9)
    for _ in range(90):
        model["network"](torch.randn(2, 1, 8, 8))  # moves the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.update_parameters(model)
        ours.update()
    expected = theirs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert int(ours.module["network"][1].num_batches_tracked) == 90


def test_fused_optimizer_takes_the_plain_step() -> None:
    preset = PRESETS["modern"]
    fused_model = small_model()
    plain_model = copy.deepcopy(fused_model)
    fused, plain = build_optimizer(fused_model, preset), build_optimizer(plain_model, preset)
    for group in plain.param_groups:
        group["fused"], group["foreach"] = False, False
    for _ in range(3):
        for left, right in zip(fused_model.parameters(), plain_model.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        fused.step()
        plain.step()
    for left, right in zip(fused_model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_compiled_step_compiles_network_and_loss_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, *_, **__: compiled.append(type(module).__name__)
    )
    torch.manual_seed(0)
    model = nn.ModuleDict({"network": nn.Sequential(nn.Flatten(), nn.Linear(16, 5))})
    model["head"], criterion = build_loss("cos_os", num_classes=3, feature_dim=5, scale=4.0)
    form = Preprocessing(mode="L", image_size=4, resize=4)
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, -1, -1, 0])
    losses = [
        TrainingStep(
            model,
            criterion,
            Normalizer(form, torch.device("cpu")),
            precision="float32",
            compiled=flag,
        )(images, labels)
        for flag in (False, True)
    ]
    assert compiled == ["Sequential", "_HeadAndLoss"]
    expected = criterion(model["head"](model["network"](form.normalize(images))), labels)
    assert torch.equal(losses[0], expected)
    assert torch.equal(losses[1], expected)
