"""The report of a run: every open-set figure with its interval, as JSON and as a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from openset import metrics
from openset.decision import accept
from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN, is_known
from training.scoring import Scored

SCHEMA = 1
FPR_TARGETS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def build_report(
    scored: Scored,
    *,
    config: dict[str, Any],
    notes: list[str],
    counts: dict[str, Any],
    factory: dict[str, Any] | None,
    rule: str = "inclusive",
    repeats: int = 300,
) -> dict[str, Any]:
    """All figures of a test part.

    Args:
        scored: the test part, knowns with negatives and unknowns; a foreign group that is not there has no figures.
        config: of the run.
        notes: what a reader must be told.
        counts: samples by part and group.
        factory: operating point of the artifact, or None.
        rule: of CCR@FPR, "inclusive" (FPR <= target) or "strict" (FPR < target, as published).
        repeats: bootstrap replicates of each interval.
    """
    known = is_known(scored.labels)
    correct = int((scored.predictions == scored.labels)[known].sum())
    foreign = [label for label in (NEGATIVE, UNKNOWN) if (scored.labels == label).any()]
    return {
        "schema": SCHEMA,
        "config": config,
        "notes": notes,
        "counts": counts,
        "rule": rule,
        "accuracy": {
            "value": correct / int(known.sum()),
            "interval": metrics.clopper_pearson(correct, int(known.sum())),
        },
        "scores": {
            name: {
                GROUP_NAMES[label]: _against(scored, name, label, rule, repeats)
                for label in foreign
            }
            for name in scored.scores
        },
        "center_angles_deg": _center_angles(scored.centers),
        "feature_magnitudes": _by_group(scored, np.linalg.norm(scored.features, axis=1)),
        "angles_deg": _by_group(scored, np.degrees(own_or_nearest_angle(scored))),
        "factory": None if factory is None else _at_factory(scored, factory),
    }


def group_masks(labels: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Which samples are "known", "negative" and "unknown", (N,) each; of the groups that there are."""
    masks = {"known": is_known(labels)}
    masks |= {name: labels == label for label, name in GROUP_NAMES.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def own_or_nearest_angle(scored: Scored) -> NDArray[np.float32]:
    """Angle to the own class's center for knowns, to the nearest center for foreign samples; radians, (N,)."""
    own = np.take_along_axis(scored.cosines, scored.labels.clip(0)[:, None], axis=1)[:, 0]
    cosines = np.where(is_known(scored.labels), own, scored.cosines.max(axis=1))
    angles: NDArray[np.float32] = np.arccos(cosines.clip(-1, 1))
    return angles


def _against(scored: Scored, name: str, label: int, rule: str, repeats: int) -> dict[str, Any]:
    scores = scored.scores[name]
    curve = metrics.oscr_curve(scores, scored.predictions, scored.labels, against=label)
    # With every prediction taken as right, the CCR is the share of knowns that are accepted: 1 - false-negative rate.
    acceptance = metrics.oscr_curve(scores, scored.labels, scored.labels, against=label)
    known_count = int(is_known(scored.labels).sum())
    values = {
        target: metrics.ccr_at_fpr(curve, max_fpr=target, rule=rule) for target in FPR_TARGETS
    }
    reached = [target for target, value in values.items() if value is not None]
    by_image, by_class = (
        metrics.bootstrap_ccr_at_fprs(
            scores, scored.predictions, scored.labels, scored.groups,
            against=label, max_fprs=reached, rule=rule, clustered=clustered, repeats=repeats,
        )
        for clustered in (False, True)
    )  # fmt: skip
    ccr = {}
    for target, value in values.items():
        accepted = metrics.ccr_at_fpr(acceptance, max_fpr=target, rule=rule)
        ccr[f"{target:g}"] = {
            "value": value,
            "interval": by_image.get(target),
            "interval_clustered": by_class.get(target),
            # At this very threshold; the bootstraps also cover the choice of the threshold.
            "interval_binomial": None
            if value is None
            else metrics.clopper_pearson(round(value * known_count), known_count),
            "false_negative_rate": None if accepted is None else 1 - accepted,
        }
    return {
        "ccr_at_fpr": ccr,
        "ccr_at_zero_fpr": metrics.ccr_at_zero_fpr(
            scores, scored.predictions, scored.labels, against=label
        ),
        "auroc": metrics.auroc(scores, scored.labels, against=label),
        "count": curve.foreign_count,
    }


def _center_angles(centers: NDArray[np.float32]) -> dict[str, Any]:
    unit = centers / np.linalg.norm(centers, axis=1, keepdims=True).clip(1e-12)
    angles = np.degrees(np.arccos((unit @ unit.T).clip(-1, 1)))
    apart = angles[~np.eye(len(angles), dtype=bool)]
    return {
        "min": float(apart.min()),
        "mean": float(apart.mean()),
        "max": float(apart.max()),
        "matrix": np.round(angles, 2).tolist(),
    }


def _by_group(scored: Scored, values: NDArray[Any]) -> dict[str, Any]:
    return {
        name: {
            "mean": float(values[mask].mean()),
            "std": float(values[mask].std()),
            "quantiles": {
                f"{q:g}": float(v)
                for q, v in zip(_QUANTILES, np.quantile(values[mask], _QUANTILES), strict=True)
            },
        }
        for name, mask in group_masks(scored.labels).items()
    }


def _at_factory(scored: Scored, factory: dict[str, Any]) -> dict[str, Any]:
    """What the artifact's threshold realises on the test part."""
    scores, tau = scored.scores[factory["score_type"]], np.float32(factory["tau"])
    known = is_known(scored.labels)
    knowns, accepted_known = int(known.sum()), int(accept(scores[known], tau).sum())
    correct = known & (scored.predictions == scored.labels)
    accepted_correct = int(accept(scores[correct], tau).sum())
    rows: dict[str, Any] = {}
    for label, name in GROUP_NAMES.items():
        mask = scored.labels == label
        if mask.any():
            accepted = int(accept(scores[mask], tau).sum())
            rows[name] = {
                "accepted": accepted,
                "count": int(mask.sum()),
                "fpr": accepted / int(mask.sum()),
                "interval": metrics.clopper_pearson(accepted, int(mask.sum())),
            }
    return {
        "operating_point": factory,
        "ccr": metrics.ccr_at_tau(scores, scored.predictions, scored.labels, tau=tau),
        "ccr_interval": metrics.clopper_pearson(accepted_correct, knowns),
        "false_negative_rate": 1 - accepted_known / knowns,
        "false_negative_rate_interval": metrics.clopper_pearson(knowns - accepted_known, knowns),
        "realised_fpr": rows,
    }


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The report as tables on the terminal."""
    console = console or Console()
    config = report["config"]
    table = Table(
        title=f"{config['protocol']} · {config['loss']} · CCR at FPR (95 % bootstrap interval)"
    )
    table.add_column("score", no_wrap=True)
    table.add_column("against", no_wrap=True)
    for target in FPR_TARGETS[:-1]:
        table.add_column(f"{target:g}", justify="right")
    for heading in ("FPR 0", "AUROC"):
        table.add_column(heading, justify="right")
    for score, groups in report["scores"].items():
        for group, row in groups.items():
            cells = [_cell(row["ccr_at_fpr"][f"{target:g}"]) for target in FPR_TARGETS[:-1]]
            table.add_row(
                score, group, *cells, _number(row["ccr_at_zero_fpr"]), _number(row["auroc"])
            )
    if any(report["scores"].values()):
        console.print(table)
    else:
        console.print(
            "the test part holds no foreign images: how well they are rejected is not measured"
        )
    low, high = report["accuracy"]["interval"]
    console.print(f"closed-set accuracy {report['accuracy']['value']:.4f} [{low:.4f}, {high:.4f}]")
    if report["factory"] is not None:
        point = report["factory"]["operating_point"]
        console.print(
            f"factory threshold: tau {point['tau']:.4f} ({point['score_type']}), promised FPR <= {point['fpr']:g} "
            f"at confidence {point['confidence']:g}; realised CCR {report['factory']['ccr']:.4f}, "
            f"knowns rejected {report['factory']['false_negative_rate']:.4f}"
        )
        for group, row in report["factory"]["realised_fpr"].items():
            console.print(
                f"  realised FPR against test {group}s: {row['fpr']:.4f} "
                f"[{row['interval'][0]:.4f}, {row['interval'][1]:.4f}] ({row['accepted']} of {row['count']})"
            )
    between = report["center_angles_deg"]
    console.print(
        f"angles between centers: smallest {between['min']:.1f}°, mean {between['mean']:.1f}°; feature magnitudes: "
        + ", ".join(
            f"{group} {row['mean']:.2f} ± {row['std']:.2f}"
            for group, row in report["feature_magnitudes"].items()
        )
    )
    for note in report["notes"]:
        # A note may hold brackets, which rich would take for markup and swallow.
        console.print(f"note: {note}", style="yellow", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cell(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "-"
    interval = row["interval"]
    return f"{row['value']:.4f}" + (
        "" if interval is None else f"\n[{interval[0]:.3f}, {interval[1]:.3f}]"
    )
