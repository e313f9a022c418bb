"""The baseline: training as published code does it. Files, a DataLoader, float32, the loss read back at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from openset.networks import build_network


class PictureFiles(Dataset[tuple[Tensor, int]]):
    """One file a sample, decoded when it is asked for.

    Args:
        paths: the files.
        labels: class, or a negative number.
        mode: of PIL, "L" or "RGB".
        transform: PIL image -> float tensor.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], mode: str, transform: Callable[..., Any]
    ) -> None:
        self.paths, self.labels, self.mode, self.transform = paths, labels, mode, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert(self.mode)), self.labels[index]


def entropic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropic open-set loss as cross-entropy against one-hot rows, and uniform rows for negatives."""
    targets = torch.full_like(logits, 1.0 / logits.shape[1])
    known = labels >= 0
    targets[known] = functional.one_hot(labels[known], logits.shape[1]).to(logits.dtype)
    return functional.cross_entropy(logits, targets)


class PlainLoop:
    """Network, linear head, SGD and a DataLoader.

    Args:
        network: name of the backbone.
        feature_dim: D.
        num_classes: C.
        samples: training data.
        batch_size: N.
        workers: of the DataLoader.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        network: str,
        *,
        feature_dim: int,
        num_classes: int,
        samples: PictureFiles,
        batch_size: int,
        workers: int,
        device: str,
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = nn.Sequential(
            build_network(network, feature_dim=feature_dim),
            nn.Linear(feature_dim, num_classes, bias=False),
        ).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.loader = DataLoader(
            samples,
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def epoch(self) -> float:
        """One pass; the mean loss."""
        self.model.train()
        total = 0.0
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            loss = entropic_loss(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total / len(self.loader)


CHARACTER_TRANSFORM = transforms.ToTensor()


def photograph_transform(image_size: int) -> Callable[..., Any]:
    """Random resized crop, flip, normalization."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.25, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
