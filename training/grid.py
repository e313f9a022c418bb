"""The grid of experiments behind the thesis' tables: which cells there are, in which order, and what they are called."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openset.labels import NEGATIVE, UNKNOWN, is_known
from training.losses import LOSSES, THESIS_LOSSES, build_loss
from training.protocols import get_protocol
from training.runs import TrainConfig, make_config

# What is worth knowing first, should time run out; losses that are not named follow in the table's order.
RANKING = (
    "cos_eos", "arc_eos", "cos_os", "arc_os", "norm_os", "norm_eos", "eos", "os", "softmax", "sfn_cosface",
    "sfn_arcface",
)  # fmt: skip
# The thesis draws these in two dimensions (its figures 3.2 to 4.2).
_VISUAL_RANKING = ("softmax", "sfn_cosface", "eos", "os", "sfn_arcface", "arc_os", "cos_os")
DIGITS = ("mnist", "emnist")


@dataclass(frozen=True)
class Cell:
    """One training run of the grid.

    Attributes:
        protocol: entry of ``training.protocols.PROTOCOLS``.
        loss: entry of ``training.losses.LOSSES``.
        preset: "thesis" or "modern".
        digits: source of the toy protocols' digits, else None.
        epochs: passes over the training data.
        seed: of the run.
        options: what differs from the protocol's and preset's defaults, without the digits.
    """

    protocol: str
    loss: str
    preset: str
    digits: str | None
    epochs: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Folder of the run; it depends on nothing but the cell, so that a later release finds it again."""
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()[:6]
        parts = [self.protocol, self.loss, self.preset, self.digits, f"e{self.epochs}"]
        return "-".join([part for part in parts if part] + [f"s{self.seed}", digest])

    def config(self, *, data: Path | None, device: str = "auto", workers: int = 0) -> TrainConfig:
        """The run's configuration."""
        return make_config(
            self.protocol, self.loss, preset=self.preset, seed=self.seed, epochs=self.epochs, data=data,
            options=_with_digits(self.options, self.digits), device=device, workers=workers, name=self.name,
        )  # fmt: skip


def ranked_losses(protocol: str) -> list[str]:
    """Every loss, the most telling first."""
    first = _VISUAL_RANKING if protocol == "toy_vis" else RANKING
    return [*first, *(loss for loss in THESIS_LOSSES if loss not in first)]


def default_epochs(protocol: str) -> int:
    """What the thesis trains."""
    return make_config(protocol, "softmax", device="cpu").epochs


def plan(
    protocol: str,
    *,
    seeds: int = 3,
    losses: Sequence[str] | None = None,
    digits: Sequence[str] | None = None,
    preset: str = "thesis",
    epochs: int | None = None,
    options: dict[str, Any] | None = None,
) -> list[Cell]:
    """The cells in ranked order: all losses with seed 1, then 2, then 3; each loss with every source of digits.

    The thesis preset means the published code (``as_published``) unless the options say otherwise, also with EMNIST's
    digits: the two grids then differ in nothing but the digits.

    Raises:
        ValueError: an unknown loss, preset or source of digits, or an option that a loss does not have.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    chosen = ranked_losses(protocol) if losses is None else list(losses)
    if unknown := sorted(set(chosen) - LOSSES.keys()):
        raise ValueError(f"no loss {', '.join(unknown)}; there are: {', '.join(LOSSES)}")
    free = dict(options or {})
    if preset == "thesis":
        free.setdefault("as_published", True)
    sources = _digit_sources(protocol, digits, free)
    cells = []
    for seed in range(1, seeds + 1):
        for loss in chosen:
            for source in sources:
                kept = differing_options(protocol, loss, preset, source, free)
                length = default_epochs(protocol) if epochs is None else epochs
                cells.append(Cell(protocol, loss, preset, source, length, seed, kept))
    for cell in cells[: len(chosen) * len(sources)]:
        _check_options(cell)
    return cells


def _digit_sources(
    protocol: str, digits: Sequence[str] | None, options: dict[str, Any]
) -> tuple[str | None, ...]:
    if protocol not in ("toy", "toy_vis"):
        if digits:
            raise ValueError(f"protocol {protocol} has no choice of digits, got {list(digits)}")
        return (None,)
    named = options.pop("digits", None)
    chosen = tuple(digits or ([named] if named else DIGITS))
    if unknown := sorted(set(chosen) - set(DIGITS)):
        raise ValueError(f"digits must be among {DIGITS}, got {unknown}")
    return chosen


def _with_digits(options: dict[str, Any], digits: str | None) -> dict[str, Any]:
    return options if digits is None else {"digits": digits, **options}


def differing_options(
    protocol: str, loss: str, preset: str, digits: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options that change something; an option spelt out with its default value names no other experiment."""

    def configured(chosen: dict[str, Any]) -> TrainConfig:
        config = make_config(
            protocol, loss, preset=preset, device="cpu", options=_with_digits(chosen, digits)
        )
        return dataclasses.replace(config, name="")

    full = configured(options)
    return {
        key: options[key]
        for key in sorted(options)
        if configured({other: value for other, value in options.items() if other != key}) != full
    }


def _check_options(cell: Cell) -> None:
    """Refuse an option that the loss does not have before anything is trained."""
    config = cell.config(data=None, device="cpu")
    build_loss(
        cell.loss, num_classes=2, feature_dim=2, scale=config.loss_options["scale"],
        as_published=config.as_published, **config.criterion_options,
    )  # fmt: skip


def all_classes(protocol: str) -> str:
    """Known/negative/unknown classes of a protocol, e.g. "116/67/166"."""
    lists = get_protocol(protocol)
    return "/".join(str(len(group)) for group in (lists.known, lists.negative, lists.unknown))


def class_counts(config: TrainConfig) -> str:
    """Known/negative/unknown classes of the data; fewer where the tree lacks some."""
    if not config.data_options.get("allow_missing_classes"):
        return all_classes(config.protocol)
    test = config.load_data(("test",)).test
    masks = (is_known(test.labels), test.labels == NEGATIVE, test.labels == UNKNOWN)
    return "/".join(str(len(set(test.groups[mask].tolist()))) for mask in masks)
