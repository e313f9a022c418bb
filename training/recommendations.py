"""One recommended default per protocol: loss, options, preset and score; ``LOSS=recommended`` trains it.

Each is to be chosen by ``python -m training.recommend`` on training and validation data alone: no image of the test and no
unknown class takes part. The evidence is a file of the measured rows; an entry without enough of it is provisional.
Toy's digits have two sources, and with each the rule takes another model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RECOMMENDED = "recommended"


@dataclass(frozen=True)
class Recommendation:
    """What a user should take who has no reason for anything else.

    Attributes:
        loss: entry of ``training.losses.LOSSES``.
        preset: entry of ``training.presets.PRESETS``.
        scores: what the model is exported with; the export chooses among them on its selection part.
        evidence: file of the rows it was chosen from, or why there is none yet.
        provisional: whether the evidence is thin.
        options: of the loss, network or preset.
    """

    loss: str
    preset: str
    scores: tuple[str, ...]
    evidence: str
    provisional: bool
    options: dict[str, Any] = field(default_factory=dict)


# Published figures are on unknown test classes and may not choose what is recommended.
RECOMMENDATIONS: dict[str, Recommendation] = {
    "glyphs": Recommendation(
        "cos_eos",
        "modern",
        ("logit",),
        evidence="docs/results/recommend-glyphs.json",
        provisional=True,
    ),
    **{
        protocol: Recommendation(
            "os",
            "modern",
            ("softmax",),
            evidence=f"docs/results/recommend-{protocol}.json",
            provisional=True,
        )
        for protocol in ("p1", "p3")
    },
    # What P1 and P3 chose: its photographs are of the same kind.
    "p2": Recommendation(
        "os",
        "modern",
        ("softmax",),
        evidence="none yet; make recommend PROTOCOL=p2",
        provisional=True,
    ),
    # The first of three that cannot be told apart on one tree of photographs; another tree may choose otherwise.
    "folders": Recommendation(
        "eos",
        "modern",
        ("softmax",),
        evidence="docs/results/recommend-folders.json",
        provisional=True,
    ),
    "toy_vis": Recommendation(
        "eos",
        "modern",
        ("softmax",),
        evidence="docs/results/recommend-toy_vis.json",
        provisional=True,
    ),
    "toy": Recommendation(
        "eos",
        "thesis",
        ("softmax",),
        evidence="docs/results/recommend-toy-eos.json",
        provisional=True,
        options={"turned_negatives": 0.875},
    ),
}

# Where MNIST's digits have a choice of their own.
RECOMMENDATIONS_WITH_MNIST: dict[str, Recommendation] = {
    "toy": Recommendation(
        "cos_eos",
        "thesis",
        ("logit",),
        evidence="docs/results/recommend-toy-mnist.json",
        provisional=True,
        options={"turned_negatives": 0.875, "feature_dim": 512},
    ),
}


def recommendation(protocol: str, digits: str | None = None) -> Recommendation:
    """The recommended default of a protocol.

    Args:
        protocol: entry of ``training.protocols.PROTOCOLS``.
        digits: their source, where there are two; None for EMNIST's.

    Raises:
        ValueError: no such protocol.
    """
    if protocol not in RECOMMENDATIONS:
        raise ValueError(f"protocol must be one of {sorted(RECOMMENDATIONS)}, got {protocol!r}")
    if digits == "mnist" and protocol in RECOMMENDATIONS_WITH_MNIST:
        return RECOMMENDATIONS_WITH_MNIST[protocol]
    return RECOMMENDATIONS[protocol]
