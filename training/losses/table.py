"""The table of losses: every recipe of the thesis is one entry (van den Bergh 2023, chapters 3 and 4), and ours beyond it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from training.losses.margins import (
    AngularMargin,
    AnyMargin,
    CosineMargin,
    LogitMargin,
    MultiplicativeAngularMargin,
)

RING = "ring"
OBJECTOSPHERE = "objectosphere"
SYMMETRIC_OBJECTOSPHERE = "symmetric_objectosphere"


@dataclass(frozen=True)
class LossSpec:
    """What makes a loss.

    Attributes:
        title: the thesis' name.
        normalization: of the head, "none", "soft" or "hard".
        margin: on the target of knowns, or None.
        entropic: entropic open-set loss instead of plain cross-entropy.
        magnitude: magnitude term (ring, objectosphere, symmetric_objectosphere), or None.
        uses_negatives: whether negatives are shown in training.
        unit_centers: False leaves the centers of a soft head free (published SFN-Norm).
        cce_mean: "all" divides the cross-entropy by N, "known" by the number of knowns.
        center_norm: see ``openset.heads.NormalizedHead``.
        background: negatives are a class of their own with a center beside the C centers of the knowns.
        background_margin: negatives get the margin on the background center too.
    """

    title: str
    normalization: str
    margin: AnyMargin | None = None
    entropic: bool = False
    magnitude: str | None = None
    uses_negatives: bool = False
    unit_centers: bool = True
    cce_mean: str = "all"
    center_norm: str = "differentiable"
    background: bool = False
    background_margin: bool = False

    @property
    def head(self) -> str:
        """Normalization of the head that is built."""
        return self.normalization if self.unit_centers else "none"


_COS, _ARC = CosineMargin(), AngularMargin()

THESIS_LOSSES: dict[str, LossSpec] = {
    "softmax": LossSpec("Softmax", "none"),
    "eos": LossSpec("EOS", "none", entropic=True, uses_negatives=True),
    "os": LossSpec(
        "Objectosphere", "none", entropic=True, magnitude=OBJECTOSPHERE, uses_negatives=True
    ),
    "sm_softmax": LossSpec("SM-Softmax", "none", LogitMargin()),
    "sphereface": LossSpec("SphereFace", "hard", MultiplicativeAngularMargin()),
    "cosface": LossSpec("CosFace", "hard", _COS),
    "arcface": LossSpec("ArcFace", "hard", _ARC),
    "sfn_norm": LossSpec("SFN-Norm", "soft", magnitude=RING),
    "sfn_cosface": LossSpec("SFN-CosFace", "soft", _COS, magnitude=RING),
    "sfn_arcface": LossSpec("SFN-ArcFace", "soft", _ARC, magnitude=RING),
    "norm_os": LossSpec("Norm-OS", "soft", magnitude=SYMMETRIC_OBJECTOSPHERE, uses_negatives=True),
    "cos_os": LossSpec(
        "Cos-OS", "soft", _COS, magnitude=SYMMETRIC_OBJECTOSPHERE, uses_negatives=True
    ),
    "arc_os": LossSpec(
        "Arc-OS", "soft", _ARC, magnitude=SYMMETRIC_OBJECTOSPHERE, uses_negatives=True
    ),
    "cos_os_nonsym": LossSpec(
        "Cos-OS (non-sym.)", "soft", _COS, magnitude=OBJECTOSPHERE, uses_negatives=True
    ),
    "arc_os_nonsym": LossSpec(
        "Arc-OS (non-sym.)", "soft", _ARC, magnitude=OBJECTOSPHERE, uses_negatives=True
    ),
    "norm_eos": LossSpec("Norm-EOS", "hard", entropic=True, uses_negatives=True),
    "cos_eos": LossSpec("Cos-EOS", "hard", _COS, entropic=True, uses_negatives=True),
    "arc_eos": LossSpec("Arc-EOS", "hard", _ARC, entropic=True, uses_negatives=True),
    "cos_eos_sfn": LossSpec(
        "Cos-EOS (SFN)", "soft", _COS, entropic=True, magnitude=RING, uses_negatives=True
    ),
    "arc_eos_sfn": LossSpec(
        "Arc-EOS (SFN)", "soft", _ARC, entropic=True, magnitude=RING, uses_negatives=True
    ),
}

# Beyond the thesis: its future work, a background class together with a margin (science reference section 8.4).
BACKGROUND_LOSSES: dict[str, LossSpec] = {
    "bg": LossSpec("Background", "none", uses_negatives=True, background=True),
    "norm_bg": LossSpec("Norm-BG", "hard", uses_negatives=True, background=True),
    "cos_bg": LossSpec("Cos-BG", "hard", _COS, uses_negatives=True, background=True),
    "arc_bg": LossSpec("Arc-BG", "hard", _ARC, uses_negatives=True, background=True),
    "cos_bg_sfn": LossSpec(
        "Cos-BG (SFN)", "soft", _COS, magnitude=RING, uses_negatives=True, background=True
    ),
    "arc_bg_sfn": LossSpec(
        "Arc-BG (SFN)", "soft", _ARC, magnitude=RING, uses_negatives=True, background=True
    ),
}

LOSSES = THESIS_LOSSES | BACKGROUND_LOSSES

# Where the author's code differs from the thesis' text; these made the published numbers.
_PUBLISHED_CHANGES: dict[str, dict[str, Any]] = {
    "sfn_norm": {"unit_centers": False},
    "cos_eos_sfn": {"normalization": "hard"},
    "arc_eos_sfn": {"normalization": "hard"},
    **{
        name: {"cce_mean": "known"}
        for name in ("norm_os", "cos_os", "arc_os", "cos_os_nonsym", "arc_os_nonsym")
    },
}
AS_PUBLISHED: dict[str, LossSpec] = {
    name: replace(spec, center_norm="projected", **_PUBLISHED_CHANGES.get(name, {}))
    for name, spec in THESIS_LOSSES.items()
}

# What each of these changes does, for people.
_MEANING = {
    "normalization": "a hard head with the fixed radius s in place of the soft one; the ring term stays",
    "unit_centers": "centers of any length: softmax with a ring term",
    "cce_mean": "the cross-entropy is divided by the number of knowns, the magnitude term by that of all samples",
    "center_norm": "centers are brought to unit length before each step, outside the gradient",
}


@dataclass(frozen=True)
class Deviation:
    """Where the author's code differs from the thesis' text.

    Attributes:
        field: of ``LossSpec``.
        text: its value by the thesis' text.
        code: its value in the author's code.
        meaning: what that does, for people.
    """

    field: str
    text: Any
    code: Any
    meaning: str


def published_deviations(loss: str) -> list[Deviation]:
    """What the author's code did otherwise for a loss of the thesis; how centers are normalized, only where they are."""
    text, code = THESIS_LOSSES[loss], AS_PUBLISHED[loss]
    return [
        Deviation(name, getattr(text, name), getattr(code, name), _MEANING[name])
        for name in vars(text)
        if getattr(text, name) != getattr(code, name)
        and not (name == "center_norm" and code.head == "none")
    ]


