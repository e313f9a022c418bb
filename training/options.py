"""The free options of a run: which there are for a protocol and a loss, of which type, with which default."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from openset.networks import ACTIVATIONS, NETWORKS
from training.choices import DIGITS, PRECISIONS
from training.data import load_protocol
from training.losses import LOSSES, LossSpec, protocol_defaults
from training.losses.criterion import ABOVE_BOUND, DEFAULT_MAGNITUDE_WEIGHT, allowed_options
from training.losses.scales import MARGIN_AWARE, MARGIN_AWARE_PROBABILITY, SCALE_RULES
from training.presets import PRESETS, SHARES, Preset
from training.protocols import FOLDERS, get_protocol
from training.recommendations import RECOMMENDATIONS_WITH_MNIST, RECOMMENDED, recommendation


@dataclass(frozen=True)
class Kind:
    """What an option takes: values of a type, or one of some words.

    Attributes:
        of: bool, int, float (any finite number), str, or list (of texts, or these in one, comma-separated); None for the
            words alone.
        words: beside them; None among them for null.
        text: for people.
    """

    of: type | None
    words: tuple[str | None, ...]
    text: str

    def takes(self, value: Any) -> bool:
        """Whether it takes a value. To Python true is a whole number; here it is none."""
        if value is None or isinstance(value, str):
            return value in self.words or (value is not None and self.of in (str, list))
        if isinstance(value, list | tuple):
            return self.of is list and all(isinstance(item, str) for item in value)
        if isinstance(value, bool):
            return self.of is bool
        if isinstance(value, float):
            return self.of is float and math.isfinite(value)
        return isinstance(value, int) and self.of in (int, float)


_TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def _kind(of: type, *words: str | None) -> Kind:
    named = ", ".join("null" if word is None else word for word in words)
    return Kind(of, words, _TYPE_NAMES[of] + (f" or {named}" if words else ""))


def _one_of(*words: str) -> Kind:
    return Kind(None, words, (" or " if len(words) == 2 else ", ").join(words))


# What the type of a default does not tell.
_KINDS = {
    "scale": _kind(float, *SCALE_RULES),
    "feature_dim": _kind(int, "C-1", "C", "C+1", "4C"),
    "magnitude_weight": _kind(float, ABOVE_BOUND),
    "target_magnitude": _kind(float),
    "head": _one_of("soft", "hard"),
    "cce_mean": _one_of("all", "known"),
    "center_norm": _one_of("differentiable", "projected"),
    "activation": _one_of(*ACTIVATIONS),
    "digits": _one_of(*DIGITS),
    "size": _one_of("full", "small"),
    "on_unreadable": _one_of("fail", "skip"),
    "image_size": Kind(int, (), "whole number (pixels)"),
    "precision": _one_of(*PRECISIONS),
    "schedule": _one_of("constant", "cosine"),
    "augmentation": _one_of(*sorted({preset.augmentation for preset in PRESETS.values()})),
    "ema_decay": _kind(float, None),
    "max_gradient_norm": _kind(float, None),
    "initial_weights": Kind(str, (None,), "folder of a finished run, or file of ResNet-50 weights"),
    "scores": Kind(list, (None,), "names, comma-separated, or all"),
}
_RUN = {
    "as_published": False,
    "compile": False,
    "checkpoint_seconds": 120.0,
    "initial_weights": None,
    "scores": "softmax,logit",
}
# Names in a criterion's specification that differ from the option's.
_IN_SPEC = {"head": "normalization"}
_OF_LOSSES = {
    "detach_radial": False,
    "margin_warmup_epochs": 0.0,
    "magnitude_weight": DEFAULT_MAGNITUDE_WEIGHT,
    "target_magnitude": "the scale",
    "scale_probability": MARGIN_AWARE_PROBABILITY,
}

_OF_ANY_LOSS = set().union(*(allowed_options(spec, MARGIN_AWARE) for spec in LOSSES.values()))


@dataclass(frozen=True)
class Option:
    """One free option.

    Attributes:
        name: as in ``OPTIONS="name=value"``.
        kind: what it takes.
        default: what it is where nobody names it.
    """

    name: str
    kind: Kind
    default: Any


def options_of(
    protocol: str,
    loss: str,
    preset: str | None = None,
    *,
    scale: float | str | None = None,
    digits: str | None = None,
) -> dict[str, list[Option]]:
    """All options there are for a protocol and a loss, by what they change.

    Args:
        protocol: entry of ``training.protocols.PROTOCOLS``.
        loss: entry of ``training.losses.LOSSES``, or "recommended".
        preset: whose values are the defaults; None for "thesis", or the recommended one.
        scale: of the loss, if not the protocol's; some rules have an option of their own.
        digits: their source, by which what is recommended may differ; None for EMNIST's.

    Returns:
        Options by group: loss, network, preset, data, run.

    Raises:
        ValueError: unknown protocol, loss or preset.
    """
    chosen: dict[str, Any] = {}
    if loss == RECOMMENDED:
        choice = recommendation(protocol, digits)
        loss, preset = choice.loss, preset or choice.preset
        chosen = {**choice.options, "scores": ",".join(choice.scores)}
    preset = preset or "thesis"
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    network = "lenet_plus_plus" if get_protocol(protocol).is_of_characters else "resnet50"
    found = {
        "loss": _loss_defaults(protocol, loss, scale),
        "network": _defaults(NETWORKS[network]),
        "preset": {item.name: getattr(PRESETS[preset], item.name) for item in fields(Preset)},
        "data": _data_defaults(protocol),
        "run": _RUN,
    }
    return {
        group: [
            Option(name, _KINDS.get(name) or _kind(type(default)), chosen.get(name, default))
            for name, default in sorted(defaults.items())
        ]
        for group, defaults in found.items()
    }


def applies(name: str, loss: str) -> bool:
    """Can an option change what a loss trains? Those of other losses cannot; those of no loss (network, preset, data) can."""
    spec = LOSSES[loss]
    if name in ("scale", "scale_probability"):
        return spec.normalization != "none" or spec.magnitude is not None
    if name in SHARES:
        return spec.uses_negatives
    return name not in _OF_ANY_LOSS or name in allowed_options(spec, MARGIN_AWARE)


def data_option_names(protocol: str) -> list[str]:
    """The options that a protocol's data have; another protocol's would change nothing."""
    return list(_data_defaults(protocol))


def with_data_defaults(protocol: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a protocol's data by the names of ``load_protocol``, those that are not given at their defaults."""
    defaults = _data_defaults(protocol)
    defaults["seed"] = defaults.pop("split_seed")
    return {**defaults, **given}


