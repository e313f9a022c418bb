"""Weights of torchvision's ResNet-50 from a file, to start a training from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")
_LAST_LAYER = "fc."
# Older files of torchvision lack this counter of batch norm, which nothing here reads.
_COUNTER = "num_batches_tracked"


def is_weights_file(path: Path | str) -> bool:
    """Whether a path names a file of weights, by its suffix; anything else is the folder of a run."""
    return Path(path).suffix.lower() in WEIGHT_SUFFIXES


def load_backbone(network: nn.Module, file: Path) -> None:
    """Copy the weights of torchvision's ResNet-50 into a network; its last layer, and the file's, are left out.

    Args:
        network: of ``openset.networks.resnet50``.
        file: state dict (``.pth`` or ``.pt``, read without executing anything, or ``.safetensors``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state dict, or not of this network.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"initial_weights={file} does not exist; expected a file of ResNet-50 weights or the folder of a run"
        )
    given = _read(file)
    own = network.state_dict()
    wanted = {name for name in own if not name.startswith(_LAST_LAYER)}
    given = {name: value for name, value in given.items() if not name.startswith(_LAST_LAYER)}
    missing = sorted(name for name in wanted - given.keys() if not name.endswith(_COUNTER))
    unexpected = sorted(given.keys() - wanted)
    shapes = sorted(
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in wanted & given.keys()
        if given[name].shape != own[name].shape
    )
    differences = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("lacks", missing), ("has also", unexpected), ("has", shapes))
        if names
    ]
    if differences:
        raise ValueError(
            f"initial_weights={file} does not hold torchvision's ResNet-50: it {', '.join(differences)}"
        )
    network.load_state_dict(given, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = (
            load_file(file)
            if file.suffix.lower() == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"initial_weights={file} cannot be read as weights: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(
            f"initial_weights={file} is not a state dict (names with tensors); save one with "
            "torch.save(model.state_dict(), file)"
        )
    return content
