"""The figures of the grid's report: curves, angles, sources of digits, deep features, contact sheets."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from openset.labels import NEGATIVE, UNKNOWN
from training import figures
from training.contact_sheet import SHEET
from training.durable import replacing
from training.evaluation import SCORES_FILE
from training.grid.curves import (
    draw_curve,
    draw_oscr,
    draw_style,
    draw_thresholds,
    finish_oscr,
    mean_curve,
)
from training.grid.results import Entry, Model, Setting, digit_twins, option_text, twins
from training.protocols import get_protocol
from training.runs import Run, TrainConfig
from training.scoring import Scored

CAPTIONS = {
    "oscr": "CCR against FPR, softmax thresholds",
    "oscr-logit": "CCR against FPR, logit thresholds",
    "thresholds": "softmax against logit thresholds, on unknowns",
    "angles": "angles to the own (knowns) or nearest center, with the probability of an angle",
    "angles-more": "angles of the models that the picture above does not show",
}

_DPI = 120
_MAX_ANGLE_PANELS = 24
_DIGIT_COLUMNS = 4
_MIN_STYLE_ROWS = 3
_MODELS = "Models"  # in the text of a picture: what it shows
# Of one entry each; all other figures are drawn from summaries.
PICTURES = ("features", "false_positives")


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
            both = twins(settings[first], settings[second])
            both = [pair for pair in both if all(entry.sound for entry in pair)]
            pairs = [pair for pair in both[:_DIGIT_COLUMNS] if all(map(_with_angles, pair))]
            in_columns = _summarized([entry for pair in both[:_DIGIT_COLUMNS] for entry in pair])
            drawn_columns = {model.run for pair in pairs for entry in pair for model in entry.sound}
            in_columns = {run: here and run in drawn_columns for run, here in in_columns.items()}
            keep(f"{slug(first)}-digits", partial(_draw_digits, first, pairs), in_columns)
            if len(both) >= _MIN_STYLE_ROWS:
                everyone = _summarized([entry for pair in both for entry in pair])
                keep(f"{slug(first)}-style", partial(draw_style, first, both), everyone)
    if get_protocol(protocol).is_of_characters:  # photographs stay out of the repository
        drawn |= copy_sheets(settings, folder)
    return drawn


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


def _draw_digits(setting: Setting, pairs: Sequence[tuple[Entry, Entry]]) -> Figure | None:
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
                    draw_curve(grid[0][column], curve, 1 + number, f"{name} digits, {group}", line)
                    curves.append(curve)
            _draw_angles_of(grid[1 + number][column], entry, f"{entry.label}, {name} digits")
        finish_oscr(grid[0][column], curves)
        grid[0][column].set(xlabel="FPR", ylabel="CCR", title=pair[0].label)
        grid[0][column].legend(fontsize=7, loc="best")
    _angle_legend(figure, grid[1:].ravel())
    title = f"the source of the digits · {setting.title}".replace("MNIST digits, ", "")
    figures.title_figure(figure, title)
    return figure


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
    figures.title_figure(figure, setting.title)
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
    figures.title_figure(figure, f"{entry.label} · {entry.setting.title}")
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
    figures.title_figure(
        figure, f"gray: negatives (above), black: unknowns (below) · {setting.title}"
    )
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
