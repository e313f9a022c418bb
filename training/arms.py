"""What is compared: for each cure its baseline and its variants, and the candidates for ``recommended``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from training.protocols import get_protocol


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for tables.
        loss: entry of ``training.losses.LOSSES``.
        options: of the loss, network or preset.
        preset: entry of ``training.presets.PRESETS``.
    """

    name: str
    loss: str
    options: dict[str, Any] = field(default_factory=dict)
    preset: str = "thesis"


def _sweep(loss: str, option: str, values: tuple[Any, ...], **others: Any) -> list[Arm]:
    return [Arm(f"{loss}, {option}={value}", loss, {option: value, **others}) for value in values]


# The first arm of each is the baseline. P1's scale: there lambda = .01 lies below the bound of both margins.
CURES: dict[str, list[Arm]] = {
    "arc_os": [
        Arm("norm_os (no margin)", "norm_os", {"scale": 17}),
        Arm("arc_os", "arc_os", {"scale": 17}),
        Arm("arc_os, detach_radial", "arc_os", {"scale": 17, "detach_radial": True}),
        # The published denominator, by which lambda lies farther below its bound.
        Arm("arc_os, cce_mean=known", "arc_os", {"scale": 17, "cce_mean": "known"}),
        Arm(
            "arc_os, known, detach_radial", "arc_os",
            {"scale": 17, "cce_mean": "known", "detach_radial": True},
        ),
        Arm(
            "arc_os, lambda above bound", "arc_os", {"scale": 17, "magnitude_weight": "above_bound"}
        ),
        Arm("arc_os, margin warm-up", "arc_os", {"scale": 17, "margin_warmup_epochs": 2}),
        Arm("arc_os, clipped gradient", "arc_os", {"scale": 17, "max_gradient_norm": 5.0}),
    ],
    "arc_os_stress": [
        Arm("norm_os, lambda=.001", "norm_os", {"scale": 17, "magnitude_weight": 0.001}),
        *(
            Arm(f"arc_os, lambda=.001{name}", "arc_os", {"scale": 17, "magnitude_weight": 0.001, **more})
            for name, more in (
                ("", {}), (", detach_radial", {"detach_radial": True}),
                (", margin warm-up", {"margin_warmup_epochs": 2}),
            )
        ),
        Arm("arc_os, lambda above bound", "arc_os", {"scale": 17, "magnitude_weight": "above_bound"}),
    ],
    "feature_dim": [
        arm
        for loss in ("cos_eos", "arc_eos", "norm_eos")
        for arm in (
            Arm(f"{loss}, K=C", loss),
            *(
                Arm(f"{loss}, K={dim}", loss, {"feature_dim": dim})
                for dim in ("C-1", "C+1", "4C", 512)
            ),
        )
    ],
    "scale": [
        arm
        for loss in ("cos_eos", "arc_eos")
        for arm in (
            *(
                Arm(f"{loss}, s={scale}", loss, {"scale": scale})
                for scale in ("thesis", "margin_aware", "adacos", "adacos_dynamic")
            ),
            Arm(
                f"{loss}, s=margin_aware, P=.999", loss,
                {"scale": "margin_aware", "scale_probability": 0.999},
            ),
        )
    ],
    "background": [
        *(
            Arm(name, name)
            for name in (
                "cos_eos", "arc_eos", "bg", "norm_bg", "cos_bg", "arc_bg", "cos_bg_sfn", "arc_bg_sfn",
            )
        ),
        Arm("cos_bg_sfn, no margin", "cos_bg_sfn", {"cosine_margin": 0.0}),
        Arm("cos_bg_sfn, background_margin", "cos_bg_sfn", {"background_margin": True}),
    ],
    "preset": [
        Arm(f"{loss}, {preset}", loss, preset=preset)
        for loss in ("cos_eos", "arc_eos", "os", "softmax")
        for preset in ("thesis", "modern")
    ],
    "turned_negatives": [
        Arm("cos_eos", "cos_eos"),
        *_sweep("cos_eos", "turned_negatives", (0.25, 0.5, 0.875)),
        Arm("cos_eos, modern", "cos_eos", preset="modern"),
        Arm("cos_eos, modern, turned_negatives=0.875", "cos_eos", {"turned_negatives": 0.875}, preset="modern"),
    ],
    "composed_negatives": [
        Arm("cos_eos", "cos_eos"),
        *_sweep("cos_eos", "composed_negatives", (0.25, 0.5, 1.0)),
    ],
    "margin": [
        *_sweep("cos_eos", "cosine_margin", (0.0, 0.1, 0.2, 0.35, 0.5)),
        *_sweep("arc_eos", "angular_margin", (0.0, 0.15, 0.3, 0.5, 0.7)),
        *_sweep("cos_os", "cosine_margin", (0.0, 0.1, 0.2, 0.35, 0.5)),
    ],
    "magnitude_weight": [
        *_sweep("cos_os", "magnitude_weight", (0.01, 0.001, 0.003, 0.03, 0.1)),
        *_sweep("arc_os", "magnitude_weight", (0.01, 0.001, 0.003, 0.03, 0.1)),
    ],
}  # fmt: skip

