"""The criterion: terms, margin and denominators of one loss, put together from its specification."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from openset import geometry
from openset.heads import Head, OpenSetOutput, build_head
from openset.labels import is_known
from training.losses import terms
from training.losses.margins import margin_logits, with_background
from training.losses.scales import (
    ADACOS_DYNAMIC,
    MARGIN_AWARE,
    DynamicScale,
    magnitude_weight_above_bound,
    resolve_scale,
)
from training.losses.table import AS_PUBLISHED, LOSSES, LossSpec

DEFAULT_MAGNITUDE_WEIGHT = 0.01
ABOVE_BOUND = "above_bound"


class OpenSetCriterion(nn.Module):
    """loss = mean(classification term) + magnitude_weight * mean(magnitude term); science reference section 2.3.

    Samples without a class are ignored, also in the denominator, by losses that use no negatives. A batch without
    knowns has a cross-entropy of 0 with zero gradient. With a background class the cross-entropy is over C + 1
    classes and negatives have the last one.

    Args:
        spec: entry of the table.
        target_magnitude: xi, used by magnitude terms.
        magnitude_weight: lambda.
        detach_radial: see ``margins.margin_logits``.
        margin_warmup_epochs: the margin grows linearly from 0 over this many epochs.
        dynamic_scale: replaces the constant scale of a hard head in training; None for all others.
    """

    def __init__(
        self,
        spec: LossSpec,
        *,
        target_magnitude: float,
        magnitude_weight: float = DEFAULT_MAGNITUDE_WEIGHT,
        detach_radial: bool = False,
        margin_warmup_epochs: float = 0.0,
        dynamic_scale: DynamicScale | None = None,
    ) -> None:
        super().__init__()
        if spec.cce_mean not in ("all", "known"):
            raise ValueError(f'cce_mean must be "all" or "known", got {spec.cce_mean!r}')
        self.spec = spec
        self.target_magnitude = float(target_magnitude)
        self.magnitude_weight = float(magnitude_weight)
        self.detach_radial = detach_radial
        self.margin_warmup_epochs = float(margin_warmup_epochs)
        self.margin_factor = 1.0
        self.dynamic_scale = dynamic_scale

    @property
    def adapted_scale(self) -> float | None:
        """The scale that belongs into the head at export; None where the head's own is the one."""
        return None if self.dynamic_scale is None else float(self.dynamic_scale.value)

    def set_epoch(self, epoch: float) -> None:
        """Set the share of the margin for an epoch (from 0), whole or in part."""
        warmup = self.margin_warmup_epochs
        self.margin_factor = min(1.0, epoch / warmup) if warmup else 1.0

    def forward(self, output: OpenSetOutput, labels: Tensor) -> Tensor:
        """Scalar loss of a batch.

        Args:
            output: of the head for N samples.
            labels: 0..C-1, or NEGATIVE, (N,).

        Raises:
            ValueError: the batch is empty.
        """
        if not len(labels):
            raise ValueError(
                "the loss of an empty batch is undefined; expected at least one sample, got 0"
            )
        spec = self.spec
        with torch.autocast(labels.device.type, enabled=False):
            if self.dynamic_scale is not None:
                output = self.dynamic_scale(output, labels)
            targets, with_margin = labels, labels
            if spec.background:
                output, targets = with_background(output, labels)
                with_margin = targets if spec.background_margin else labels
            logits = margin_logits(
                output,
                with_margin,
                spec.margin,
                factor=self.margin_factor,
                detach_radial=self.detach_radial,
            )
            everyone = len(labels) if spec.uses_negatives else _known_count(labels)
            if spec.entropic:
                loss = terms.entropic_open_set_loss(logits, labels) / everyone
            else:
                divisor = _known_count(labels) if spec.cce_mean == "known" else everyone
                loss = terms.cross_entropy(logits, targets) / divisor
            if spec.magnitude is None:
                return loss
            magnitude = self._magnitude_term(output, labels) / everyone
            return torch.add(loss, magnitude, alpha=self.magnitude_weight)

    def _magnitude_term(self, output: OpenSetOutput, labels: Tensor) -> Tensor:
        spec = self.spec
        assert spec.magnitude is not None
        is_soft = spec.head == "soft"  # then the radii are the magnitudes
        magnitudes = output.radii.squeeze(1) if is_soft else geometry.magnitudes(output.features)
        wanted = terms.wanted_magnitudes(
            spec.magnitude, magnitudes, labels, target_magnitude=self.target_magnitude
        )
        if not spec.uses_negatives:
            wanted = torch.where(is_known(labels), wanted, magnitudes.detach())
        return terms.magnitude_loss(magnitudes, wanted)


def _known_count(labels: Tensor) -> Tensor:
    """Number of knowns, at least 1."""
    count: Tensor = is_known(labels).sum().clamp(min=1)
    return count


