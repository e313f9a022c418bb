"""Figures that compare the models of the grid: OSCR curves, angles, scores, sources of digits, deep features."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from openset.labels import NEGATIVE, UNKNOWN
from training import figures
from training.contact_sheet import SHEET
from training.durable import replacing
from training.evaluation import SCORES_FILE
from training.grid_results import Entry, Model, Setting, option_text
from training.grid_summaries import FPR_GRID, GROUP_LABELS
from training.protocols import get_protocol
from training.published import TARGETS, published_value
from training.runs import Run, TrainConfig
from training.scoring import Scored

CAPTIONS = {
    "oscr": "CCR against FPR, softmax thresholds",
    "oscr-logit": "CCR against FPR, logit thresholds",
    "thresholds": "softmax against logit thresholds, on unknowns",
    "angles": "angles to the own (knowns) or nearest center, with the probability of an angle",
    "angles-more": "angles of the models that the picture above does not show",
}

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
_DPI = 120
_LONG_NAME = 30  # of a curve; longer ones would cover the curves
_LETTERS_AN_INCH = 12  # of a title
_MAX_ANGLE_PANELS = 24
_DIGIT_COLUMNS = 4
_MIN_STYLE_ROWS = 3
_MODELS = "Models"  # in the text of a picture: what it shows


def slug(setting: Setting) -> str:
    """Part of a file name that names a setting."""
    parts = [setting.protocol, setting.digits, setting.preset]
    parts += ["published" if setting.as_published else "definition", f"e{setting.epochs}"]
    parts += [] if setting.is_complete else [f"c{setting.classes.replace('/', '-')}"]
    parts += [option_text(*pair) for pair in setting.data_options]
    return "-".join(part for part in parts if part)


def key_of(entry: Entry, kind: str) -> str:
    """File name, without its ending, of a picture of this entry alone."""
    label = entry.full_label
    name = "".join(c if c.isalnum() or c in "_=." else "-" for c in label).strip("-")
    return f"{slug(entry.setting)}-{name}-{kind}"


def digit_twins(settings: Iterable[Setting]) -> list[tuple[Setting, Setting]]:
    """Pairs of settings that differ in the source of the digits alone, MNIST first."""
    listed = list(settings)
    return [
        (first, second)
        for first in listed
        for second in listed
        if (first.digits, second.digits) == ("mnist", "emnist")
        and _without_digits(first) == _without_digits(second)
    ]


def _without_digits(setting: Setting) -> tuple[object, ...]:
    return tuple(value for name, value in vars(setting).items() if name != "digits")


def draw_all(settings: dict[Setting, list[Entry]], folder: Path, protocol: str) -> dict[str, str]:
    """Draw what scores and summaries allow; file names relative to the report, by key.

    A picture made elsewhere stays as it is where it shows a model that cannot be drawn here; it names its models. Angles that
    it does not show are drawn beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}

    def keep(key: str, draw: Callable[[], Figure | None], models: dict[str, bool]) -> None:
        """``models``: the runs that belong into the picture, and whether they can be drawn here."""
        file = folder / f"{key}.png"
        shown = {name for name, can_be_drawn in models.items() if can_be_drawn}
        is_drawn = shown and (len(shown) == len(models) or _models_in(file) <= shown)
        figure = draw() if is_drawn else None
        if figure is not None:
            with replacing(file) as stream:
                figure.savefig(
                    stream, format="png", dpi=_DPI, metadata={_MODELS: " ".join(sorted(shown))}
                )
        if file.is_file():
            drawn[key] = f"{folder.name}/{key}.png"

    with mpl.rc_context(figures.STYLE):
        for setting, entries in settings.items():
            name = slug(setting)
            sound = [entry for entry in entries if entry.sound]
            known = _summarized(sound)
            keep(f"{name}-oscr", partial(draw_oscr, setting, sound, "softmax"), known)
            keep(f"{name}-oscr-logit", partial(draw_oscr, setting, sound, "logit"), known)
            keep(f"{name}-thresholds", partial(draw_thresholds, setting, sound), known)
            of_angles = _angles_here(sound[:_MAX_ANGLE_PANELS])
            keep(f"{name}-angles", partial(draw_angles, setting, sound), of_angles)
            shown = _models_in(folder / f"{name}-angles.png")
            more = [entry for entry in sound if not shown & {one.run for one in entry.sound}]
            if more:
                keep(f"{name}-angles-more", partial(draw_angles, setting, more), _angles_here(more))
            else:
                (folder / f"{name}-angles-more.png").unlink(missing_ok=True)
            if protocol == "toy_vis":
                for entry in sound:
                    of_one = _scores_here([entry])
                    keep(key_of(entry, "features"), partial(_draw_features, entry), of_one)
                if len(sound) > 1:
                    draw = partial(draw_feature_overview, setting, sound)
                    keep(f"{name}-features", draw, _scores_here(sound))
        for first, second in digit_twins(settings):
            twins = _digit_pairs(settings[first], settings[second])
            pairs = [pair for pair in twins[:_DIGIT_COLUMNS] if all(map(_with_angles, pair))]
            in_columns = _summarized([entry for pair in twins[:_DIGIT_COLUMNS] for entry in pair])
            drawn_columns = {model.run for pair in pairs for entry in pair for model in entry.sound}
            in_columns = {run: here and run in drawn_columns for run, here in in_columns.items()}
            keep(f"{slug(first)}-digits", partial(draw_digits, first, pairs), in_columns)
            if len(twins) >= _MIN_STYLE_ROWS:
                everyone = _summarized([entry for pair in twins for entry in pair])
                keep(f"{slug(first)}-style", partial(draw_style, first, twins), everyone)
    if _is_of_characters(protocol):  # photographs stay out of the repository
        drawn |= copy_sheets(settings, folder)
    return drawn


