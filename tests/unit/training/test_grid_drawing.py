"""The report's pictures: all are there, each with the models it shows, and none is lost where a model is."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tests.grid_runs import cells, finished_run, scored, section, written
from training.grid import drawing, pages
from training.grid.drawing import copy_sheets
from training.grid.plan import plan
from training.grid.results import group_rows
from training.grid.rows import merge_rows, read_rows


def models_in(picture: Path) -> set[str]:
    with Image.open(picture) as opened:
        return set(opened.info["Models"].split())


def test_picture_is_drawn_again_unless_it_shows_a_model_that_is_not_here(
    two_losses: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_losses / "results", tmp_path / "results")
    picture = tmp_path / "results/figures/toy-mnist-thesis-published-e15-oscr.png"
    summaries = tmp_path / "results/summaries"
    before = models_in(picture)
    assert before == {cell.name for loss in ("cos_eos", "eos") for cell in cells(loss)}
    # Two models come, of which one leaves nothing to draw it from.
    [come, lost] = [
        finished_run(tmp_path / "runs", *cells(loss, seeds=1)) for loss in ("os", "norm_os")
    ]
    written(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    (summaries / f"{lost.name}.npz").unlink()
    picture.unlink()
    shutil.copyfile(two_losses / "results/figures" / picture.name, picture)
    written(tmp_path)
    assert models_in(picture) == before | {come.name}
    # That of the angles, of one seed of each, was drawn with both; it stays.
    angles = picture.with_name(picture.name.replace("-oscr", "-angles"))
    assert models_in(angles) == {
        cells(loss)[0].name for loss in ("cos_eos", "eos", "os", "norm_os")
    }
    # One that is shown goes.
    kept = summaries / f"{cells('eos')[0].name}.npz"
    summary = kept.read_bytes()
    kept.unlink()
    content = picture.read_bytes()
    written(tmp_path)
    assert picture.read_bytes() == content
    # What comes then is drawn beside the angles that stay, until all can be drawn together.
    more = angles.with_name(angles.name.replace("-angles", "-angles-more"))
    assert not more.exists()
    for cell in cells("cos_os", seeds=1):
        finished_run(tmp_path / "runs", cell)
    assert f"figures/{more.name}" in written(tmp_path)
    assert models_in(more) == {cells("cos_os")[0].name}
    # That one stays as well while what it shows is not here.
    beside = summaries / f"{cells('cos_os')[0].name}.npz"
    lost = beside.read_bytes()
    beside.unlink()
    shutil.rmtree(tmp_path / "runs")
    finished_run(tmp_path / "runs", *cells("arc_os", seeds=1))
    assert f"figures/{more.name}" in written(tmp_path)
    assert models_in(more) == {cells("cos_os")[0].name}
    beside.write_bytes(lost)
    kept.write_bytes(summary)
    finished_run(tmp_path / "runs", *cells("norm_os", seeds=1))
    assert f"figures/{more.name}" not in written(tmp_path)
    assert not more.exists()
    assert cells("cos_os")[0].name in models_in(angles)


def test_every_loss_has_its_contact_sheet_in_the_report(two_losses: Path, tmp_path: Path) -> None:
    shutil.copytree(two_losses / "runs", tmp_path / "runs")
    merge_rows(tmp_path / "toy.json", read_rows(two_losses / "results/toy.json"))
    for loss in ("cos_eos", "eos"):
        sheet = tmp_path / "runs" / cells(loss)[0].name / "figures/false_positives.png"
        sheet.parent.mkdir()
        sheet.write_bytes(loss.encode())
    settings = group_rows(read_rows(tmp_path / "toy.json"), tmp_path / "runs", tmp_path)
    copied = copy_sheets(settings, tmp_path)
    assert {(tmp_path.parent / name).read_text() for name in copied.values()} == {"cos_eos", "eos"}
    assert len(copied) == 2


def test_contact_sheet_keeps_its_name_in_whatever_company_its_loss_is_shown(tmp_path: Path) -> None:
    # With one way to train, its options are those of all and stand above the table; with two they tell the losses apart.
    runs, options = tmp_path / "runs", {"turned_negatives": 0.875}
    [turned], [plain] = cells("eos", seeds=1, options=options), cells("eos", seeds=1)
    folder = finished_run(runs, turned)
    (folder / "figures").mkdir()
    (folder / "figures/false_positives.png").write_bytes(b"turned")
    names = []
    for _ in range(2):
        pages.write("toy", runs=runs, results=tmp_path / "results")
        settings = group_rows(read_rows(tmp_path / "results/toy.json"), runs, tmp_path)
        names.append(set(copy_sheets(settings, tmp_path)))
        if not (runs / plain.name).exists():
            finished_run(runs, plain)
    assert names[0] == names[1]
    text = (tmp_path / "results/toy.md").read_text()
    assert (
        len(re.findall(r"!\[eos \(turned_negatives=0.875\), .*-false_positives.png\)", text)) == 1
    )


def colored_pixels(file: Path) -> int:
    """Pixels of known samples: text, axes and foreign samples are gray."""
    with Image.open(file) as picture:
        return int((np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=2) > 60).sum())


def test_features_of_two_dimensions_are_drawn_and_shown(tmp_path: Path) -> None:
    cells = plan("toy_vis", losses=["eos", "os"], seeds=1, digits=["mnist"])
    angles = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    centers = np.c_[np.cos(angles), np.sin(angles)].astype(np.float32)
    for before, cell in enumerate(cells):
        of_ten = scored(5.0, cell.seed)
        flat = replace(of_ten, features=of_ten.features[:, :2], centers=centers)
        finished_run(tmp_path / "runs", cell, sample=flat)
        target = pages.write("toy_vis", runs=tmp_path / "runs", results=tmp_path / "results")
        assert target is not None
        shown = section(target.read_text(), "## Deep features")
        # Side by side as soon as there are two.
        together = re.findall(r"!\[features of all losses, .*\]\((.*e15-features.png)\)", shown)
        assert len(together) == before
    [alone] = re.findall(r"!\[eos, .*\]\((.*-eos-features.png)\)", shown)
    assert colored_pixels(target.parent / alone) > 1000
    [(setting, entries)] = group_rows(
        read_rows(tmp_path / "results/toy_vis.json"), tmp_path / "runs", tmp_path / "results"
    ).items()
    overview = drawing.draw_feature_overview(setting, entries)
    panels = [axes for axes in overview.axes if axes.axison]
    assert len(panels) == 4  # two a loss
    assert all(len(axes.collections) == 2 for axes in panels)  # knowns and foreign ones
    assert colored_pixels(target.parent / together[0]) > 1000


def test_every_figure_that_the_report_shows_exists(two_losses: Path) -> None:
    text = (two_losses / "results/toy.md").read_text()
    shown = re.findall(r"!\[[^]]*]\(([^)]+)\)", text)
    assert {Path(name).name for name in shown} >= {
        f"toy-mnist-thesis-published-e15-{kind}.png"
        for kind in ("oscr", "oscr-logit", "thresholds", "angles", "digits")
    }
    assert all((two_losses / "results" / name).is_file() for name in shown)
