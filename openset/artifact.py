"""The artifact: a folder of data, never code. ``weights.safetensors``, ``model_card.json``, ``calibration.npz``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openset.calibration import ScoreSet, save_score_sets
from openset.classifier import OpenSetClassifier
from openset.fitted_scores import FITTED_SCORES
from openset.heads import Head, build_head
from openset.model_card import ModelCard, path_digest
from openset.networks import build_network
from openset.preprocessing import Preprocessing

WEIGHTS = "weights.safetensors"
CARD = "model_card.json"
CALIBRATION = "calibration.npz"


class BrokenArtifact(ValueError):
    """A file of the artifact is missing, damaged or does not fit the others."""


def weights_digest(folder: Path | str) -> str:
    """SHA-256 of the weights file, the identity of a model on the wire."""
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise BrokenArtifact(f"{file} is missing; export the run first (make export RUN=...)")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_card(folder: Path | str) -> ModelCard:
    """The model card of an artifact."""
    file = Path(folder) / CARD
    if not file.is_file():
        raise BrokenArtifact(f"{file} is missing; export the run first (make export RUN=...)")
    return ModelCard.from_json(file.read_text())


def write_card(folder: Path | str, card: ModelCard) -> None:
    """Replace the model card, atomically."""
    file = Path(folder) / CARD
    partial = file.with_name(file.name + ".partial")
    partial.write_text(card.to_json())
    os.replace(partial, file)


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous().clone()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def save_artifact(
    folder: Path | str,
    *,
    network: nn.Module,
    head: Head,
    card: ModelCard,
    fitted: Mapping[str, nn.Module] | None = None,
    score_sets: Iterable[ScoreSet] = (),
) -> None:
    """Write an artifact; the folder is made if needed, files are replaced one by one, each atomically.

    The state of ``fitted`` scores lies with the weights, as ``score.<name>.<tensor>``.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / (WEIGHTS + ".partial")
    modules = {"network": network, "head": head}
    modules |= {f"score.{name}": module for name, module in (fitted or {}).items()}
    save_file(_tensors(modules), partial)
    os.replace(partial, target / WEIGHTS)
    write_card(target, card)
    save_score_sets(target / CALIBRATION, score_sets)


def load_artifact(
    folder: Path | str,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    compiled: bool = False,
) -> OpenSetClassifier:
    """Rebuild the classifier; nothing in the folder is executed.

    Raises:
        BrokenArtifact: a file is missing, damaged, or weights and model card do not fit.
    """
    source = Path(folder)
    card = read_card(source)
    digest = weights_digest(source)
    network = build_network(card.network, feature_dim=card.feature_dim, **card.network_options)
    head = build_head(
        card.normalization,
        num_classes=card.num_classes,
        feature_dim=card.feature_dim,
        scale=card.scale,
        background=card.background,
    )
    try:
        tensors = load_file(source / WEIGHTS)
        for part, module in (("network", network), ("head", head)):
            module.load_state_dict(_below(f"{part}.", tensors))
        fitted = {
            name: FITTED_SCORES[name](**_below(f"score.{name}.", tensors))
            for name in card.scores
            if name in FITTED_SCORES
        }
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise BrokenArtifact(f"{source / WEIGHTS} does not fit its model card: {error}") from error
    preprocessing = Preprocessing.from_dict(card.preprocessing)
    return OpenSetClassifier(
        network,
        head,
        card,
        fitted=fitted,
        preprocessing=preprocessing,
        device=device,
        precision=precision,
        compiled=compiled,
        digest=path_digest(
            weights_sha256=digest, card=card, preprocessing_identity=preprocessing.identity()
        ),
    )
