"""A run: its configuration, its folder and what can be loaded from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openset.classifier import OpenSetClassifier
from openset.fitted_scores import parse_scores
from openset.heads import Head
from openset.model_card import DEFAULT_SCORES, ModelCard
from openset.networks import build_network
from openset.scores import DEFAULT_SCORE
from training.checkpoints import BEST, LAST, read_checkpoint
from training.choices import DIGITS, IMAGE_CACHE
from training.data import ProtocolData, load_protocol
from training.durable import replacing
from training.losses import LOSSES, build_loss, protocol_defaults
from training.options import data_option_names, refuse_unknown, refuse_wrong_types
from training.precision import resolve_precision
from training.presets import PRESETS, SHARES, Preset
from training.pretrained import is_weights_file
from training.protocols import WITH_DIGITS, get_protocol
from training.recommendations import RECOMMENDED, recommendation

CONFIG = "config.json"
HISTORY = "history.json"
PRETRAINING_NOTES = "pretraining_notes"  # of a checkpoint

# Mean and standard deviation of pixels in [0, 1]: the ImageNet training set's, and round numbers for characters.
CHANNEL_STATISTICS = {"RGB": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "L": ((0.5,), (0.5,))}

PUBLISHED_DIGITS = "mnist"  # the author's; the thesis' text names EMNIST's

_NETWORK_OPTIONS = ("activation", "feature_bias")
# Where a run lies and how fast it goes do not change what is trained: they may change when a run is resumed, and stay out
# of the name's digest.
HOW_NOT_WHAT = ("data", "device", "workers", "cache", "compiled", "checkpoint_seconds")
_NOT_IDENTITY = (
    "name",
    *HOW_NOT_WHAT,
    "protocol",
    "loss",
    "preset",
    "seed",
    "epochs",
    "scores",
)


# Options of a preset that came later: at their default they leave the names of runs as they were.
_LATER = SHARES


@dataclass(frozen=True)
class TrainConfig:
    """Everything that fixes a training run; stored as ``config.json``.

    Attributes:
        protocol: entry of ``training.protocols.PROTOCOLS``.
        loss: entry of ``training.losses.LOSSES``.
        preset: "thesis" or "modern".
        seed: of weights, data order and augmentation.
        epochs: number of passes over the training data.
        data: root of the data set, or None where the protocol needs none.
        data_options: keyword arguments of ``load_protocol`` (digits, image_size, allow_missing_classes, ...).
        loss_options: keyword arguments of ``build_loss``, the protocol's defaults included.
        network: backbone.
        network_options: its options.
        training: the preset's values after overrides.
        as_published: whether the published code's deviations are on.
        device: "cpu" or "cuda".
        workers: data loading processes.
        name: folder below ``runs``.
        initial_weights: folder of a finished run whose weights this one starts from, or file of weights for the backbone
            (``training.pretrained``), or None for random ones.
        scores: what the model is exported and evaluated with, or None for the default ones; training does not use it.
        cache: folder of decoded photographs, or None to decode them on the way.
        compiled: whether torch.compile makes the step.
        checkpoint_seconds: a checkpoint is written at least this often, and after every epoch.
    """

    protocol: str
    loss: str
    preset: str
    seed: int
    epochs: int
    data: str | None
    data_options: dict[str, Any]
    loss_options: dict[str, Any]
    network: str
    network_options: dict[str, Any]
    training: Preset
    as_published: bool
    device: str
    workers: int
    name: str = field(default="")
    initial_weights: str | None = None
    scores: list[str] | None = None
    cache: str | None = None
    compiled: bool = False
    checkpoint_seconds: float = 120.0

    @property
    def views_from_cache(self) -> bool:
        """Whether training sees other views than without the cache: boxes drawn in images that were resized before."""
        return self.cache is not None and self.training.augmentation != "thesis"

    @property
    def digits(self) -> str | None:
        """Source of the known digits; None for a protocol without a choice."""
        source: str = self.data_options.get("digits", "emnist")
        return source if self.protocol in WITH_DIGITS else None

    @property
    def other_digits(self) -> str | None:
        """The source of digits that is not trained with; None for a protocol without a choice."""
        if self.digits is None:
            return None
        return next(source for source in DIGITS if source != self.digits)

    def tested_with(self, digits: str) -> TrainConfig:
        """The same with digits of another source; nothing is fetched for it."""
        options = {key: value for key, value in self.data_options.items() if key != "download"}
        return replace(self, data_options={**options, "digits": digits})

    @property
    def pretraining_notes(self) -> list[str]:
        """What a reader of any result must be told of weights from a file, also those of a run that this one starts from.

        As far as can be told from what is here now; a checkpoint holds what could be told when its training began.
        """
        if self.initial_weights is None:
            return []
        source = Path(self.initial_weights)
        if not is_weights_file(source):
            if (source / CONFIG).is_file():
                return Run(source).pretraining_notes()
            return [
                f"started from {source}, which is not here; whether pretrained weights are behind it is not known"
            ]
        return [
            f"the backbone started from the weights in {source.name}; classes that count as unknown "
            "here may have been among those it was trained on"
        ]

    def to_json(self) -> str:
        """Readable, deterministic JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read a configuration back; unknown keys are refused."""
        content = json.loads(text)
        unknown = content.keys() - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(
                f"run configuration has unknown keys {sorted(unknown)}; was it written by another release?"
            )
        return cls(**{**content, "training": Preset(**content["training"])})

    def default_name(self) -> str:
        """Protocol, loss, preset, seed and a digest of everything else that changes the result."""
        content = {key: value for key, value in asdict(self).items() if key not in _NOT_IDENTITY}
        for key in _LATER:
            if content["training"][key] == getattr(PRESETS["thesis"], key):
                del content["training"][key]
        if self.views_from_cache:
            content["views"] = "cache"
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]
        return f"{self.protocol}-{self.loss}-{self.preset}-s{self.seed}-{digest}"

    @property
    def criterion_options(self) -> dict[str, Any]:
        """Loss options without the feature dimension and the scale, which have parameters of their own."""
        return {
            key: value
            for key, value in self.loss_options.items()
            if key not in ("feature_dim", "scale")
        }

    @property
    def card_options(self) -> dict[str, Any]:
        """Loss options for the model card; the scale, a number in the card itself, only where a rule made it."""
        scale = self.loss_options["scale"]
        return self.criterion_options | ({"scale": scale} if isinstance(scale, str) else {})

    def load_data(
        self, parts: Sequence[str] = ("train", "validation", "test"), *, decoded: bool = False
    ) -> ProtocolData:
        """Load the protocol's data as this run saw it.

        Args:
            parts: of the protocol.
            decoded: take photographs from the run's cache, and build it where it is not there. The evaluation's images
                are the same bits either way.
        """
        data = load_protocol(
            self.protocol,
            data=None if self.data is None else Path(self.data),
            parts=tuple(parts),
            image_cache=Path(self.cache) if decoded and self.cache is not None else None,
            **self.data_options,
        )
        if not self.training.normalize_images:
            return data
        mean, std = CHANNEL_STATISTICS[data.preprocessing.mode]
        return replace(data, preprocessing=replace(data.preprocessing, mean=mean, std=std))

    def build_model(self, num_classes: int) -> tuple[nn.Module, Head, Any]:
        """Fresh network, head and criterion for C classes, seeded."""
        torch.manual_seed(self.seed)
        feature_dim = self.feature_dim(num_classes)
        network = build_network(self.network, feature_dim=feature_dim, **self.network_options)
        return network, *self.head_and_criterion(num_classes)

    def head_and_criterion(self, num_classes: int) -> tuple[Head, Any]:
        """Fresh head and criterion for C classes."""
        return build_loss(
            self.loss,
            num_classes=num_classes,
            feature_dim=self.feature_dim(num_classes),
            scale=self.loss_options["scale"],
            as_published=self.as_published,
            **self.criterion_options,
        )

    def feature_dim(self, num_classes: int) -> int:
        """D: as configured, a number or "C-1", "C", "C+1", "4C"; 0 is "C", the thesis' choice.

        Raises:
            ValueError: neither a number nor one of these.
        """
        wish = self.loss_options.get("feature_dim") or "C"
        relative = {"C-1": num_classes - 1, "C": num_classes, "C+1": num_classes + 1, "4C": 4 * num_classes}  # fmt: skip
        dim = relative.get(wish, wish)
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(
                f"feature_dim must be a positive number or one of {', '.join(relative)}, got {wish!r}"
            )
        return dim


def make_config(
    protocol: str,
    loss: str,
    *,
    preset: str | None = None,
    seed: int = 42,
    epochs: int | None = None,
    data: Path | str | None = None,
    options: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int = 0,
    name: str | None = None,
    cache: Path | str | None = "auto",
) -> TrainConfig:
    """Put a configuration together from the protocol's defaults, the preset and free options.

    Args:
        protocol: name of the protocol.
        loss: name of the loss, or "recommended" for the protocol's recommended loss, options, preset and scores (of its digits).
        preset: "thesis" or "modern"; None for "thesis", or the recommended one.
        seed: of everything random.
        epochs: None for the protocol's default.
        data: root of the data.
        options: any of the data, network, loss and preset options by name; ``compile``, ``checkpoint_seconds``.
        device: "auto" takes CUDA where there is one.
        workers: data loading processes.
        name: of the run; None for the default name.
        cache: folder of decoded photographs; None decodes them on the way; "auto" caches where a GPU trains.

    Raises:
        ValueError: unknown preset, protocol, loss or option.
    """
    free = dict(options or {})
    if loss == RECOMMENDED:
        source = PUBLISHED_DIGITS if free.get("as_published") else None
        choice = recommendation(protocol, free.get("digits", source))
        loss, preset = choice.loss, preset or choice.preset
        free = {**choice.options, "scores": list(choice.scores), **free}
    preset = preset or "thesis"
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    characters = get_protocol(protocol).is_of_characters
    refuse_wrong_types(free, protocol, loss, preset)
    as_published = bool(free.pop("as_published", False))
    initial_weights = free.pop("initial_weights", None)
    scores = free.pop("scores", None)
    compiled = bool(free.pop("compile", False))
    checkpoint_seconds = float(free.pop("checkpoint_seconds", 120.0))
    if as_published:
        free = {"feature_bias": True, **free}
        if characters:
            free = {
                "activation": "none",
                **({} if protocol == "glyphs" else {"digits": PUBLISHED_DIGITS}),
                **free,
            }
    training = replace(
        PRESETS[preset],
        **{key: free.pop(key) for key in [item.name for item in fields(Preset)] if key in free},
    )
    data_options = {key: free.pop(key) for key in data_option_names(protocol) if key in free}
    if "split_seed" in data_options:
        data_options["seed"] = data_options.pop("split_seed")
    network_options = {key: free.pop(key) for key in _NETWORK_OPTIONS if key in free}
    defaults = dict(protocol_defaults(protocol, loss))
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    refuse_unknown(free, protocol, loss, preset, scale=free.get("scale", defaults["scale"]))
    default_epochs = int(defaults.pop("epochs"))
    resolved = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if resolved.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {resolved!r} was asked for, but this machine offers no CUDA device to torch"
        )
    for share in SHARES:
        if getattr(training, share) and not (characters and LOSSES[loss].uses_negatives):
            raise ValueError(
                f"{share} is for characters and for losses that learn from negatives, got protocol "
                f"{protocol!r} with loss {loss!r}"
            )
    training = replace(training, precision=resolve_precision(training.precision, resolved))
    config = TrainConfig(
        protocol=protocol,
        loss=loss,
        preset=preset,
        seed=seed,
        epochs=default_epochs if epochs is None else epochs,
        data=None if data is None else str(data),
        data_options=data_options,
        loss_options={**defaults, **free},
        network="lenet_plus_plus" if characters else "resnet50",
        network_options=network_options,
        training=training,
        as_published=as_published,
        device=resolved,
        workers=workers,
        initial_weights=initial_weights,
        scores=parse_scores(scores) if isinstance(scores, str) else scores,
        cache=_image_cache(cache, resolved) if not characters else None,
        compiled=compiled,
        checkpoint_seconds=checkpoint_seconds,
    )
    return replace(config, name=name or config.default_name())


def _image_cache(cache: Path | str | None, device: str) -> str | None:
    if cache == "auto":
        # A processor is busy with the arithmetic; decoding beside it costs little.
        return str(IMAGE_CACHE) if device.startswith("cuda") else None
    return None if cache is None or str(cache) in ("", "none") else str(cache)


class Run:
    """The folder of a finished or unfinished run.

    Args:
        folder: where it lies.
        config: of the run, for a process that does not see the folder; None reads it there.

    Raises:
        FileNotFoundError: the folder holds no configuration.
    """

    def __init__(self, folder: Path | str, config: TrainConfig | None = None) -> None:
        self.folder = Path(folder)
        if config is not None:
            self.config = config
            return
        file = self.folder / CONFIG
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; expected the folder of a run (runs/<name>), made by python -m training.train"
            )
        self.config = TrainConfig.from_json(file.read_text())

    @property
    def artifact(self) -> Path:
        """Where the exported artifact lies."""
        return self.folder / "artifact"

    def _checkpoint(self, which: str) -> Path:
        file = self.folder / {"last": LAST, "best": BEST}[which]
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; train the run first")
        return file

    def load_checkpoint(self, which: str = "last") -> dict[str, Any]:
        """The stored state, on the CPU.

        Raises:
            FileNotFoundError: the run has no such checkpoint.
            ValueError: it is damaged.
        """
        return read_checkpoint(self._checkpoint(which))

    def checkpoint_digest(self, which: str = "last") -> str:
        """SHA-256 of a checkpoint's file: an export names what it took."""
        with self._checkpoint(which).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def load_model(self, which: str = "last") -> tuple[nn.Module, Head]:
        """Network and head of a checkpoint, in evaluation mode on the CPU; averaged weights where the preset has them."""
        return self._model_of(self.load_checkpoint(which))

    def _model_of(self, state: dict[str, Any]) -> tuple[nn.Module, Head]:
        network, head, criterion = self.config.build_model(state["num_classes"])
        model = nn.ModuleDict({"network": network, "head": head})
        model.load_state_dict(state["averaged"] or state["model"])
        if state.get("head_scale") is not None:
            head.scale = float(state["head_scale"])
        criterion.load_state_dict(state["criterion"])
        if criterion.adapted_scale is not None:
            head.scale = criterion.adapted_scale
        return network.eval(), head.eval()

    def trained_epochs(self, which: str = "last") -> int:
        """Epochs that a checkpoint has behind it."""
        return int(self.load_checkpoint(which)["progress"]["epoch"])

    def pretraining_notes(self, which: str = "last") -> list[str]:
        """What a reader of any result must be told of weights from a file, as a checkpoint holds it since training began.

        Where it does not, as those of earlier releases, the runs that are here now are asked.
        """
        if self.config.initial_weights is None:
            return []
        try:
            stored: list[str] | None = self.load_checkpoint(which).get(PRETRAINING_NOTES)
        except (FileNotFoundError, ValueError):
            stored = None
        return self.config.pretraining_notes if stored is None else stored

    def unfinished(self) -> list[str]:
        """What a reader of any result must be told if the training stopped early; else nothing."""
        done = self.trained_epochs()
        return [f"trained for {done} of {self.config.epochs} epochs"] * (done < self.config.epochs)

    def model_card(
        self,
        data: ProtocolData,
        head: Head,
        *,
        which: str = "last",
        name: str | None = None,
        scores: Sequence[str] = DEFAULT_SCORES,
    ) -> ModelCard:
        """The model card of this run; without a factory operating point."""
        config = self.config
        return ModelCard(
            name=name or config.name,
            version="1.0",
            loss=config.loss,
            options=config.card_options,
            protocol=config.protocol,
            normalization=head.normalization,
            scale=head.scale,
            num_classes=len(data.class_ids),
            feature_dim=config.feature_dim(len(data.class_ids)),
            network=config.network,
            network_options=config.network_options,
            class_ids=data.class_ids,
            class_names=data.class_names,
            preprocessing=data.preprocessing.to_dict(),
            default_score=DEFAULT_SCORE if DEFAULT_SCORE in scores else scores[0],
            background=head.background is not None,
            scores=list(scores),
            training={
                "preset": config.preset,
                "seed": config.seed,
                "epochs": self.trained_epochs(which),
                "as_published": config.as_published,
                "initial_weights": config.initial_weights,
                "data": config.data_options,
                "notes": [*data.notes, *self.pretraining_notes(which), *self.unfinished()],
            },
        )

    def classifier(
        self,
        data: ProtocolData,
        *,
        which: str = "last",
        device: str = "cpu",
        precision: str = "float32",
        scores: Sequence[str] = DEFAULT_SCORES,
        fitted: Mapping[str, nn.Module] | None = None,
    ) -> OpenSetClassifier:
        """The run's model as it would answer; for evaluation, not tied to an artifact.

        Raises:
            ValueError: the data hold other classes than the run was trained on.
        """
        state = self.load_checkpoint(which)
        require_same_classes(state["class_ids"], data, what=self.folder)
        network, head = self._model_of(state)
        card = self.model_card(data, head, which=which, scores=scores)
        return OpenSetClassifier(
            network, head, card, fitted=fitted, device=device, precision=precision
        )

    def protocol_data(self, parts: Sequence[str] = ("train", "validation", "test")) -> ProtocolData:
        """The data of the run's protocol."""
        return self.config.load_data(parts)


def require_same_classes(class_ids: Sequence[str], data: ProtocolData, *, what: Path) -> None:
    """Refuse data whose known classes are not those of a model, in the same order: their labels would mean others.

    Raises:
        ValueError: they differ; names up to three on each side.
    """
    if list(class_ids) == data.class_ids:
        return
    gone = [name for name in class_ids if name not in data.class_ids]
    new = [name for name in data.class_ids if name not in class_ids]
    raise ValueError(
        f"{what} was trained on other known classes than the data now hold (no longer there: "
        f"{', '.join(gone[:3]) or 'none'}; new: {', '.join(new[:3]) or 'none'}); restore the former classes or train anew"
    )


def write_atomically(file: Path, content: str) -> None:
    """Replace a text file in one step."""
    with replacing(file) as stream:
        stream.write(content.encode())
