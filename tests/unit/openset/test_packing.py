"""Packed backbones: they compute what the network computes, and overwrite nothing that is still needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from openset.classifier import path_mode
from openset.networks import NETWORKS, build_network
from openset.packing import PackedConv2d, can_pack, packed_backbone

SHAPES = {"resnet50": (3, 64, 64), "lenet_plus_plus": (1, 28, 28)}

pytestmark = pytest.mark.skipif(not can_pack("float32"), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained(name: str) -> nn.Module:
    """As if trained: batch norm far from the identity."""
    generator = torch.Generator().manual_seed(7)
    network = build_network(name, feature_dim=11).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5), (module.weight, 0.3, 1.2),
                (module.bias, -0.1, 0.1),
            ):  # fmt: skip
                assert value is not None
                value.data.uniform_(low, high, generator=generator)
    return network.to(memory_format=torch.channels_last)


def images_of(shape: tuple[int, ...], count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, *shape, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def deviation(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).abs().max() / wanted.abs().max())


def kinds(network: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in network.modules()}


@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_float32_differs_from_the_network_by_rounding_alone(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    network, images = trained(name), images_of(SHAPES[name])
    packed = packed_backbone(network, images, "float32")
    wanted = network(images)
    assert deviation(packed(images), wanted) < 1e-5
    assert deviation(packed(images[:1]), wanted[:1]) < 1e-5
    torch.set_num_threads(1)
    assert deviation(packed(images[:1]), wanted[:1]) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_rounds_about_as_much_as_autocast_or_cannot_be_packed(name: str) -> None:
    network, images = trained(name), images_of(SHAPES[name])
    if not can_pack("bfloat16"):
        with pytest.raises(RuntimeError, match="bf16 path needs the cpu support"):
            packed_backbone(network, images, "bfloat16")
        return
    wanted = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        usual = deviation(network(images).float(), wanted)
    features = packed_backbone(network, images, "bfloat16")(images)
    assert features.dtype == torch.float32
    assert 0 < deviation(features, wanted) < 2 * usual


@torch.inference_mode()
def test_a_residual_network_is_convolutions_alone() -> None:
    packed = packed_backbone(trained("resnet50"), images_of(SHAPES["resnet50"]), "float32")
    assert kinds(packed).isdisjoint({nn.Conv2d, nn.BatchNorm2d, nn.ReLU})
    assert sum(isinstance(module, PackedConv2d) for module in packed.modules()) == 53
    assert isinstance(packed, fx.GraphModule)
    assert [node.name for node in packed.graph.nodes if node.op != "call_module"] == [
        "x", "flatten", "output"
    ]  # fmt: skip


@torch.inference_mode()
def test_neither_images_nor_network_change() -> None:
    network, images = trained("resnet50"), images_of(SHAPES["resnet50"])
    images_before = images.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    packed_backbone(network, images, "float32")(images)
    assert torch.equal(images, images_before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


class _Branches(nn.Module):
    """Sums and ReLUs that must not all be taken into a convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (
            nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)
        )
        self.relu, self.kind = nn.ReLU(inplace=True), kind

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.first(images), self.second(images)
        if self.kind == "the addend is used later":
            return (second + first) * self.third(first)
        if self.kind == "the image is added":
            return second + images
        if self.kind == "an in-place ReLU is added":
            positive = self.relu(images)
            return (second + positive) * positive
        if self.kind == "the convolution is used twice":
            return first * self.relu(first)
        if self.kind == "the sum is used twice":
            total = self.third(images) + first
            return total * self.relu(total) + second
        if self.kind == "added to itself":
            return first + first
        if self.kind == "used before and after":
            return self.relu(second + first) - self.third(first.detach())
        if self.kind == "a view of the addend is used later":
            view = first.detach()
            return (second + first) * view
        if self.kind == "an in-place ReLU of the addend is used later":
            positive = self.relu(first)
            return (second + first) * positive
        if self.kind == "the addend was made positive in place":
            return self.third(self.relu(first)) + first
        if self.kind == "the input changes before the sum":
            changed = images * 1
            early = self.third(changed)
            changed += 1
            return self.fourth(changed) + early
        if self.kind == "the input becomes positive in place":
            changed = images * 1
            early = self.third(changed)
            return early + self.fourth(self.relu(changed))
        if self.kind == "a convolution is called twice":
            return self.first(self.relu(first))
        assert self.kind == "the sum is broadcast"
        return second + self.third(images.mean(dim=(2, 3), keepdim=True))


@torch.inference_mode()
@pytest.mark.parametrize(
    "kind",
    [
        "the addend is used later",
        "the image is added",
        "an in-place ReLU is added",
        "the convolution is used twice",
        "the sum is used twice",
        "added to itself",
        "used before and after",
        "a view of the addend is used later",
        "an in-place ReLU of the addend is used later",
        "the addend was made positive in place",
        "the input changes before the sum",
        "the input becomes positive in place",
        "a convolution is called twice",
        "the sum is broadcast",
    ],
)
def test_what_is_still_needed_is_not_overwritten(kind: str) -> None:
    network, images = _Branches(kind), images_of((2, 6, 6))
    packed = packed_backbone(network, images, "float32")
    assert (PackedConv2d in kinds(packed)) == (kind != "a convolution is called twice")
    assert deviation(packed(images.clone()), network(images.clone())) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}]
)
def test_other_convolutions_stay_as_they_are(options: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.BatchNorm2d(3)).eval()
    images = images_of((2, 6, 6))
    packed = packed_backbone(network, images, "float32")
    assert PackedConv2d not in kinds(packed)
    assert deviation(packed(images), network(images)) < 1e-5


def test_a_path_says_how_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert path_mode("cpu", "float32", compiled=False) == "packed"
    assert path_mode("cpu", "float32", compiled=True) == "compiled"
    assert path_mode("cuda", "float32", compiled=False) == "eager"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert path_mode("cpu", "bfloat16", compiled=False) == "eager"
    assert path_mode("cpu", "float32", compiled=False) == "packed"
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert path_mode("cpu", "float32", compiled=False) == "eager"
