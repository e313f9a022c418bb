"""Figures of a run: OSCR, angles with probability curves, score histograms, deep features."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from openset import metrics
from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN, is_known
from training.report import own_or_nearest_angle
from training.runs import TrainConfig
from training.scoring import Scored

# Okabe and Ito's palette: told apart by all kinds of color vision.
COLORS = {"known": "#0072B2", "negative": "#E69F00", "unknown": "#D55E00"}
_SCORE_STYLE = {"softmax": ("#0072B2", "-"), "logit": ("#009E73", "--")}
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
}


def draw_all(scored: Scored, config: TrainConfig, folder: Path) -> None:
    """Write every figure that the data allow, as PNG."""
    folder.mkdir(exist_ok=True)
    title = f"{config.protocol} · {config.loss}"
    drawings = {"oscr": draw_oscr, "angles": draw_angles, "scores": draw_scores}
    if scored.features.shape[1] == 2:
        drawings["features"] = draw_features
    for name, draw in drawings.items():
        with mpl.rc_context(_STYLE):
            figure = draw(scored, config)
            figure.suptitle(title)
            figure.savefig(folder / f"{name}.png", dpi=150)


def _masks(scored: Scored) -> dict[str, NDArray[np.bool_]]:
    masks = {"known": is_known(scored.labels)}
    masks |= {GROUP_NAMES[label]: scored.labels == label for label in (NEGATIVE, UNKNOWN)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def draw_oscr(scored: Scored, config: TrainConfig) -> Figure:
    """CCR against FPR (logarithmic), one panel for each foreign group."""
    groups = [label for label in (NEGATIVE, UNKNOWN) if (scored.labels == label).any()]
    figure = Figure(figsize=(4.2 * max(len(groups), 1), 3.6), layout="constrained")
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
    figure.axes[0].legend(loc="upper left")
    figure.axes[0].set_ylabel("CCR")
    return figure


def draw_angles(scored: Scored, config: TrainConfig) -> Figure:
    """Angles to the own (known) or nearest (foreign) center, with the probability that the loss gives to an angle."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, math.pi + math.pi / 100, 100)
    angles = own_or_nearest_angle(scored)
    for name, mask in _masks(scored).items():
        axes.hist(
            angles[mask], edges, density=True, histtype="stepfilled", alpha=0.35, color=COLORS[name]
        )
        axes.hist(
            angles[mask], edges, density=True, histtype="step", color=COLORS[name], label=name
        )
    axes.set(
        xlim=(0, math.pi),
        ylim=(0, 7),
        xlabel="angle to the own (known) or nearest center",
        ylabel="density",
    )
    axes.set_xticks([i * math.pi / 4 for i in range(5)], ["0", "π/4", "π/2", "3π/4", "π"])
    if config.loss not in ("softmax", "eos", "os", "sm_softmax"):
        _probability_curves(axes, scored, config)
    axes.legend(loc="upper right")
    return figure


def _probability_curves(axes: Axes, scored: Scored, config: TrainConfig) -> None:
    """P(theta) for a fixed radius s and the other centers at a right angle (thesis eq. 3.10); dashed: with margin."""
    scale, classes = float(config.loss_options["scale"]), scored.logits.shape[1]
    theta = np.linspace(0, math.pi, 400)

    def probability(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = 1 / (1 + (classes - 1) * np.exp(-scale * cosine))
        return result

    twin = axes.twinx()
    twin.plot(theta, probability(np.cos(theta)), color="black", lw=1)
    options = config.loss_options
    if "cosine_margin" in options:
        twin.plot(theta, probability(np.cos(theta) - options["cosine_margin"]), "k--", lw=1)
    elif "angular_margin" in options:
        shifted = np.minimum(theta + options["angular_margin"], math.pi)
        twin.plot(theta, probability(np.cos(shifted)), "k--", lw=1)
    twin.set(ylim=(0, 1.05), ylabel="probability (dashed: with margin)")
    twin.grid(visible=False)


def draw_scores(scored: Scored, config: TrainConfig) -> Figure:
    """Histogram of each score by group."""
    figure = Figure(figsize=(4.2 * len(scored.scores), 3.4), layout="constrained")
    for axes, (name, scores) in zip(
        np.atleast_1d(figure.subplots(1, len(scored.scores))), scored.scores.items(), strict=True
    ):
        edges = np.histogram_bin_edges(scores, 80)
        for group, mask in _masks(scored).items():
            axes.hist(scores[mask], edges, density=True, alpha=0.35, color=COLORS[group])
            axes.hist(
                scores[mask], edges, density=True, histtype="step", color=COLORS[group], label=group
            )
        axes.set(
            xlabel=f"{name} score" + (" (log-odds)" if name == "softmax" else ""), ylabel="density"
        )
        axes.legend()
    return figure


def draw_features(scored: Scored, config: TrainConfig) -> Figure:
    """Four panels of two-dimensional features: knowns; with negatives; with unknowns; directions with centers."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    known = is_known(scored.labels)
    palette = mpl.colormaps["tab10"]
    features = scored.features
    for axes in panels[:3]:
        axes.scatter(*features[known].T, c=palette(scored.labels[known] % 10), s=2)
        axes.set_aspect("equal", "datalim")
    for axes, label, color in ((panels[1], NEGATIVE, "grey"), (panels[2], UNKNOWN, "black")):
        foreign = features[scored.labels == label]
        if len(foreign):
            axes.scatter(*foreign.T, color=color, s=2)
    for axes, title in zip(
        panels, ("knowns", "with negatives", "with unknowns", "directions"), strict=True
    ):
        axes.set_title(title)
    directions = features[known] / np.linalg.norm(features[known], axis=1, keepdims=True).clip(
        1e-12
    )
    panels[3].scatter(*directions.T, c=palette(scored.labels[known] % 10), s=2)
    for number, center in enumerate(
        scored.centers / np.linalg.norm(scored.centers, axis=1, keepdims=True)
    ):
        panels[3].plot([0, center[0]], [0, center[1]], color=palette(number % 10))
    panels[3].set_aspect("equal")
    return figure