# Table 5.2: scale s (= target magnitude xi), margins and epochs; lambda is .01 everywhere. "glyphs" follows the toy
# protocol with fewer epochs; "folders" follows p1, with s by the rule that made the others' (eq. 3.11) for the classes that
# are there. Feature dimension 0 = as many as classes, the thesis' choice.
_WIDE = {"cosine_margin": 0.35, "angular_margin": 0.5}
_PLANE = {"cosine_margin": 0.15, "angular_margin": 0.4}
_PROTOCOLS: dict[str, dict[str, Any]] = {
    "p1": {"scale": 17.0, "epochs": 120, "feature_dim": 0, **_WIDE},
    "p2": {"scale": 16.0, "epochs": 120, "feature_dim": 0, **_WIDE},
    "p3": {"scale": 18.0, "epochs": 120, "feature_dim": 0, **_WIDE},
    "toy": {"scale": 13.0, "epochs": 15, "feature_dim": 10, **_WIDE},
    "toy_vis": {"scale": 13.0, "epochs": 15, "feature_dim": 2, **_PLANE},
    "folders": {"scale": "thesis", "epochs": 120, "feature_dim": 0, **_WIDE},
    "glyphs": {"scale": 13.0, "epochs": 3, "feature_dim": 10, **_WIDE},
}


def protocol_defaults(protocol: str, loss: str) -> dict[str, Any]:
    """Hyperparameters of a loss on a protocol (thesis table 5.2).

    Returns:
        ``scale`` (a number, or the rule that makes one), ``feature_dim`` (0: as many as classes), ``epochs`` and, where
        the loss has one, its margin and ``magnitude_weight``.
    """
    if protocol not in _PROTOCOLS:
        raise ValueError(f"protocol must be one of {sorted(_PROTOCOLS)}, got {protocol!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {sorted(LOSSES)}, got {loss!r}")
    values, spec = _PROTOCOLS[protocol], LOSSES[loss]
    chosen = {key: values[key] for key in ("scale", "feature_dim", "epochs")}
    if isinstance(spec.margin, CosineMargin):
        chosen["cosine_margin"] = values["cosine_margin"]
    if isinstance(spec.margin, AngularMargin):
        chosen["angular_margin"] = values["angular_margin"]
    if spec.magnitude is not None:
        chosen["magnitude_weight"] = 0.01
    return chosen
