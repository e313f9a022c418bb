"""The grid of experiments behind the thesis' tables: which cells there are, in which order, and what they are called."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openset.fitted_scores import parse_scores
from openset.labels import NEGATIVE, UNKNOWN, is_known
from training.choices import DIGITS
from training.losses import LOSSES, THESIS_LOSSES, build_loss
from training.options import options_of
from training.presets import PRESETS
from training.protocols import WITH_DIGITS, get_protocol
from training.recommendations import RECOMMENDED, recommendation
from training.runs import HOW_NOT_WHAT, TrainConfig, make_config

# What is worth knowing first, should time run out; losses that are not named follow in the table's order.
RANKING = (
    "cos_eos", "arc_eos", "cos_os", "arc_os", "norm_os", "norm_eos", "eos", "os", "softmax", "sfn_cosface",
    "sfn_arcface",
)  # fmt: skip
# The thesis draws these in two dimensions (its figures 3.2 to 4.2).
_VISUAL_RANKING = ("softmax", "sfn_cosface", "eos", "os", "sfn_arcface", "arc_os", "cos_os")
# Options that change how a model is made or judged, not which model it is; the precision has a column of its own.
_HOW = ("compile", "checkpoint_seconds", "scores", "download")


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
        precision: of the backbone in training, "float32" or "bfloat16".
        how: options that do not change which experiment this is (speed, checkpoints, scores of the evaluation).
    """

    protocol: str
    loss: str
    preset: str
    digits: str | None
    epochs: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    how: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Folder of the run; it depends on nothing but the cell, so that a later release finds it again."""
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()[:6]
        parts = [self.protocol, self.loss, self.preset, self.digits, f"e{self.epochs}"]
        ending = [f"s{self.seed}", digest] + ["bf16"] * (self.precision == "bfloat16")
        return "-".join([part for part in parts if part] + ending)

    @property
    def scores(self) -> list[str]:
        """Scores that the evaluation must have beside the default ones."""
        scores = self.how.get("scores") or []
        return parse_scores(scores) if isinstance(scores, str) else list(scores)

    def config(self, *, data: Path | None, device: str = "auto", workers: int = 0) -> TrainConfig:
        """The run's configuration."""
        return make_config(
            self.protocol, self.loss, preset=self.preset, seed=self.seed, epochs=self.epochs, data=data,
            options=_with_digits({**self.options, **self.how, "precision": self.precision}, self.digits),
            device=device, workers=workers, name=self.name,
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
    seeds: int | Sequence[int] = 3,
    losses: Sequence[str] | None = None,
    digits: Sequence[str] | None = None,
    preset: str | None = None,
    epochs: int | None = None,
    options: dict[str, Any] | None = None,
    device: str = "auto",
) -> list[Cell]:
    """The cells in ranked order: all losses with the first seed, then the next; each loss with every source of digits.

    The thesis preset means the published code (``as_published``) for the thesis' losses unless the options say otherwise,
    also with EMNIST's digits: the two grids then differ in nothing but the digits.

    Args:
        protocol: name.
        seeds: how many, 1, 2, ..., or which, in this order; the others are left to another machine.
        losses: names, ``recommended`` among them for the protocol's recommended loss, preset, options and scores; None
            for the thesis' twenty.
        digits: sources, for the toy protocols.
        preset: None for "thesis", and for ``recommended`` its own.
        epochs: None for the protocol's.
        options: as ``make_config`` takes them.
        device: that trains; it decides what ``precision=auto`` stands for.

    Raises:
        ValueError: an unknown loss, preset or source of digits, or an option that a loss does not have.
    """
    chosen_seeds = range(1, seeds + 1) if isinstance(seeds, int) else seeds
    if not chosen_seeds or min(chosen_seeds) < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    chosen = ranked_losses(protocol) if losses is None else list(losses)
    if unknown := sorted(set(chosen) - {*LOSSES, RECOMMENDED}):
        raise ValueError(
            f"no loss {', '.join(unknown)}; there are: {', '.join(LOSSES)}, {RECOMMENDED}"
        )
    free = dict(options or {})
    sources = _digit_sources(protocol, digits, free)
    templates = [
        _cell(protocol, loss, source, preset, epochs, free, device)
        for loss in chosen
        for source in sources
    ]
    for cell in templates:
        _check_options(cell)
    cells: dict[str, Cell] = {}
    for seed in chosen_seeds:
        for template in templates:
            cell = dataclasses.replace(template, seed=seed)
            # What is recommended may also have been named: one training with the scores of both.
            former = cells.get(cell.name)
            cells[cell.name] = cell if former is None else _joined(former, cell)
    return list(cells.values())


