"""Why a model loses knowns at a low false-positive rate: ``python -m training.low_fpr --baseline runs/A --runs runs/B``.

Two causes make the same loss of CCR: foreign samples come so near to a center that the threshold must rise, or knowns lie
so far from theirs that they fall below it. The angle to the nearest center is a ruler that models share (their scores are
not), so that one model's threshold can be laid on another's knowns. Works on stored test scores; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from openset import metrics
from openset.decision import accept
from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN, is_known
from training.cures import print_wide
from training.evaluation import SCORES_FILE
from training.intervals import seed_interval
from training.report import own_or_nearest_angle
from training.runs import write_atomically
from training.scoring import Scored

logger = logging.getLogger(__name__)

_QUANTILES = (0.05, 0.5, 0.95)


class Causes(NamedTuple):
    """A difference of CCR@FPR on the angle, and its two parts; all as differences other - baseline.

    Attributes:
        baseline: CCR of the baseline at the FPR, thresholding the angle to the nearest center.
        other: the other model's.
        foreign: part due to the threshold: how near the foreign samples come.
        known: part due to the knowns: how near to their centers they are.
        threshold_deg: angle thresholds of baseline and other, degrees.
    """

    baseline: float
    other: float
    foreign: float
    known: float
    threshold_deg: tuple[float, float]


def outcome_groups(
    scored: Scored, score: str, *, max_fpr: float, against: int
) -> dict[str, Any] | None:
    """Angles and magnitudes of what is accepted and what is rejected at CCR@FPR's threshold; None if that is unreachable.

    Args:
        scored: a test part.
        score: that is thresholded.
        max_fpr: false-positive rate of the operating point.
        against: the foreign group.

    Returns:
        ``tau``, and for each outcome its ``count``, its ``share`` of all knowns or of the foreign group, and quantiles of
        ``angle_deg`` (knowns: to their own center, foreign samples: to the nearest) and ``magnitude``.
    """
    curve = metrics.oscr_curve(
        scored.scores[score], scored.predictions, scored.labels, against=against
    )
    tau = metrics.threshold_at_fpr(curve, max_fpr=max_fpr)
    if tau is None:
        return None
    known, foreign = is_known(scored.labels), scored.labels == against
    right = known & (scored.predictions == scored.labels)
    accepted = accept(scored.scores[score], tau)
    angles = np.degrees(own_or_nearest_angle(scored))
    magnitudes = np.linalg.norm(scored.features, axis=1)
    outcomes = {
        "known, right, accepted": (right & accepted, known),
        "known, right, rejected": (right & ~accepted, known),
        "known, wrong, accepted": (known & ~right & accepted, known),
        "known, wrong, rejected": (known & ~right & ~accepted, known),
        "foreign, accepted": (foreign & accepted, foreign),
        "foreign, rejected": (foreign & ~accepted, foreign),
    }
    groups = {
        name: {
            "count": int(mask.sum()),
            "share": float(mask.sum() / of.sum()),
            "angle_deg": _quantiles(angles[mask]),
            "magnitude": _quantiles(magnitudes[mask]),
        }
        for name, (mask, of) in outcomes.items()
    }
    return {"tau": float(tau), "groups": groups}


def _quantiles(values: NDArray[np.floating[Any]]) -> dict[str, float] | None:
    if not len(values):
        return None
    return {
        f"{q:g}": float(v) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)
    }


def separate_causes(
    baseline: Scored, other: Scored, *, max_fpr: float, against: int
) -> Causes | None:
    """Split the difference of CCR@FPR between two models into the foreign samples' part and the knowns' part.

    With t the angle threshold of a model's foreign samples and F(t) the share of all knowns that are right and within it:
    F_other(t_other) - F_base(t_base) is the sum of what moving the threshold does (knowns fixed) and what changing the
    knowns does (threshold fixed), each the mean over which of the two is changed first. None where the FPR is unreachable.
    """
    nearest = {name: scored.cosines.max(axis=1) for name, scored in (("b", baseline), ("o", other))}
    taus = {}
    for name, scored in (("b", baseline), ("o", other)):
        curve = metrics.oscr_curve(
            nearest[name], scored.predictions, scored.labels, against=against
        )
        tau = metrics.threshold_at_fpr(curve, max_fpr=max_fpr)
        if tau is None:
            return None
        taus[name] = tau

    def ccr(knowns: str, threshold: str) -> float:
        scored = baseline if knowns == "b" else other
        return metrics.ccr_at_tau(
            nearest[knowns], scored.predictions, scored.labels, tau=taus[threshold]
        )

    corners = {(k, t): ccr(k, t) for k in "bo" for t in "bo"}
    foreign = (corners["o", "o"] - corners["o", "b"] + corners["b", "o"] - corners["b", "b"]) / 2
    known = (corners["o", "o"] - corners["b", "o"] + corners["o", "b"] - corners["b", "b"]) / 2
    degrees = tuple(math.degrees(math.acos(float(np.clip(taus[n], -1, 1)))) for n in "bo")
    return Causes(corners["b", "b"], corners["o", "o"], foreign, known, (degrees[0], degrees[1]))


def analyse(
    arms: Sequence[Sequence[Path]], *, score: str, max_fpr: float, against: int
) -> list[dict[str, Any]]:
    """One row an arm, a way to train with one run a seed; the first arm is the baseline of the causes.

    Run number i of an arm is compared with run number i of the baseline. Means are over the runs, None where one of them does
    not reach the FPR; intervals are Student's t over them, None for a single run.

    Returns:
        Rows of ``runs`` (what was found in each), ``ccr`` and ``causes`` (mean and interval of each figure).

    Raises:
        FileNotFoundError: a run without stored test scores.
        ValueError: a run whose scores lack this one, or arms with different numbers of runs.
    """
    if len({len(runs) for runs in arms}) > 1:
        raise ValueError(
            f"every arm needs as many runs as the baseline, the same seeds in the same order; got {[len(r) for r in arms]}"
        )
    scored = [[_stored(run, score) for run in runs] for runs in arms]
    rows = []
    for runs, parts in zip(arms, scored, strict=True):
        each = [
            _compare(run.name, baseline, part, score=score, max_fpr=max_fpr, against=against)
            for run, baseline, part in zip(runs, scored[0], parts, strict=True)
        ]
        causes = [row["causes"] for row in each]
        rows.append(
            {
                "runs": each,
                "ccr": _over_runs([row["ccr"] for row in each]),
                "causes": {
                    name: _over_runs([None if one is None else one[name] for one in causes])
                    for name in ("other", "foreign", "known")
                },
            }
        )
    return rows


def _stored(run: Path, score: str) -> Scored:
    if not (run / SCORES_FILE).is_file():
        raise FileNotFoundError(
            f"{run / SCORES_FILE} does not exist; evaluate the run first (make evaluate RUN={run})"
        )
    scored = Scored.load(run / SCORES_FILE)
    if score not in scored.scores:
        # An evaluation writes its scores in place of the stored ones.
        raise ValueError(
            f"{run} was evaluated with {', '.join(scored.scores)}, not {score}; "
            f"add it with: make evaluate RUN={run} SCORES={','.join([*scored.scores, score])}"
        )
    return scored


def _compare(
    name: str, baseline: Scored, scored: Scored, *, score: str, max_fpr: float, against: int
) -> dict[str, Any]:
    curve = metrics.oscr_curve(
        scored.scores[score], scored.predictions, scored.labels, against=against
    )
    causes = separate_causes(baseline, scored, max_fpr=max_fpr, against=against)
    return {
        "run": name,
        "ccr": metrics.ccr_at_fpr(curve, max_fpr=max_fpr),
        "causes": None if causes is None else causes._asdict(),
        "outcomes": outcome_groups(scored, score, max_fpr=max_fpr, against=against),
    }


def _over_runs(values: Sequence[float | None]) -> dict[str, Any]:
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return {"mean": None, "interval": None}
    return {"mean": float(np.mean(reached)), "interval": seed_interval(reached)}


def print_tables(rows: list[dict[str, Any]], title: str) -> None:
    """Causes of every arm against the first, then angles by outcome of every run."""
    table = Table(title=title)
    headings = ("CCR", "CCR by angle", "threshold", "due to foreign", "due to knowns")
    for heading in ("runs", *headings):
        table.add_column(heading, justify="left" if heading == "runs" else "right")
    for row in rows:
        thresholds = [
            f"{one['causes']['threshold_deg'][1]:.1f}°" for one in row["runs"] if one["causes"]
        ]
        causes = row["causes"]
        table.add_row(
            "\n".join(one["run"] for one in row["runs"]), _figure(row["ccr"]), _figure(causes["other"]),
            "\n".join(thresholds) or "-", _figure(causes["foreign"], "+"), _figure(causes["known"], "+"),
        )  # fmt: skip
    print_wide(table)
    table = Table(
        title="angle in degrees to the own (knowns) or nearest center: median [5 %, 95 %]"
    )
    runs = [one for row in rows for one in row["runs"]]
    names = list(next((one["outcomes"]["groups"] for one in runs if one["outcomes"]), {}))
    for heading in ("run", *names):
        table.add_column(heading)
    for one in runs:
        groups = one["outcomes"]["groups"] if one["outcomes"] else {}
        table.add_row(one["run"], *(_cell(groups.get(name)) for name in names))
    print_wide(table)


def _figure(found: dict[str, Any], sign: str = "") -> str:
    """Mean and, from two runs on, the half-width of its interval over seeds."""
    if found["mean"] is None:
        return "-"
    half = "" if found["interval"] is None else f" ±{found['interval'][1] - found['mean']:.4f}"
    return f"{found['mean']:{sign}.4f}{half}"


def _cell(group: dict[str, Any] | None) -> str:
    if group is None or group["angle_deg"] is None:
        return "-"
    low, median, high = group["angle_deg"].values()
    return f"{group['share']:.3f}: {median:.0f} \\[{low:.0f}, {high:.0f}]"


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m training.low_fpr", description=__doc__)
    parser.add_argument(
        "--baseline", type=_paths, required=True, metavar="RUN[,RUN...]",
        help="folder of an evaluated run; several, comma-separated: the seeds of one way to train",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=_paths, nargs="*", default=[], metavar="RUN[,RUN...]",
        help="others, compared to it, each with as many seeds in the same order",
    )  # fmt: skip
    parser.add_argument("--fpr", type=float, default=1e-2)
    parser.add_argument("--score", default="softmax")
    groups = {name: label for label, name in GROUP_NAMES.items() if label in (NEGATIVE, UNKNOWN)}
    parser.add_argument("--against", choices=sorted(groups), default="unknown")
    parser.add_argument("--json", type=Path, help="also write the rows")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        rows = analyse(
            [arguments.baseline, *arguments.runs],
            score=arguments.score,
            max_fpr=arguments.fpr,
            against=groups[arguments.against],
        )
    except (FileNotFoundError, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    print_tables(
        rows, f"CCR at FPR {arguments.fpr:g} against {arguments.against}s, {arguments.score} score"
    )
    if arguments.json is not None:
        settings = {
            "fpr": arguments.fpr, "score": arguments.score, "against": arguments.against,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, json.dumps(settings | {"rows": rows}, indent=2) + "\n")
        logger.info("written: %s", arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