# What competes to be recommended: the thesis' best families, the cures that can be combined with them, both presets.
CANDIDATES: list[Arm] = [
    Arm("eos", "eos", preset="modern"),
    Arm("os", "os", preset="modern"),
    Arm("cos_os", "cos_os", {"detach_radial": True}, preset="modern"),
    Arm("norm_eos", "norm_eos", preset="modern"),
    Arm("cos_eos", "cos_eos", preset="modern"),
    Arm("arc_eos", "arc_eos", preset="modern"),
    Arm("cos_eos, margin_aware", "cos_eos", {"scale": "margin_aware"}, preset="modern"),
    Arm("cos_bg", "cos_bg", preset="modern"),
    Arm("arc_bg", "arc_bg", preset="modern"),
    Arm("cos_eos, thesis", "cos_eos"),
    Arm("os, thesis", "os"),
    Arm("cos_bg_sfn", "cos_bg_sfn", preset="modern"),
]

# With 7 of 8 turned, all eight ways to lie on the square are as likely.
_OF_CHARACTERS: list[Arm] = [
    Arm("cos_eos, turned", "cos_eos", {"turned_negatives": 0.875}, preset="modern"),
    Arm("cos_eos, thesis, turned", "cos_eos", {"turned_negatives": 0.875}),
    Arm(
        "cos_eos, thesis, turned, adacos", "cos_eos", {"turned_negatives": 0.875, "scale": "adacos"}
    ),
    Arm(
        "cos_eos, thesis, turned, K=512", "cos_eos", {"turned_negatives": 0.875, "feature_dim": 512}
    ),
    Arm(
        "cos_eos, thesis, turned, composed, K=512", "cos_eos",
        {"turned_negatives": 0.875, "composed_negatives": 0.5, "feature_dim": 512},
    ),
    Arm("arc_eos, thesis, turned", "arc_eos", {"turned_negatives": 0.875}),
    Arm("eos, thesis, turned", "eos", {"turned_negatives": 0.875}),
    Arm("os, thesis, turned", "os", {"turned_negatives": 0.875}),
    Arm("cos_os, thesis, turned", "cos_os", {"turned_negatives": 0.875}),
    Arm("norm_os, thesis, turned", "norm_os", {"turned_negatives": 0.875}),
    Arm("cos_bg_sfn, thesis", "cos_bg_sfn"),
    Arm("cos_bg_sfn, thesis, turned", "cos_bg_sfn", {"turned_negatives": 0.875}),
]  # fmt: skip

# What is shown no foreign image in training; they compete among themselves, where they are asked for by name.
_WITHOUT_NEGATIVES: list[Arm] = [
    Arm("sfn_cosface, thesis", "sfn_cosface"),
    Arm("cosface, thesis, K=512", "cosface", {"feature_dim": 512}),
    Arm(
        "cos_eos, thesis, composed alone, K=512", "cos_eos",
        {"composed_negatives": 1.0, "feature_dim": 512},
    ),
]  # fmt: skip


def candidates(protocol: str) -> list[Arm]:
    """What competes for a protocol; negatives are turned where they are characters."""
    is_characters = get_protocol(protocol).is_of_characters
    return [*CANDIDATES, *(_OF_CHARACTERS if is_characters else [])]


def on_request(protocol: str) -> list[Arm]:
    """What competes only where it is asked for by name: characters without a foreign image in training."""
    return _WITHOUT_NEGATIVES if get_protocol(protocol).is_of_characters else []
