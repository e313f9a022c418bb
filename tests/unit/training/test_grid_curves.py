"""Curves of several models: which losses share a panel, where the legend lies, what the style figure shows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from openset.labels import UNKNOWN
from tests.grid_runs import LETTERS, cells, finished_run, scored, section, written
from training.grid import curves, pages
from training.grid.plan import plan
from training.grid.results import digit_twins, group_rows, published_setting, twins
from training.grid.rows import read_rows, stored_rows
from training.protocols import get_protocol


def test_panel_of_soft_heads_with_negatives_says_that_the_published_code_has_hard_ones(
    tmp_path: Path,
) -> None:
    for as_published in (True, False):
        for loss in ("cos_eos", "cos_eos_sfn"):
            [cell] = cells(loss, seeds=1, options={"as_published": as_published})
            finished_run(tmp_path / "runs", cell)
    rows = [row for run in (tmp_path / "runs").iterdir() for row in stored_rows(run)]
    shown = {
        setting.as_published: [title for title, _ in curves.panels(entries)]
        for setting, entries in group_rows(rows, tmp_path / "runs", tmp_path).items()
    }
    assert shown == {
        True: ["hard with negatives, ring term or not"],
        False: ["hard or soft, with negatives"],
    }


def test_style_figure_has_both_sources_and_the_published_value_of_each_loss(grid: Path) -> None:
    losses = {"cos_eos": 6.0, "softmax": 3.0, "sfn_cosface": 4.0}
    for loss, quality in losses.items():
        for digits, better in (("mnist", 1.0), ("emnist", -1.0)):
            [cell] = cells(loss, seeds=1, digits=[digits])
            if not (grid / "runs" / cell.name).exists():
                finished_run(grid / "runs", cell, quality=quality + better)
    written(grid)
    settings = group_rows(read_rows(grid / "results/toy.json"), grid / "runs", grid / "results")
    published = published_setting("toy")
    [(first, second)] = digit_twins(settings)
    pairs = twins(settings[first], settings[second])
    first_panel, axes, _ = curves.draw_style(published, pairs).axes
    names = [label.get_text() for label in first_panel.get_yticklabels()]
    assert names[-1] == "cos_eos"
    assert set(names[:-1]) == {"softmax", "sfn_cosface"}
    places = {name: round(place) for name, place in zip(names, axes.get_yticks(), strict=True)}
    shown = {
        (line.get_marker(), round(place)): value
        for line in axes.get_lines()
        for value, place in line.get_xydata()
    }
    for entry, twin in pairs:
        assert shown["o", places[entry.loss]] == entry.mean("0.01")
        assert shown["s", places[entry.loss]] == twin.mean("0.01")
    assert shown["|", places["sfn_cosface"]] == pytest.approx(0.4377)
    assert ("|", places["softmax"]) not in shown  # the thesis has no row for it


@pytest.mark.parametrize("draw", ["oscr", "thresholds"])
@pytest.mark.parametrize("is_long", [True, False])
def test_legend_lies_below_its_panel_where_long_names_would_cover_the_curves(
    tmp_path: Path, draw: str, is_long: bool
) -> None:
    more = {"turned_negatives": 0.875, "feature_dim": 512} if is_long else {"feature_dim": 512}
    rows = []
    for options in ({}, more):
        plain = {"as_published": False, **options}
        [cell] = plan("toy", losses=["cos_eos"], seeds=1, digits=["mnist"], options=plain)
        rows += stored_rows(finished_run(tmp_path / "runs", cell))
    [(setting, entries)] = group_rows(rows, tmp_path / "runs", tmp_path).items()
    figure = (
        curves.draw_oscr(setting, entries, "softmax")
        if draw == "oscr"
        else curves.draw_thresholds(setting, entries)
    )
    assert figure is not None
    figure.savefig(tmp_path / "figure.png")
    shown = [axes for axes in figure.axes if axes.get_legend() is not None]
    assert shown
    for axes in shown:
        legend, panel = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert (legend.y1 < axes.xaxis.label.get_window_extent().y0) == is_long
        assert legend.overlaps(panel) != is_long
        assert legend.y0 >= 0


def test_photographs_have_the_panels_of_the_thesis(tmp_path: Path) -> None:
    # Its figures 6.5 to 6.10 and, with logit thresholds, A.1 to A.3.
    compared = {
        "margins without negatives": ["softmax", "sfn_norm", "sfn_cosface", "sfn_arcface"],
        "Margin-OS": ["os", "norm_os", "cos_os", "arc_os"],
        "Margin-EOS": ["os", "eos", "norm_eos", "cos_eos", "arc_eos"],
    }
    losses = sorted({loss for panel in compared.values() for loss in panel})
    unknown = get_protocol("p1").unknown
    for cell in plan("p1", losses=losses, seeds=1, digits=[]):
        of_letters = scored(5.0, cell.seed)
        groups = of_letters.groups.astype("U9")
        for letter, wnid in zip(LETTERS[UNKNOWN], unknown, strict=False):
            groups[groups == letter] = wnid
        finished_run(tmp_path / "runs", cell, sample=replace(of_letters, groups=groups))
    target = pages.write("p1", runs=tmp_path / "runs", results=tmp_path / "results")
    assert target is not None
    settings = group_rows(read_rows(tmp_path / "results/p1.json"), tmp_path / "runs", tmp_path)
    [entries] = settings.values()
    assert {
        title: [entry.loss for entry in shown] for title, shown in curves.panels(entries)
    } == compared
    # Classes have names for people.
    passing = section(target.read_text(), "### Who passes")
    names = {get_protocol("p1").class_names[wnid].partition(",")[0] for wnid in unknown[:4]}
    shown = set(re.findall(r"[|,] ([^|,→]+) →", passing))
    assert shown
    assert shown <= names
    assert not re.search(r"n\d{8}", passing)
    for kind in ("oscr", "oscr-logit", "angles"):
        [name] = re.findall(rf"!\[.*\]\((figures/p1-[^)]*-{kind}.png)\)", target.read_text())
        assert (target.parent / name).is_file()


def test_a_loss_that_was_run_with_options_alone_is_compared_with_those_that_lack_them(
    tmp_path: Path,
) -> None:
    for cell in plan("toy", losses=["os", "eos", "softmax"], seeds=1, digits=["mnist"]):
        finished_run(tmp_path / "runs", cell)
    options = {"margin_warmup_epochs": 10}
    for cell in plan("toy", losses=["cos_os"], seeds=1, digits=["mnist"], options=options):
        finished_run(tmp_path / "runs", cell)

    def titles() -> dict[str, list[str]]:
        written(tmp_path)
        rows = read_rows(tmp_path / "results/toy.json")
        entries = [
            entry
            for shown in group_rows(rows, tmp_path / "runs", tmp_path).values()
            for entry in shown
        ]
        return {title: [entry.label for entry in shown] for title, shown in curves.panels(entries)}

    with_warmup = "cos_os (margin_warmup_epochs=10)"
    assert titles() == {
        "Margin-OS": ["os", with_warmup],
        "Margin-EOS": ["os", "eos"],
        "others": ["softmax"],
    }
    # Where it was run with and without, each stands among its like.
    for cell in plan("toy", losses=["cos_os"], seeds=1, digits=["mnist"]):
        finished_run(tmp_path / "runs", cell)
    assert titles()["Margin-OS"] == ["os", "cos_os"]
    assert set(titles()["cos_os and options"]) == {"cos_os", with_warmup}


def test_a_panel_that_compares_nothing_of_its_own_is_left_out(tmp_path: Path) -> None:
    for loss in ("os", "norm_os", "cos_os", "arc_os", "eos", "cos_eos"):
        finished_run(tmp_path / "runs", cells(loss, seeds=1)[0])
    written(tmp_path)
    settings = group_rows(read_rows(tmp_path / "results/toy.json"), tmp_path / "runs", tmp_path)
    [entries] = settings.values()
    titles = {title: [entry.loss for entry in shown] for title, shown in curves.panels(entries)}
    # Symmetric losses alone, and one of the hard and soft ones: nothing to compare them with.
    assert set(titles) == {"Margin-OS", "Margin-EOS"}
    assert set(titles["Margin-EOS"]) == {"os", "eos", "cos_eos"}
    alike = [entry for entry in entries if entry.loss in ("cos_os", "arc_os")]
    assert [title for title, _ in curves.panels(alike)] == ["Margin-OS"]
