"""Figures of a run: OSCR, angles with probability curves, score histograms, deep features."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from openset import metrics
from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN, is_known
from training.angles import EDGES, Angles, ProbabilityCurve, angles_of
from training.protocols import get_protocol
from training.report import group_masks
from training.runs import TrainConfig
from training.scoring import Scored

# From Okabe and Ito's palette: told apart by all kinds of color vision; they also differ in lightness and line.
COLORS = {"known": "#0072B2", "negative": "#E69F00", "unknown": "#000000"}
_LINES = {"known": "-", "negative": "-", "unknown": ":"}
# Ten colors chosen for color vision deficiency (Petroff 2021); classes carry their name in the figure as well.
_CLASS_COLORS = "petroff10"
_FOREIGN_DOTS = {NEGATIVE: "#8c8c8c", UNKNOWN: "black"}
_DOTS: dict[str, Any] = {"s": 3, "alpha": 0.5, "linewidths": 0}
_SCORE_STYLE = {"softmax": ("#0072B2", "-"), "logit": ("#009E73", "--")}
_LETTERS_AN_INCH = 12  # of a title
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "font.size": 9,
    "legend.frameon": False,
}


def draw_all(scored: Scored, config: TrainConfig, folder: Path, *, title: str) -> None:
    """Write every figure that the data allow, as PNG."""
    folder.mkdir(exist_ok=True)
    drawings = {"angles": draw_angles, "scores": draw_scores}
    if not is_known(scored.labels).all():
        drawings["oscr"] = draw_oscr
    if scored.features.shape[1] == 2:
        drawings["features"] = draw_features
    for name, draw in drawings.items():
        with mpl.rc_context(STYLE):
            figure = draw(scored, config)
            figure.suptitle(title)
            figure.savefig(folder / f"{name}.png", dpi=150)


def draw_oscr(scored: Scored, config: TrainConfig) -> Figure:
    """CCR against FPR (logarithmic), one panel for each foreign group; there must be one."""
    groups = [label for label in (NEGATIVE, UNKNOWN) if (scored.labels == label).any()]
    figure = Figure(figsize=(4.2 * len(groups), 3.6), layout="constrained")
    for axes, label in zip(
        np.atleast_1d(figure.subplots(1, len(groups), sharey=True)), groups, strict=True
    ):
        for name, scores in scored.scores.items():
            curve = metrics.oscr_curve(scores, scored.predictions, scored.labels, against=label)
            color, line = _SCORE_STYLE.get(name, ("black", ":"))
            axes.plot(curve.fpr, curve.ccr, line, color=color, label=f"{name} thresholds")
        axes.set(
            xscale="log", xlim=(8e-5, 1.4), ylim=(0, 1.02),
            xlabel=f"FPR on {GROUP_NAMES[label]}s", title=f"against {GROUP_NAMES[label]}s",
        )  # fmt: skip
    figure.axes[0].set_ylabel("CCR")
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    """One legend below the panels: a curve may pass anywhere inside them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))