def _is_of_characters(protocol: str) -> bool:
    return get_protocol(protocol).kind == "characters"


def _summarized(entries: Iterable[Entry]) -> dict[str, bool]:
    """The runs behind entries, and whether their summaries are here."""
    return {model.run: model.summary is not None for entry in entries for model in entry.sound}


def _scores_here(entries: Iterable[Entry]) -> dict[str, bool]:
    """The first seed of each entry, and whether its scores are here."""
    return {entry.sound[0].run: entry.sound[0].has_scores for entry in entries}


def _with_angles(entry: Entry) -> Model | None:
    """Its first seed whose angles are kept."""
    return next((model for model in entry.sound if model.angles is not None), None)


def _angles_here(entries: Iterable[Entry]) -> dict[str, bool]:
    """The run that stands for each entry among angles, and whether its angles are here."""
    return {
        (_with_angles(entry) or entry.sound[0]).run: _with_angles(entry) is not None
        for entry in entries
    }


def _models_in(file: Path) -> set[str]:
    """The models that a picture shows; nothing where there is none."""
    if not file.is_file():
        return set()
    with Image.open(file) as picture:
        return set(picture.info.get(_MODELS, "another").split())


# -- curves ----------------------------------------------------------------------------------------------------------


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


def _draw_curve(axes: Axes, curve: Curve, number: int, label: str, line: str | None = None) -> None:
    color = _COLORS[number % len(_COLORS)]
    axes.plot(FPR_GRID, curve.mean, line or _LINES[number % len(_LINES)], color=color, label=label)
    axes.fill_between(FPR_GRID, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)


def _finish_oscr(axes: Axes, curves: Sequence[Curve]) -> None:
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
    of_characters = all(_is_of_characters(entry.setting.protocol) for entry in entries)
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
                    _draw_curve(axes, curve, number, entry.label)
                    curves.append(curve)
            if not curves:
                axes.set_axis_off()
                continue
            empty = False
            _finish_oscr(axes, curves)
            axes.set(xlabel=f"FPR on {group}", ylabel="CCR", title=title)
            _put_legend(axes)
    _set_title(figure, f"{score} thresholds · {setting.title}")
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
                    _draw_curve(axes, curve, number, name, line)
                    curves.append(curve)
        if curves:
            empty = False
            _finish_oscr(axes, curves)
            axes.set(xlabel="FPR on unknowns", ylabel="CCR", title=title)
            _put_legend(axes)
    for axes in axes_list[len(compared) :]:
        axes.set_axis_off()
    _set_title(figure, f"solid: softmax, dashed: logit thresholds · {setting.title}")
    return None if empty else figure


