"""Curves that compare the models of the grid: OSCR, softmax against logit thresholds, one source of digits against the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training import figures
from training.grid.results import Entry, Setting
from training.grid.summaries import FPR_GRID, GROUP_LABELS
from training.protocols import get_protocol
from training.published import TARGETS, published_value

# What the thesis compares in one panel: on photographs (its figures 6.5 to 6.10, A.1 to A.3), and on characters besides
# (6.1 to 6.4).
_PANELS = {
    "margins without negatives": ("softmax", "sfn_norm", "sfn_cosface", "sfn_arcface"),
    "Margin-OS": ("os", "norm_os", "cos_os", "arc_os"),
    "Margin-EOS": ("os", "eos", "norm_eos", "cos_eos", "arc_eos"),
}
_MORE_PANELS_OF_CHARACTERS = {
    "kinds of margin": ("sm_softmax", "sphereface", "cosface", "arcface"),
    "hard or soft": ("cosface", "sfn_cosface", "arcface", "sfn_arcface"),
    "hard or soft, with negatives": ("cos_eos", "cos_eos_sfn", "arc_eos", "arc_eos_sfn"),
    "symmetric or not": ("cos_os", "cos_os_nonsym", "arc_os", "arc_os_nonsym"),
}
# The author's code has a hard head in all of figure 6.3: what differs is the ring term.
_TITLES_AS_PUBLISHED = {"hard or soft, with negatives": "hard with negatives, ring term or not"}
# Okabe and Ito: told apart by all kinds of color vision; the lines differ as well.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-", "-.", ":", "--", "-.")
_LONG_NAME = 30  # of a curve; longer ones would cover the curves


@dataclass(frozen=True, eq=False)
class Curve:
    """CCR at ``FPR_GRID`` over the seeds of an entry; NaN where a seed does not reach the FPR. (T,) each."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def mean_curve(entry: Entry, group: str, score: str) -> Curve | None:
    """Mean, least and largest CCR over the seeds whose curves are kept."""
    rows = [
        model.summary.curves[group, score]
        for model in entry.models
        if model.summary is not None and (group, score) in model.summary.curves
    ]
    if not rows:
        return None
    stacked = np.stack(rows)
    return Curve(stacked.mean(axis=0), stacked.min(axis=0), stacked.max(axis=0))


def draw_curve(axes: Axes, curve: Curve, number: int, label: str, line: str | None = None) -> None:
    """The mean with a band from the least to the largest; the number picks color and line, which may be given instead."""
    color = _COLORS[number % len(_COLORS)]
    axes.plot(FPR_GRID, curve.mean, line or _LINES[number % len(_LINES)], color=color, label=label)
    axes.fill_between(FPR_GRID, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)


def finish_oscr(axes: Axes, curves: Sequence[Curve]) -> None:
    """Logarithmic FPR; CCR from 0, or from .8 where nothing lies lower at any FPR from 1e-3 on."""
    at_low = np.concatenate([curve.low[FPR_GRID >= 1e-3] for curve in curves])
    floor = 0.8 if np.nanmin(at_low, initial=1.0) > 0.82 else 0.0
    axes.set(xscale="log", xlim=(8e-5, 1.4), ylim=(floor, 1.0 + 0.02 * (1 - floor)))


def _put_legend(axes: Axes) -> None:
    """Inside where the curves leave room; below where its names are long, since it would cover them."""
    names = axes.get_legend_handles_labels()[1]
    is_long = max(map(len, names), default=0) > _LONG_NAME
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.2)} if is_long else {"loc": "best"}
    axes.legend(fontsize=7, **place)


def _room_for_legend(entries: Iterable[Entry]) -> float:
    """Height, inches, of a panel's legend below it; 0 where it lies inside."""
    names = [entry.label for entry in entries]
    return 0.14 * len(names) + 0.1 if max(map(len, names)) > _LONG_NAME else 0.0