def draw_angles(scored: Scored, config: TrainConfig) -> Figure:
    """Angles to the own (known) or nearest (foreign) center, with the probability that the loss gives to an angle."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    angle_panel(figure.subplots(), angles_of(scored, config))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def angle_panel(axes: Axes, angles: Angles) -> None:
    """The angle histograms and probability curves in one panel."""
    for group, counts in angles.counts.items():
        _histogram(axes, group, counts, EDGES)
    axes.set(
        xlim=(0, math.pi),
        ylim=(0, 7),
        xlabel="angle to the own (known) or nearest center",
        ylabel="density",
    )
    axes.set_xticks([i * math.pi / 4 for i in range(5)], ["0", "π/4", "π/2", "3π/4", "π"])
    if angles.curve is not None:
        _probability_curves(axes, angles.curve)


def _histogram(
    axes: Axes, group: str, counts: NDArray[np.int64], edges: NDArray[np.float64]
) -> None:
    """The density of a group: a light area and an outline, so that overlapping groups stay readable."""
    density = counts / (counts.sum() * np.diff(edges))
    axes.stairs(density, edges, fill=True, alpha=0.25, color=COLORS[group])
    axes.stairs(
        density, edges, lw=1.3, ls=_LINES[group], color=COLORS[group], label=f"{group} ({counts.sum():,})",
    )  # fmt: skip


def _probability_curves(axes: Axes, curve: ProbabilityCurve) -> None:
    """In use (solid) and in training (dashed)."""
    theta = np.linspace(0, math.pi, 400)
    twin = axes.twinx()
    style: dict[str, Any] = {"color": "#009E73", "lw": 1.5}
    name = "P(θ)" if curve.exact else "P(θ), approximate"
    twin.plot(theta, curve.without_margin(theta), label=name, **style)
    with_margin = curve.with_margin(theta)
    if with_margin is not None:
        twin.plot(theta, with_margin, "--", label="with margin", **style)
    twin.set(ylim=(0, 1.05), ylabel="probability")
    twin.grid(visible=False)


def draw_scores(scored: Scored, config: TrainConfig) -> Figure:
    """Histogram of each score by group."""
    figure = Figure(figsize=(4.2 * len(scored.scores), 3.4), layout="constrained")
    for axes, (name, scores) in zip(
        np.atleast_1d(figure.subplots(1, len(scored.scores))), scored.scores.items(), strict=True
    ):
        edges = np.histogram_bin_edges(scores, 80)
        for group, mask in group_masks(scored.labels).items():
            _histogram(axes, group, np.histogram(scores[mask], edges)[0], edges)
        axes.set(
            xlabel=f"{name} score" + (" (log-odds)" if name == "softmax" else ""), ylabel="density"
        )
    _legend_below(figure)
    return figure


def draw_features(scored: Scored, config: TrainConfig) -> Figure:
    """Four panels of two-dimensional features: knowns; with negatives; with unknowns; directions with centers."""
    figure = Figure(figsize=(8.4, 8.8), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    foreign = {"knowns": None, "with negatives": NEGATIVE, "with unknowns": UNKNOWN}
    for axes, (title, label) in zip(panels[:3], foreign.items(), strict=True):
        feature_panel(axes, scored, config, foreign=label)
        axes.set_title(title)
    known = is_known(scored.labels)
    lengths = np.linalg.norm(scored.features[known], axis=1, keepdims=True).clip(1e-12)
    unit = _unit_centers(scored)
    directions, colors = scored.features[known] / lengths, _class_colors(scored.labels[known])
    panels[3].scatter(directions[:, 0], directions[:, 1], c=colors, **_DOTS)
    for center, color in zip(unit, _class_colors(np.arange(len(unit))), strict=True):
        panels[3].plot([0, center[0]], [0, center[1]], color=color)
    panels[3].set(title="directions of knowns; lines: centers", aspect="equal")
    panels[3].set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    _name_classes(panels[3], 1.14 * unit, config)
    return figure


def feature_panel(axes: Axes, scored: Scored, config: TrainConfig, *, foreign: int | None) -> None:
    """Two-dimensional features of knowns, colored by class, and on them of NEGATIVE (gray) or UNKNOWN (black) samples."""
    features = scored.features
    known = is_known(scored.labels)
    colors = _class_colors(scored.labels[known])
    axes.scatter(features[known, 0], features[known, 1], c=colors, **_DOTS)
    if foreign is not None:
        color = _FOREIGN_DOTS[foreign]
        shown = features[scored.labels == foreign]
        axes.scatter(shown[:, 0], shown[:, 1], color=color, **_DOTS)
    # Some features lie far out; all but the outermost thousandth are shown, at one scale in all panels of a model.
    reach = 1.15 * float(np.quantile(np.abs(features), 0.999)) or 1.0
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    _name_classes(axes, 0.93 * reach * _unit_centers(scored), config)


def _unit_centers(scored: Scored) -> NDArray[np.floating[Any]]:
    lengths = np.linalg.norm(scored.centers, axis=1, keepdims=True).clip(1e-12)
    unit: NDArray[np.floating[Any]] = scored.centers / lengths
    return unit


def _class_colors(labels: NDArray[np.integer[Any]]) -> list[Any]:
    palette = mpl.color_sequences[_CLASS_COLORS]
    return [palette[label % len(palette)] for label in labels]


def _name_classes(axes: Axes, positions: NDArray[np.floating[Any]], config: TrainConfig) -> None:
    """Each class's name in the direction of its center: color alone does not tell ten classes apart."""
    names: Sequence[str] = get_protocol(config.protocol).known
    if len(names) != len(
        positions
    ):  # trained on the classes that were there; ranks name them safely
        names = [str(number) for number in range(len(positions))]
    for name, (x, y) in zip(names, positions.tolist(), strict=True):
        axes.annotate(name, (x, y), ha="center", va="center", fontsize=8)


def title_figure(figure: Figure, title: str) -> None:
    """A title above all panels, in as many lines as the figure's width asks for."""
    letters = min(110, int(_LETTERS_AN_INCH * figure.get_figwidth()))
    figure.suptitle(textwrap.fill(title, letters), fontsize=9)
