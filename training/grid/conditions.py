"""What the thesis trained and tested with beside ours: its tables 5.1 (images) and 5.2 (hyperparameters)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.grid.formatting import table
from training.grid.plan import all_classes, default_epochs
from training.grid.rows import Row
from training.options import options_of
from training.protocols import get_protocol
from training.published import published_counts, published_hyperparameters


def sections(protocol: str, rows: Sequence[Row]) -> list[str]:
    """Both tables under a heading; empty where the thesis says nothing of the protocol."""
    counts, values = published_counts(protocol), published_hyperparameters(protocol)
    if not values:
        return []
    parts = ["## What was trained and tested with"]
    if counts:
        parts += [
            "Images (the thesis' table 5.1, and the sizes of P1 to P3), ours as the newest run on all classes found them:",
            _counts_table(counts, _own_counts(protocol, rows)),
        ]
    return [
        *parts,
        "Hyperparameters (its table 5.2), ours the defaults of `PRESET=thesis`; –: not used there:",
        _hyperparameter_table(values, own_hyperparameters(protocol)),
    ]


# Together they have all margins and the magnitude term.
_LOSSES = ("sphereface", "cos_os", "arc_os", "sm_softmax")
_OPTION_OF = {
    "K": "feature_dim", "s": "scale", "m_mult": "multiplicative_margin", "m_cos": "cosine_margin",
    "m_ang": "angular_margin", "m_logit": "logit_margin", "lambda": "magnitude_weight",
}  # fmt: skip


def own_hyperparameters(protocol: str) -> dict[str, float]:
    """The defaults of the thesis preset, by the names of the thesis' table."""
    num_classes = len(get_protocol(protocol).known)
    defaults: dict[str, Any] = {
        option.name: option.default
        for loss in _LOSSES
        for group in ("loss", "preset")
        for option in options_of(protocol, loss, "thesis")[group]
    }
    defaults |= {"C": num_classes, "epochs": default_epochs(protocol)}
    if defaults["feature_dim"] == "C":
        defaults["feature_dim"] = num_classes
    names = published_hyperparameters(protocol)
    return {name: defaults[_OPTION_OF.get(name, name)] for name in names}


def _own_counts(protocol: str, rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    complete = [row for row in rows if row["classes"] == all_classes(protocol) and "counts" in row]
    newest: dict[str, Any] = max(complete, key=lambda row: row["evaluated"], default={})
    found: dict[str, dict[str, int]] = newest.get("counts", {})
    return found


def _counts_table(thesis: dict[str, dict[str, int]], ours: dict[str, dict[str, int]]) -> str:
    lines = [
        [f"{part}, {group}", f"{count:,}", f"{ours[part][group]:,}" if part in ours else ""]
        for part, counts in thesis.items()
        for group, count in counts.items()
        if count
    ]
    return table(["part", "thesis", "ours"], lines)


def _hyperparameter_table(thesis: dict[str, float | None], ours: dict[str, float]) -> str:
    lines = [
        [name.replace("_", " "), "–" if value is None else f"{value:g}", f"{ours[name]:g}"]
        for name, value in thesis.items()
    ]
    return table(["", "thesis", "ours"], lines)