_CRITERION_OPTIONS = (
    "target_magnitude",
    "magnitude_weight",
    "detach_radial",
    "margin_warmup_epochs",
)
_SPEC_OPTIONS = {
    "head": "normalization",
    "unit_centers": "unit_centers",
    "cce_mean": "cce_mean",
    "center_norm": "center_norm",
    "background_margin": "background_margin",
}


def allowed_options(spec: LossSpec, scale: float | str) -> set[str]:
    """Options that mean something for this loss."""
    allowed = {"margin_warmup_epochs", "detach_radial"} if spec.margin is not None else set()
    if spec.margin is not None:
        allowed |= {field.name for field in dataclasses.fields(spec.margin)}
    if spec.magnitude is not None:
        allowed |= {"target_magnitude", "magnitude_weight"}
    if spec.background and spec.margin is not None:
        allowed.add("background_margin")
    if scale == MARGIN_AWARE:
        allowed.add("scale_probability")
    if spec.uses_negatives and not spec.entropic and not spec.background:
        allowed.add("cce_mean")
    if spec.normalization != "none":
        allowed |= {"head", "center_norm"}
    if spec.normalization == "soft" and not spec.background:
        allowed.add("unit_centers")
    return allowed


def build_loss(
    name: str,
    *,
    num_classes: int,
    feature_dim: int,
    scale: float | str,
    as_published: bool = False,
    **options: Any,
) -> tuple[Head, OpenSetCriterion]:
    """Build the head and the criterion of a loss.

    Args:
        name: entry of ``LOSSES``.
        num_classes: C.
        feature_dim: D.
        scale: s, the radius of hard heads and the target magnitude of soft ones; a number or the name of a rule, see
            ``scales.resolve_scale``. "adacos_dynamic" needs a hard head.
        as_published: take the specification of the author's code (science reference section 2.6).
        options: margins (``cosine_margin``, ``angular_margin``, ``monotone``, ``multiplicative_margin``,
            ``logit_margin``), ``target_magnitude`` (default: scale), ``magnitude_weight`` (a number, or "above_bound",
            see ``scales.magnitude_weight_above_bound``), ``detach_radial``, ``margin_warmup_epochs``, ``head`` ("soft"
            or "hard"), ``unit_centers``, ``cce_mean``, ``center_norm``, ``background_margin``, ``scale_probability``.

    Raises:
        ValueError: unknown loss, or an option that this loss does not have.
    """
    table = AS_PUBLISHED if as_published else LOSSES
    if name not in table:
        published = " as published" if as_published else ""
        raise ValueError(f"loss{published} must be one of {sorted(table)}, got {name!r}")
    spec = table[name]
    allowed = allowed_options(LOSSES[name], scale)
    # Without negatives it changes nothing; it is refused where a run is configured, but runs of earlier releases have it.
    taken = allowed if spec.uses_negatives else allowed | {"cce_mean"}
    if unknown := sorted(options.keys() - taken):
        raise ValueError(
            f"loss {name!r} has no option {', '.join(unknown)}; it has: {', '.join(sorted(allowed)) or 'none'}"
        )
    changes = {_SPEC_OPTIONS[key]: value for key, value in options.items() if key in _SPEC_OPTIONS}
    if spec.margin is not None:
        margin_fields = {field.name for field in dataclasses.fields(spec.margin)}
        changes["margin"] = dataclasses.replace(
            spec.margin, **{key: value for key, value in options.items() if key in margin_fields}
        )
    spec = dataclasses.replace(spec, **changes)
    dynamic = scale == ADACOS_DYNAMIC
    if dynamic and spec.normalization != "hard":
        raise ValueError(
            f"scale={ADACOS_DYNAMIC} adapts the constant radius of a hard head; {name!r} has a "
            f"{spec.normalization!r} one, choose a fixed scale"
        )
    number = resolve_scale(
        scale,
        num_classes=num_classes,
        margin=spec.margin,
        **({"probability": options["scale_probability"]} if "scale_probability" in options else {}),
    )
    head = build_head(
        spec.head,
        num_classes=num_classes,
        feature_dim=feature_dim,
        scale=number,
        center_norm=spec.center_norm,
        background=spec.background,
    )
    chosen: dict[str, Any] = {"target_magnitude": number}
    chosen |= {key: value for key, value in options.items() if key in _CRITERION_OPTIONS}
    if chosen.get("magnitude_weight") == ABOVE_BOUND:
        if spec.cce_mean == "known":
            raise ValueError(
                'magnitude_weight="above_bound" is a bound for cce_mean="all"; with cce_mean="known", as published, it is '
                "larger by N / N_k, which depends on the data: give a number, or as_published=false or cce_mean=all"
            )
        chosen["magnitude_weight"] = magnitude_weight_above_bound(
            spec.margin, target_magnitude=chosen["target_magnitude"]
        )
    criterion = OpenSetCriterion(
        spec, dynamic_scale=DynamicScale(number) if dynamic else None, **chosen
    )
    return head, criterion
