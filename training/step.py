"""One training step's arithmetic: images and labels to the loss of the whole batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from openset.preprocessing import Preprocessing
from training.batches import ALONE, Share
from training.parallel import gather_rows


class Normalizer:
    """``Preprocessing.normalize``, channels last, with its constants on the device already.

    Made anew for every batch they would be copied there while the host waits.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._constants = None
        if preprocessing.mean is not None and preprocessing.std is not None:
            self._constants = [
                torch.tensor(values, device=device)[None, :, None, None]
                for values in (preprocessing.mean, preprocessing.std)
            ]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, channels, H, W) -> float32, the same bits as ``Preprocessing.normalize`` gives."""
        floats = images.float().div_(255.0)
        if self._constants is not None:
            mean, std = self._constants
            floats = (floats - mean) / std
        return floats.contiguous(memory_format=torch.channels_last)


class _HeadAndLoss(nn.Module):
    def __init__(self, head: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.head, self.criterion = head, criterion

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.head(features), labels)
        return loss


def smallest_batch(network: str, image_size: int, share: Share, device: torch.device) -> int:
    """How few images a step can learn from.

    Batch norm needs two values per channel. ResNet-50's last maps are image_size / 32 pixels wide, rounded up: where that is
    one, it needs two images, and two in each process of several on CPUs (GPUs share their statistics).
    """
    if network != "resnet50" or image_size > 32:
        return 1
    return 2 if device.type == "cuda" else 2 * share.count


# A grid compiles some twenty losses, heads and networks in one process; beyond torch's limit of 8 it would compute them
# uncompiled.
_RECOMPILE_LIMIT = 128


def _keep_all_compiled() -> None:
    # Imported here: it takes seconds, which only compiling is worth.
    from torch._dynamo import config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _RECOMPILE_LIMIT)


def uncompiled(compiled: bool) -> AbstractContextManager[Any]:
    """Within, what is compiled is computed without: batches of another size would be compiled anew, which takes longer."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class TrainingStep(nn.Module):
    """Network, head and criterion as one module, so that one wrapper can average all their gradients.

    The network runs in the preset's precision; head and criterion switch autocast off themselves.

    Args:
        model: "network" and "head".
        criterion: of the loss.
        normalizer: of the images.
        precision: "float32" or "bfloat16".
        compiled: compile the network, and head with criterion, at the first step (minutes).
        share: of the batch.
    """

    def __init__(
        self,
        model: nn.ModuleDict,
        criterion: nn.Module,
        normalizer: Normalizer,
        *,
        precision: str,
        compiled: bool = False,
        share: Share = ALONE,
    ) -> None:
        super().__init__()
        self.network = model["network"]
        self.loss = _HeadAndLoss(model["head"], criterion)
        self.normalizer, self.precision, self.share = normalizer, precision, share
        if compiled:
            _keep_all_compiled()
            self.network.compile()
            self.loss.compile()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of the whole batch.

        Args:
            images: of this process, uint8 (m, channels, H, W) on the device.
            labels: of the whole batch, (n,).
        """
        batch = self.normalizer(images)
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
            features = self.network(batch)
        loss: Tensor = self.loss(gather_rows(features, len(labels), self.share), labels)
        return loss