def _cell(
    protocol: str,
    loss: str,
    digits: str | None,
    preset: str | None,
    epochs: int | None,
    free: dict[str, Any],
    device: str,
) -> Cell:
    """The cell of a loss, ``recommended`` resolved, without its seed."""
    is_recommended, options = loss == RECOMMENDED, dict(free)
    if is_recommended:
        choice = recommendation(protocol, digits)
        loss, preset = choice.loss, preset or choice.preset
        options = {**choice.options, "scores": list(choice.scores), **options}
    preset = preset or "thesis"
    if preset == "thesis" and loss in THESIS_LOSSES and not is_recommended:
        options.setdefault("as_published", True)
    how = {key: options.pop(key) for key in _HOW if key in options}
    precision = {"precision": options.pop("precision")} if "precision" in options else {}
    config = make_config(protocol, loss, preset=preset, device=device, options=precision)
    return Cell(
        protocol, loss, preset, digits, config.epochs if epochs is None else epochs, 0,
        differing_options(protocol, loss, preset, digits, options), config.training.precision, how,
    )  # fmt: skip


def _joined(first: Cell, second: Cell) -> Cell:
    scores = list(dict.fromkeys([*first.scores, *second.scores]))
    how = {**first.how, **second.how} | ({"scores": scores} if scores else {})
    return dataclasses.replace(first, how=how)


def _digit_sources(
    protocol: str, digits: Sequence[str] | None, options: dict[str, Any]
) -> tuple[str | None, ...]:
    if protocol not in WITH_DIGITS:
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
    # What the data are when nobody says so stands in no configuration.
    defaults = {item.name: item.default for item in options_of(protocol, loss, preset)["data"]}
    options = {
        key: value
        for key, value in options.items()
        if key not in defaults or value != defaults[key]
    }

    def configured(chosen: dict[str, Any]) -> TrainConfig:
        config = make_config(
            protocol, loss, preset=preset, device="cpu", options=_with_digits(chosen, digits)
        )
        training = dataclasses.replace(config.training, precision="float32")
        how: dict[str, Any] = dict.fromkeys((*HOW_NOT_WHAT, "scores"))
        return dataclasses.replace(config, name="", training=training, **how)

    full = configured(options)
    return {
        key: options[key]
        for key in sorted(options)
        if configured({other: value for other, value in options.items() if other != key}) != full
    }


def _check_options(cell: Cell) -> None:
    """Refuse an option that the loss does not have before anything is trained."""
    config = cell.config(data=None, device="cpu")
    num_classes = len(get_protocol(cell.protocol).known)
    config.feature_dim(num_classes)
    build_loss(
        cell.loss, num_classes=num_classes, feature_dim=2, scale=config.loss_options["scale"],
        as_published=config.as_published, **config.criterion_options,
    )  # fmt: skip


def all_classes(protocol: str) -> str:
    """Known/negative/unknown classes of a protocol, e.g. "116/67/166"."""
    lists = get_protocol(protocol)
    return "/".join(str(len(group)) for group in (lists.known, lists.negative, lists.unknown))


def data_columns(config: TrainConfig) -> dict[str, Any]:
    """What rows say of the data: known/negative/unknown classes, fewer where the tree lacks some.

    Of a tree that may lack some also ``counts``, samples by part and group, and ``classes_digest``, which tells it from
    one with as many other classes.
    """
    if not config.data_options.get("allow_missing_classes"):
        return {"classes": all_classes(config.protocol)}
    data = config.load_data(("test",))
    labels = data.test.labels
    masks = (is_known(labels), labels == NEGATIVE, labels == UNKNOWN)
    present = [sorted(set(data.test.groups[mask].tolist())) for mask in masks]
    digest = hashlib.sha256(json.dumps(present).encode()).hexdigest()[:12]
    return {
        "classes": "/".join(str(len(classes)) for classes in present),
        "classes_digest": digest,
        "counts": data.counts,
    }