def refuse_wrong_types(given: Mapping[str, Any], protocol: str, loss: str, preset: str) -> None:
    """Refuse what an option does not take, by type and word: any text but an empty one would else count as true.

    Raises:
        ValueError: names the option, what was expected and what came.
    """
    for options in options_of(protocol, loss, preset).values():
        for option in options:
            if option.name in given and not option.kind.takes(given[option.name]):
                raise ValueError(
                    f"{option.name} must be {option.kind.text}, got {given[option.name]!r}"
                )


def refuse_unknown(
    left: Iterable[str], protocol: str, loss: str, preset: str, *, scale: float | str
) -> None:
    """Refuse options that nothing has taken and the loss does not have.

    Raises:
        ValueError: names them, and all that there are.
    """
    found = options_of(protocol, loss, preset, scale=scale)
    unknown = sorted(set(left) - {option.name for option in found["loss"]})
    if unknown:
        groups = "; ".join(
            f"{group}: {', '.join(option.name for option in options)}"
            for group, options in found.items()
        )
        raise ValueError(
            f"protocol {protocol!r} with loss {loss!r} has no option {', '.join(unknown)}; there are {groups}. Types and "
            f"defaults: python -m training.train --list-options --protocol {protocol} --loss {loss}"
        )


def listing(
    protocol: str, loss: str, preset: str | None = None, *, digits: str | None = None
) -> str:
    """The options as a text table, one a line below the name of each group."""
    found = options_of(protocol, loss, preset, digits=digits)
    everything = [option for options in found.values() for option in options]
    name_width = max(len(option.name) for option in everything)
    kind_width = max(len(option.kind.text) for option in everything)
    differs = loss == RECOMMENDED and protocol in RECOMMENDATIONS_WITH_MNIST
    named = f"{loss} ({(digits or 'emnist').upper()}'s digits)" if differs else loss
    lines = [
        f'options of {protocol} with {named}: OPTIONS="name=value ...", or --option name=value'
    ]
    for group, options in found.items():
        lines += ["", f"{group}:"]
        lines += [
            f"  {option.name:{name_width}}  {option.kind.text:{kind_width}}  default {_shown(option.default)}"
            for option in options
        ]
    return "\n".join(lines)


def _loss_defaults(protocol: str, loss: str, scale: float | str | None) -> dict[str, Any]:
    named = protocol_defaults(protocol, loss)
    del named["epochs"]
    named["feature_dim"] = named["feature_dim"] or "C"
    spec = LOSSES[loss]
    allowed = allowed_options(spec, MARGIN_AWARE if scale is None else scale)
    return {name: _loss_default(spec, name) for name in allowed} | named


def _loss_default(spec: LossSpec, name: str) -> Any:
    if name in _OF_LOSSES:
        return _OF_LOSSES[name]
    holder = spec.margin if hasattr(spec.margin, name) else spec
    return getattr(holder, _IN_SPEC.get(name, name))


def _defaults(function: Any) -> dict[str, Any]:
    """Keyword options of a function with their defaults."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    return {
        name: one.default
        for name, one in parameters.items()
        if one.default is not inspect.Parameter.empty
    }


def _data_defaults(protocol: str) -> dict[str, Any]:
    defaults = _defaults(load_protocol)
    if protocol == "glyphs":
        names = ["size"]
    elif get_protocol(protocol).is_of_characters:
        names = ["digits", "download"]
    else:
        names = ["image_size", "on_unreadable"]
        names += [] if protocol == FOLDERS else ["allow_missing_classes"]
        defaults["image_size"] = 224
    return {name: defaults[name] for name in names} | {"split_seed": defaults["seed"]}


def _shown(default: Any) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "none"}[default]
    return f"{default:g}" if isinstance(default, float) else str(default)
