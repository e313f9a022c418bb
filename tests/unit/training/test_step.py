"""The step's parts: the same bits as the plain forms they replace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from openset.labels import NEGATIVE, UNKNOWN
from openset.networks import build_network
from openset.preprocessing import Preprocessing
from tests.factories import character_data
from training.batches import ALONE, CPU, Share
from training.engine import Trainer
from training.losses import LOSSES, build_loss
from training.optimization import AveragedWeights, build_optimizer
from training.presets import PRESETS
from training.runs import make_config
from training.step import Normalizer, TrainingStep, smallest_batch

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


class Waited(AssertionError):
    """The host read a value, or a size that depends on values: on a GPU it would have waited for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        aten, operation = torch.ops.aten, function.overloadpacket
        waits = operation in (
            aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2,
        )  # fmt: skip
        if operation in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            masks = [index for index in arguments[1] if index is not None]
            waits = any(index.dtype in (torch.bool, torch.uint8) for index in masks)
        if waits:
            raise Waited(str(function))
        return function(*arguments, **(options or {}))


DATA = character_data(train=(0, 1, 2, NEGATIVE), validation=(0, 1, 2), test=(0, UNKNOWN), count=8)


def trainer_of(loss: str, folder: Path, preset: str = "thesis", **options: Any) -> Trainer:
    config = make_config("glyphs", loss, preset=preset, device="cpu", options=options)
    return Trainer(config, DATA, folder, show_progress=False)


@pytest.mark.parametrize(("image_size", "least"), [(32, 2), (33, 1)])
def test_smallest_batch_is_what_the_network_can_normalize(image_size: int, least: int) -> None:
    network = build_network("resnet50", feature_dim=2).train()
    assert smallest_batch("resnet50", image_size, ALONE, CPU) == least
    network(torch.zeros(least, 3, image_size, image_size))
    if least > 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            network(torch.zeros(least - 1, 3, image_size, image_size))


def test_smallest_batch_gives_each_process_what_it_normalizes_alone() -> None:
    three = Share(rank=0, count=3)
    assert smallest_batch("resnet50", 32, three, CPU) == 6
    assert all(len(Share(rank, 3).of(np.arange(6))) == 2 for rank in range(3))
    assert smallest_batch("resnet50", 32, three, torch.device("cuda")) == 2
    assert smallest_batch("lenet_plus_plus", 28, three, CPU) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_step_of_any_loss_never_makes_the_host_wait(loss: str, tmp_path: Path) -> None:
    trainer = trainer_of(loss, tmp_path)
    images, labels = next(trainer._batches())
    trainer.criterion.set_epoch(0)
    with NoWaiting():
        trainer._step(images, labels)


def test_modern_step_never_makes_the_host_wait(tmp_path: Path) -> None:
    trainer = trainer_of("cos_os", tmp_path, "modern", max_gradient_norm=1.0)
    assert trainer.averaged is not None
    images, labels = next(trainer._batches())
    with NoWaiting():
        trainer._step(images, labels)


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: values.masked_select(values > 0),
        lambda values: torch.nonzero(values),
        lambda values: bool((values > 0).any()),
        lambda values: values.__setitem__(values > 0, torch.zeros(2)),
    ],
)
def test_watch_over_the_host_notices_a_wait(read: Any) -> None:
    values = torch.tensor([1.0, -1.0, 2.0])
    with NoWaiting(), pytest.raises(Waited):
        read(values)


def test_bfloat16_step_computes_the_network_alone_in_bfloat16_and_learns_in_float32(
    tmp_path: Path,
) -> None:
    kinds: dict[str, torch.dtype] = {}
    losses: dict[str, float] = {}
    moved: dict[str, torch.Tensor] = {}
    for precision in ("float32", "bfloat16"):
        trainer = trainer_of("cos_os", tmp_path, precision=precision)
        network, head = trainer.model["network"], trainer.model["head"]
        network.register_forward_hook(lambda *_: kinds.update(features=_[2].dtype))
        head.register_forward_hook(lambda *_: kinds.update(logits=_[2].logits.dtype))
        before = head.weight.detach().clone()
        images, labels = next(trainer._batches())
        losses[precision] = trainer._step(images, labels).item()
        moved[precision] = head.weight.detach() - before
        assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
    assert kinds == {"features": torch.bfloat16, "logits": torch.float32}
    # Eight bits of mantissa: close, and not the same.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    torch.testing.assert_close(
        moved["bfloat16"], moved["float32"], rtol=0.1, atol=float(moved["float32"].abs().max()) / 20
    )


# Dynamo looks at .grad of the features it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_step_compiles_network_and_loss_and_learns_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a compiler that needs no C++: traced forwards and backwards, run by the ordinary kernels."""
    compiled: list[str] = []
    compile_module = nn.Module.compile

    def traced(module: nn.Module) -> None:
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", traced)
    form = Preprocessing(mode="L", image_size=4, resize=4)
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, -1, -1, 0])
    losses, gradients = [], []
    for flag in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"network": nn.Sequential(nn.Flatten(), nn.Linear(16, 5))})
        model["head"], criterion = build_loss("cos_os", num_classes=3, feature_dim=5, scale=4.0)
        step = TrainingStep(
            model,
            criterion,
            Normalizer(form, torch.device("cpu")),
            precision="float32",
            compiled=flag,
        )
        loss = step(images, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert compiled == ["Sequential", "_HeadAndLoss"]
    torch.testing.assert_close(losses[0], losses[1])
    assert len(gradients[0]) == 3
    for eager, traced_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced_gradient)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_more_losses_are_compiled_in_one_process_than_torch_would_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch computes the ninth and all further ones uncompiled, and says so in a warning at most."""
    compiled: list[str] = []
    compile_module = nn.Module.compile

    def counted(module: nn.Module) -> None:
        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append(type(module).__name__)
            return graph.forward

        compile_module(module, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", counted)
    torch.compiler.reset()
    form = Preprocessing(mode="L", image_size=4, resize=4)
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, -1, -1, 0])
    names = list(LOSSES)[:12]
    for name in names:
        model = nn.ModuleDict({"network": nn.Sequential(nn.Flatten(), nn.Linear(16, 5))})
        model["head"], criterion = build_loss(name, num_classes=3, feature_dim=5, scale=4.0)
        normalizer = Normalizer(form, torch.device("cpu"))
        step = TrainingStep(model, criterion, normalizer, precision="float32", compiled=True)
        before = compiled.count("_HeadAndLoss")
        step(images, labels).backward()
        assert compiled.count("_HeadAndLoss") > before, name
