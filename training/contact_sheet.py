"""A contact sheet: the foreign test images that a model takes for known with the highest scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from openset.labels import GROUP_NAMES, NEGATIVE, UNKNOWN
from openset.scores import DEFAULT_SCORE
from training.data import ProtocolData
from training.decoded import CachedImages
from training.files import ImageFiles
from training.protocols import get_protocol
from training.scoring import Scored

SHEET = "false_positives.png"
_COLUMNS = 8
_SHOWN = {UNKNOWN: 24, NEGATIVE: 8}
_NAME_LENGTH = 18


def highest_foreign(scored: Scored, label: int, count: int, score: str) -> NDArray[np.int64]:
    """Indices of the samples of a foreign group with the highest scores, best first."""
    members = np.flatnonzero(scored.labels == label)
    order = np.argsort(-scored.scores[score][members], kind="stable")
    return members[order[:count]]


def draw_contact_sheet(scored: Scored, data: ProtocolData, *, title: str) -> Figure | None:
    """The sheet; None where the test part holds no foreign image.

    Under each image: its true class → the predicted one, and the score. Wrongly labelled images, and foreign images with
    a known object in them, are found here. Softmax scores rank, or the first of those that were evaluated.

    Args:
        scored: the test part.
        data: the same protocol's data, with its test part.
        title: of the figure.
    """
    score = DEFAULT_SCORE if DEFAULT_SCORE in scored.scores else next(iter(scored.scores))
    protocol = get_protocol(data.name)
    chosen = {
        label: found
        for label, count in _SHOWN.items()
        if len(found := highest_foreign(scored, label, count, score))
    }
    if not chosen:
        return None
    place = {name: index for index, name in enumerate(data.test.sample_ids.tolist())}
    heights = [math.ceil(len(found) / _COLUMNS) for found in chosen.values()]
    figure = Figure(figsize=(1.45 * _COLUMNS, 1.95 * sum(heights) + 0.9), layout="constrained")
    blocks = figure.subfigures(len(chosen), 1, height_ratios=heights, squeeze=False).ravel()
    for block, (label, found), rows in zip(blocks, chosen.items(), heights, strict=True):
        block.suptitle(f"{GROUP_NAMES[label]}s with the highest {score} scores", fontsize=9)
        panels = block.subplots(rows, _COLUMNS, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, index in zip(panels, found, strict=False):
            image = _image(data, place[str(scored.sample_ids[index])])
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            group = str(scored.groups[index])
            true = _fitting(protocol.short_name(group))
            predicted = _fitting(data.class_names[int(scored.predictions[index])].partition(",")[0])
            value = float(scored.scores[score][index])
            axes.set_title(f"{true}\n→ {predicted}\n{value:.2f}", fontsize=7)
    figure.suptitle(f"{title} · true class → predicted class, score", fontsize=9)
    return figure


def write_contact_sheet(scored: Scored, data: ProtocolData, folder: Path, *, title: str) -> None:
    """Write ``false_positives.png`` into a folder."""
    folder.mkdir(exist_ok=True)
    with mpl.rc_context({"axes.grid": False}):
        figure = draw_contact_sheet(scored, data, title=title)
        if figure is not None:
            figure.savefig(folder / SHEET, dpi=120)


def _image(data: ProtocolData, index: int) -> NDArray[Any]:
    """In evaluation form, as the model saw it: (H, W) grey or (H, W, 3) uint8."""
    images = data.test.images
    if isinstance(images, ImageFiles):
        opened = data.preprocessing.open(images.paths[index])
        pixels = data.preprocessing.transform(opened).numpy()
    elif isinstance(images, CachedImages):
        pixels = images.evaluation_form(np.array([index]), data.preprocessing)[0].cpu().numpy()
    else:
        pixels = images[index].cpu().numpy()
    channels_last: NDArray[Any] = pixels.transpose(1, 2, 0)
    return channels_last[..., 0] if channels_last.shape[2] == 1 else channels_last


def _fitting(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
