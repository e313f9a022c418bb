"""The model card: everything about a model that is data, and the identity of the path that computes its scores."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

SCHEMA_VERSION = 1

# What a model is thresholded by unless its export says otherwise; also of all cards that name no scores.
DEFAULT_SCORES = ("softmax", "logit")

# Facts that may change without changing a score. The state of a score lies with the weights, and in their digest.
_NOT_IDENTITY = ("factory", "name", "version", "training", "default_score", "scores")
# Cards of earlier releases lack these; at its default a field is left out of the digest, so that theirs stays.
_LATER_FIELDS = {"background": False}


@dataclass(frozen=True)
class ModelCard:
    """All that is needed, beside the weights, to rebuild a classifier and to judge its answers.

    Attributes:
        name: model name, as served.
        version: free text, e.g. "1.0".
        loss: loss identifier, e.g. "cos_os".
        options: options of the loss that differ from its defaults.
        protocol: protocol the model was trained on.
        normalization: "none", "soft" or "hard".
        scale: radius of a hard head or target magnitude; None for free heads.
        num_classes: C, known classes only.
        feature_dim: D.
        network: entry of ``openset.networks.NETWORKS``.
        network_options: keyword options of the network.
        class_ids: identifiers, (C,), index = label.
        class_names: names for people, (C,).
        preprocessing: ``Preprocessing.to_dict()``.
        default_score: one of ``scores``.
        training: facts about the run (epochs, seed, preset, notes, ...).
        factory: the operating point chosen at export, or None.
        background: whether the head has a center for everything foreign beside the C centers.
        scores: what the model can be thresholded by, names of ``openset.fitted_scores.ALL_SCORES``.
    """

    name: str
    version: str
    loss: str
    options: dict[str, Any]
    protocol: str
    normalization: str
    scale: float | None
    num_classes: int
    feature_dim: int
    network: str
    network_options: dict[str, Any]
    class_ids: list[str]
    class_names: list[str]
    preprocessing: dict[str, Any]
    default_score: str
    training: dict[str, Any]
    factory: dict[str, Any] | None = None
    background: bool = False
    scores: list[str] = field(default_factory=lambda: list(DEFAULT_SCORES))

    def __post_init__(self) -> None:
        for key in ("class_ids", "class_names"):
            count = len(getattr(self, key))
            if count != self.num_classes:
                raise ValueError(
                    f"model card: {key} must have num_classes={self.num_classes} entries, got {count}"
                )
        if "unknown" in self.class_names:
            raise ValueError(
                'model card: a class may not be named "unknown"; that is the answer for rejected images'
            )
        if self.default_score not in self.scores:
            raise ValueError(
                f"model card: default_score must be one of its scores {self.scores}, got {self.default_score!r}"
            )
        if self.normalization not in ("none", "soft", "hard"):
            raise ValueError(
                f'model card: normalization must be "none", "soft" or "hard", got {self.normalization!r}'
            )

    def to_json(self) -> str:
        """Readable, deterministic JSON."""
        return (
            json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelCard:
        """Read a card back.

        Raises:
            ValueError: not JSON, another schema, missing or unknown keys.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"model card is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"model card must be a JSON object, got {type(content).__name__}")
        schema = content.pop("schema", None)
        if schema != SCHEMA_VERSION:
            raise ValueError(
                f"model card has schema {schema!r}, this release reads {SCHEMA_VERSION}"
            )
        names = {item.name for item in fields(cls)}
        optional = {"factory", "background", "scores"}
        missing, unknown = names - content.keys() - optional, content.keys() - names
        if missing or unknown:
            raise ValueError(
                f"model card: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}"
            )
        return cls(**content)

    def digest(self) -> str:
        """SHA-256 over everything that can change a score (not name, version, training facts, factory point)."""
        content = {
            key: value
            for key, value in asdict(self).items()
            if key not in _NOT_IDENTITY
            and not (key in _LATER_FIELDS and value == _LATER_FIELDS[key])
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def with_changes(self, **changes: Any) -> ModelCard:
        """A copy with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class PathIdentity:
    """Which computation produced a score; a calibration is valid for one path only.

    Attributes:
        digest: SHA-256 over weights, model card and preprocessing (decoder and resizer versions included).
        device: "cpu" or "cuda".
        precision: of the backbone, "float32" or "bfloat16".
        mode: "compiled" (torch.compile), "packed" (``openset.packing``) or "eager".
    """

    digest: str
    device: str
    precision: str
    mode: str

    @property
    def key(self) -> str:
        """Short form that names score sets, e.g. ``cpu-float32-packed-0123456789abcdef``."""
        return f"{self.device}-{self.precision}-{self.mode}-{self.digest[:16]}"


def path_digest(*, weights_sha256: str, card: ModelCard, preprocessing_identity: str) -> str:
    """SHA-256 of what fixes the scores apart from device, precision and compilation."""
    return hashlib.sha256(
        f"{weights_sha256}\n{card.digest()}\n{preprocessing_identity}".encode()
    ).hexdigest()