def panels(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """What belongs into one panel: the comparisons, for each set of options; a loss with all its options; the rest.

    A loss that was run with one set of options alone also stands among those without any: there it is compared with
    losses that do not have these options, as a margin's warm-up.
    """
    found: list[tuple[str, list[Entry]]] = []
    of_characters = all(get_protocol(entry.setting.protocol).is_of_characters for entry in entries)
    asked = _PANELS | (_MORE_PANELS_OF_CHARACTERS if of_characters else {})
    if all(entry.setting.as_published for entry in entries):
        asked = {_TITLES_AS_PUBLISHED.get(title, title): asked[title] for title in asked}
    variants: dict[str, list[Entry]] = {}
    by_options: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        variants.setdefault(entry.loss, []).append(entry)
        by_options.setdefault(entry.label.removeprefix(entry.loss), {})[entry.loss] = entry
    alone = {loss: run[0] for loss, run in variants.items() if len(run) == 1}
    by_options[""] = by_options.get("", {}) | alone
    for options, alike in sorted(by_options.items()):
        compared = {
            title: [alike[loss] for loss in losses if loss in alike]
            for title, losses in asked.items()
        }
        found += [
            (title + options, chosen)
            for title, chosen in compared.items()
            if len(chosen) > 1
            and not _is_shown_by_another(title, compared)
            and not any(set(map(id, chosen)) <= set(map(id, before)) for _, before in found)
        ]
    found += [(f"{loss} and options", runs) for loss, runs in variants.items() if len(runs) > 1]
    shown = {id(entry) for _, chosen in found for entry in chosen}
    rest = [entry for entry in entries if id(entry) not in shown]
    return [*found, ("others" if found else "", rest)] if rest else found


def _is_shown_by_another(title: str, compared: dict[str, list[Entry]]) -> bool:
    """Where what it would be compared with was not run, a panel shows nothing that a larger or an earlier one does not."""
    shown = {name: {entry.loss for entry in entries} for name, entries in compared.items()}
    titles = list(shown)
    earlier = titles[: titles.index(title)]
    return any(shown[title] < shown[other] for other in titles) or any(
        shown[title] == shown[other] for other in earlier
    )


def draw_oscr(setting: Setting, entries: Sequence[Entry], score: str) -> Figure | None:
    """One row a comparison, one column a foreign group; bands: least and largest over seeds."""
    compared = panels(entries)
    height = sum(2.9 + _room_for_legend(chosen) for _, chosen in compared) + 0.5
    figure = Figure(figsize=(8.6, height), layout="constrained")
    grid = figure.subplots(len(compared), 2, squeeze=False)
    empty = True
    for row, (title, chosen) in zip(grid, compared, strict=True):
        for axes, group in zip(row, GROUP_LABELS, strict=True):
            curves = []
            for number, entry in enumerate(chosen):
                curve = mean_curve(entry, group, score)
                if curve is not None:
                    draw_curve(axes, curve, number, entry.label)
                    curves.append(curve)
            if not curves:
                axes.set_axis_off()
                continue
            empty = False
            finish_oscr(axes, curves)
            axes.set(xlabel=f"FPR on {group}", ylabel="CCR", title=title)
            _put_legend(axes)
    figures.title_figure(figure, f"{score} thresholds · {setting.title}")
    return None if empty else figure


def draw_thresholds(setting: Setting, entries: Sequence[Entry]) -> Figure | None:
    """Softmax (solid) and logit (dashed) thresholds of each model, on unknowns."""
    compared = panels(entries)
    columns = min(3, len(compared))
    rows = math.ceil(len(compared) / columns)
    rooms = [_room_for_legend(chosen) for _, chosen in compared]
    height = sum(3.1 + max(rooms[row * columns : (row + 1) * columns]) for row in range(rows)) + 0.5
    figure = Figure(figsize=(3.9 * columns, height), layout="constrained")
    axes_list = figure.subplots(rows, columns, squeeze=False).ravel()
    empty = True
    for axes, (title, chosen) in zip(axes_list, compared, strict=False):
        curves = []
        for number, entry in enumerate(chosen):
            for score, line in (("softmax", "-"), ("logit", "--")):
                curve = mean_curve(entry, "unknowns", score)
                if curve is not None:
                    name = entry.label if score == "softmax" else "_"
                    draw_curve(axes, curve, number, name, line)
                    curves.append(curve)
        if curves:
            empty = False
            finish_oscr(axes, curves)
            axes.set(xlabel="FPR on unknowns", ylabel="CCR", title=title)
            _put_legend(axes)
    for axes in axes_list[len(compared) :]:
        axes.set_axis_off()
    figures.title_figure(figure, f"solid: softmax, dashed: logit thresholds · {setting.title}")
    return None if empty else figure


def draw_style(setting: Setting, pairs: Sequence[tuple[Entry, Entry]]) -> Figure:
    """CCR against unknowns with both sources of digits, a line a loss and a panel an FPR; what is between them is style."""

    def height(pair: tuple[Entry, Entry]) -> tuple[bool, float]:
        return pair[0].sees_negatives, pair[0].mean("0.01") or 0.0

    ordered = sorted(pairs, key=height)
    with_negatives = np.array([height(pair)[0] for pair in ordered])
    places = np.arange(len(ordered)) + 1.0 * with_negatives  # a gap between the two kinds
    sources = (("MNIST digits", _COLORS[1], "o", 0.15), ("EMNIST digits", _COLORS[2], "s", -0.15))
    figure = Figure(figsize=(11, 0.3 * len(ordered) + 1.7), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(TARGETS), sharey=True), TARGETS, strict=True):
        for place, pair in zip(places, ordered, strict=True):
            means = [entry.mean(column) for entry in pair]
            reached = [mean for mean in means if mean is not None]
            if len(reached) == len(pair):
                axes.plot(
                    reached, [place] * len(pair), color="#DDDDDD", lw=7, solid_capstyle="butt", zorder=1
                )  # fmt: skip
            value = published_value(setting.protocol, pair[0].loss, column)
            if value is not None and setting.is_published:
                axes.plot(value, place, "|", color="black", ms=13, mew=1.5, zorder=3)
            for entry, mean, (_, color, marker, offset) in zip(pair, means, sources, strict=True):
                interval = entry.over_classes(column)
                if mean is not None and interval is not None:
                    axes.plot(
                        interval,
                        [place + offset] * 2,
                        color=color,
                        lw=1.2,
                        solid_capstyle="butt",
                        zorder=2,
                    )
                if mean is not None:
                    axes.plot(mean, place + offset, marker, color=color, ms=4.5, zorder=4)
        axes.set(xlim=(-0.02, 1.02), xlabel=f"CCR at FPR {float(column):g} on unknowns")
        axes.set_yticks(places, [pair[0].label for pair in ordered])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    first = figure.axes[0]
    for kind, name in enumerate(("without negatives", "with negatives")):
        if (with_negatives == bool(kind)).any():
            top = places[with_negatives == bool(kind)].max() + 0.7
            first.text(0.0, top, name, fontsize=8, style="italic", color="#555555", va="center")
    first.set_ylim(-0.7, places.max() + 1.2)
    for name, color, marker, _ in sources:
        label = f"{name}, with its 95 % interval over classes"
        first.plot([], [], color=color, marker=marker, ms=4.5, lw=1.2, label=label)
    first.plot([], [], color="#DDDDDD", lw=7, label="between the two")
    if setting.is_published:
        first.plot([], [], "|", color="black", ms=13, mew=1.5, label="published (MNIST digits)")
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    title = f"the same losses, two sources of digits · {setting.title}".replace(
        "MNIST digits, ", ""
    )
    figures.title_figure(figure, title)
    return figure
