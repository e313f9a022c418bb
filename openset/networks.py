"""Backbones: images (N, channels, H, W) -> deep features (N, D), nothing after the last linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn

ACTIVATIONS = ("prelu", "none")


def _block(channels_in: int, channels_out: int, activation: str) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, 5, padding=2),
        nn.Conv2d(channels_out, channels_out, 5, padding=2),
        nn.BatchNorm2d(channels_out),
        nn.MaxPool2d(2),
        nn.PReLU() if activation == "prelu" else nn.Identity(),
    ]


class LeNetPlusPlus(nn.Module):
    """LeNet++ for 1x28x28 images (Wen et al., ECCV 2016; layers after the objectosphere authors' code).

    Args:
        feature_dim: D of the deep feature.
        activation: "prelu" (the cited papers) or "none" (what produced the published thesis numbers).
        feature_bias: give the deep-feature layer a bias (published code) or not (thesis text).
    """

    image_channels = 1

    def __init__(
        self, feature_dim: int, *, activation: str = "prelu", feature_bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        self.blocks = nn.Sequential(
            *_block(1, 32, activation), *_block(32, 64, activation), *_block(64, 128, activation)
        )
        self.feature = nn.Linear(128 * 3 * 3, feature_dim, bias=feature_bias)

    def forward(self, images: Tensor) -> Tensor:
        """Deep features (N, D) of images (N, 1, 28, 28)."""
        features: Tensor = self.feature(self.blocks(images).flatten(1))
        return features


def lenet_plus_plus(
    feature_dim: int, *, activation: str = "prelu", feature_bias: bool = False
) -> nn.Module:
    """LeNet++, see ``LeNetPlusPlus``."""
    return LeNetPlusPlus(feature_dim, activation=activation, feature_bias=feature_bias)


def resnet50(feature_dim: int, *, feature_bias: bool = False) -> nn.Module:
    """Torchvision's ResNet-50, randomly initialized, its ``fc`` replaced by Linear(2048, D)."""
    network: nn.Module = torchvision.models.resnet50(weights=None)
    network.fc = nn.Linear(2048, feature_dim, bias=feature_bias)
    return network


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lenet_plus_plus": lenet_plus_plus,
    "resnet50": resnet50,
}


def build_network(name: str, *, feature_dim: int, **options: Any) -> nn.Module:
    """Build a backbone by name.

    Raises:
        ValueError: unknown name or an option the network does not have.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {sorted(NETWORKS)}, got {name!r}")
    try:
        return NETWORKS[name](feature_dim, **options)
    except TypeError as error:
        raise ValueError(
            f"network {name!r} does not take the options {options}: {error}"
        ) from error
