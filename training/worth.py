"""Whether a model is worth a threshold at all: a promise that is kept by rejecting nearly everything is no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openset.labels import GROUP_NAMES, NEGATIVE

# An AUROC of .5 is a guess. Below these nobody should serve a model without having looked at it.
LEAST_AUROC = 0.6
LEAST_CCR = 0.05


def doubt(run: Path, *, auroc: float | None, ccr: float | None, shown_by: str) -> str | None:
    """One sentence on a model that is near worthless, with the figures and where to look; None for any other.

    Args:
        run: folder of the run.
        auroc: knowns against negatives; None where there are no negatives.
        ccr: at the factory threshold; None where there is none.
        shown_by: what shows more, a command or a folder.
    """
    reasons = []
    if auroc is not None and auroc < LEAST_AUROC:
        reasons.append(f"AUROC {auroc:.3f} of knowns against negatives (0.5 is a guess)")
    if ccr is not None and ccr < LEAST_CCR:
        reasons.append(f"CCR {ccr:.4f} at the factory threshold (share of knowns with their label)")
    if not reasons:
        return None
    return (
        f"this model is near worthless, {' and '.join(reasons)}; look at {run / 'history.json'}, whether the loss falls and "
        f"the accuracy is above a guess, and at {shown_by}"
    )


def doubt_of_report(run: Path, report: dict[str, Any]) -> str | None:
    """The same of an evaluation's report: the best score's AUROC, the CCR of the artifact's threshold on the test."""
    negative = GROUP_NAMES[NEGATIVE]
    found = [
        groups[negative]["auroc"] for groups in report["scores"].values() if negative in groups
    ]
    factory = report["factory"]
    return doubt(
        run,
        auroc=max(found, default=None),
        ccr=None if factory is None else factory["ccr"],
        shown_by=str(run / "figures"),
    )