def _digit_pairs(mnist: Sequence[Entry], emnist: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    return [
        (entry, twin)
        for entry in mnist
        for twin in emnist
        if (twin.loss, twin.options) == (entry.loss, entry.options) and entry.sound and twin.sound
    ]


def draw_digits(setting: Setting, pairs: Sequence[tuple[Entry, Entry]]) -> Figure | None:
    """The same loss with both sources of digits, one column a loss; curves above, angles of each source below."""
    if not pairs:
        return None
    figure = Figure(figsize=(max(5.4, 3.9 * len(pairs)), 8.6), layout="constrained")
    grid = figure.subplots(3, len(pairs), squeeze=False)
    for column, pair in enumerate(pairs):
        curves = []
        for number, (entry, name) in enumerate(zip(pair, ("MNIST", "EMNIST"), strict=True)):
            for group, line in (("unknowns", "-"), ("negatives", ":")):
                curve = mean_curve(entry, group, "softmax")
                if curve is not None:
                    _draw_curve(grid[0][column], curve, 1 + number, f"{name} digits, {group}", line)
                    curves.append(curve)
            _draw_angles_of(grid[1 + number][column], entry, f"{entry.label}, {name} digits")
        _finish_oscr(grid[0][column], curves)
        grid[0][column].set(xlabel="FPR", ylabel="CCR", title=pair[0].label)
        grid[0][column].legend(fontsize=7, loc="best")
    _angle_legend(figure, grid[1:].ravel())
    title = f"the source of the digits · {setting.title}".replace("MNIST digits, ", "")
    _set_title(figure, title)
    return figure


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
    _set_title(figure, title)
    return figure


# -- angles, features, sheets ----------------------------------------------------------------------------------------


def draw_angles(setting: Setting, entries: Sequence[Entry]) -> Figure | None:
    """One panel a loss: the angles of a seed, with the probability curves of the loss."""
    chosen = [entry for entry in entries[:_MAX_ANGLE_PANELS] if _with_angles(entry)]
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    width = max(5.4, 3.3 * columns)  # the legend's
    figure = Figure(figsize=(width, 2.5 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, entry in zip(grid, chosen, strict=False):
        _draw_angles_of(axes, entry, entry.label)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(chosen) - columns) : len(chosen)]:  # nothing stands below these
        axes.set_xlabel("angle to the own (knowns)\nor nearest center", fontsize=8)
    _angle_legend(figure, grid[: len(chosen)])
    _set_title(figure, setting.title)
    return figure


def _angle_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all angle panels, below them; their sample counts are left out."""
    names: dict[str, Artist] = {}
    for panel in panels:
        siblings = panel.get_shared_x_axes().get_siblings(panel)  # itself and its twin
        for axes in sorted(siblings, key=lambda axes: axes is not panel):
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                names.setdefault(name.partition(" (")[0], handle)
    figure.legend(list(names.values()), list(names), loc="outside lower center", ncols=3)


def _draw_angles_of(axes: Axes, entry: Entry, title: str) -> None:
    model = _with_angles(entry)
    if model is not None and model.angles is not None:
        figures.angle_panel(axes, model.angles)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("")


def _draw_features(entry: Entry) -> Figure:
    figure = figures.draw_features(*_first_seed(entry))
    _set_title(figure, f"{entry.label} · {entry.setting.title}")
    return figure


def draw_feature_overview(setting: Setting, entries: Sequence[Entry]) -> Figure:
    """Features of all losses side by side: two panels a loss, the knowns with the negatives and with the unknowns."""
    here = [entry for entry in entries if entry.sound[0].has_scores]
    columns = min(4, len(here))
    blocks = math.ceil(len(here) / columns)
    figure = Figure(figsize=(2.4 * columns, 4.7 * blocks + 0.4), layout="constrained")
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, entry in enumerate(here):
        block, column = divmod(number, columns)
        scored, config = _first_seed(entry)
        for row, foreign in enumerate((NEGATIVE, UNKNOWN)):
            axes = grid[2 * block + row][column]
            axes.set_axis_on()
            axes.tick_params(labelsize=6)
            figures.feature_panel(axes, scored, config, foreign=foreign)
        grid[2 * block][column].set_title(entry.label, fontsize=9)
    _set_title(figure, f"gray: negatives (above), black: unknowns (below) · {setting.title}")
    return figure


def _first_seed(entry: Entry) -> tuple[Scored, TrainConfig]:
    folder = entry.sound[0].folder
    return Scored.load(folder / SCORES_FILE), Run(folder).config


def copy_sheets(settings: dict[Setting, list[Entry]], folder: Path) -> dict[str, str]:
    """The contact sheet of each entry's first seed; every run has its own in its folder."""
    copied: dict[str, str] = {}
    for entries in settings.values():
        for entry in entries:
            key = key_of(entry, "false_positives")
            target = folder / f"{key}.png"
            sheets = [
                model.folder / "figures" / SHEET for model in entry.models if model.has_scores
            ]
            if sheets and sheets[0].is_file():
                shutil.copyfile(sheets[0], target)
            if target.is_file():
                copied[key] = f"{folder.name}/{key}.png"
    return copied


def _set_title(figure: Figure, title: str) -> None:
    letters = min(110, int(_LETTERS_AN_INCH * figure.get_figwidth()))
    figure.suptitle(textwrap.fill(title, letters), fontsize=9)
