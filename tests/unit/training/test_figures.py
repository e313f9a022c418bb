"""What the figures show, read back from the drawn axes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from scipy.special import softmax

from openset import metrics
from openset.labels import NEGATIVE, UNKNOWN
from training import figures
from training.runs import TrainConfig, make_config
from training.scoring import Scored

CLASSES = 10


def scored(feature_dim: int = 2, *, hard_scale: float | None = None) -> Scored:
    """Ten known classes around a circle, negatives near the origin, unknowns in between."""
    random = np.random.default_rng(0)
    turns = 2 * np.pi * np.arange(CLASSES) / CLASSES
    centers = np.zeros((CLASSES, feature_dim), dtype=np.float32)
    centers[:, :2] = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    labels = np.concatenate([np.repeat(np.arange(CLASSES), 20), [NEGATIVE] * 150, [UNKNOWN] * 120])
    features = random.normal(0, 1, (len(labels), feature_dim)).astype(np.float32)
    features[labels >= 0] += 12 * centers[labels[labels >= 0]]
    cosines = features @ centers.T / np.linalg.norm(features, axis=1, keepdims=True)
    logits = features @ centers.T if hard_scale is None else hard_scale * cosines
    return Scored(
        features=features,
        logits=logits,
        cosines=cosines,
        scores={"softmax": logits.max(axis=1) - logits.mean(axis=1), "logit": logits.max(axis=1)},
        predictions=logits.argmax(axis=1),
        labels=labels,
        groups=labels.astype(str),
        sample_ids=np.arange(len(labels)).astype(str),
        centers=centers,
    )


def config(loss: str, protocol: str = "toy_vis", **options: Any) -> TrainConfig:
    return make_config(protocol, loss, data="nowhere", device="cpu", options=options)


def probability_curves(figure: Figure) -> dict[str, np.ndarray]:
    lines = figure.axes[1].get_lines() if len(figure.axes) > 1 else []
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in lines}


def without(original: Scored, label: int) -> Scored:
    return original.subset(np.flatnonzero(original.labels != label))


def test_oscr_panels_show_the_curves_of_each_group_and_score() -> None:
    sample = scored()
    figure = figures.draw_oscr(sample, config("cos_os"))
    for axes, label in zip(figure.axes, (NEGATIVE, UNKNOWN), strict=True):
        assert axes.get_xscale() == "log"
        assert axes.get_xlim() == (8e-5, 1.4)
        for line, scores in zip(axes.get_lines(), sample.scores.values(), strict=True):
            curve = metrics.oscr_curve(scores, sample.predictions, sample.labels, against=label)
            np.testing.assert_array_equal(line.get_xydata(), np.stack([curve.fpr, curve.ccr], 1))


def test_group_without_samples_gets_no_panel_and_no_histogram() -> None:
    sample = without(scored(), UNKNOWN)
    assert [axes.get_title() for axes in figures.draw_oscr(sample, config("os")).axes] == [
        "against negatives"
    ]
    labels = figures.draw_angles(sample, config("os")).axes[0].get_legend_handles_labels()[1]
    assert labels == ["known (200)", "negative (150)"]


def test_angle_histograms_are_densities_over_the_stated_bins() -> None:
    axes = figures.draw_angles(scored(), config("os")).axes[0]
    outlines = [
        patch for patch in axes.patches if isinstance(patch, StepPatch) and not patch.get_fill()
    ]
    assert len(outlines) == 3
    for outline in outlines:
        density, edges, _ = outline.get_data()
        np.testing.assert_allclose(edges, np.linspace(0, math.pi * 1.01, 100))
        assert (density * np.diff(edges)).sum() == pytest.approx(1)
    assert axes.get_xlim() == (0, math.pi)
    assert axes.get_ylim() == (0, 7)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((name, {}) for name in ("softmax", "eos", "os", "sm_softmax", "bg")),
        ("sfn_norm", {"as_published": True}),
        ("sfn_cosface", {"unit_centers": False}),
    ],
)
def test_heads_with_free_centers_get_no_probability_curve(
    loss: str, options: dict[str, Any]
) -> None:
    assert probability_curves(figures.draw_angles(scored(), config(loss, **options))) == {}


@pytest.mark.parametrize("loss", ["norm_bg", "cos_bg", "cos_bg_sfn"])
def test_background_is_one_more_rival_of_a_probability_curve(loss: str) -> None:
    """Against the softmax of a known at an angle to its center, all others and the background at a right angle."""
    curves = probability_curves(figures.draw_angles(scored(hard_scale=13.0), config(loss)))
    theta, probability = curves["P(θ)"].T
    logits = np.zeros((len(theta), CLASSES + 1))
    logits[:, 0] = 13 * np.cos(theta)
    np.testing.assert_allclose(probability, softmax(logits, axis=1)[:, 0], rtol=1e-9)


def test_drawing_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    figures.draw_angles(scored(), config("norm_os"))
    assert torch.equal(torch.get_rng_state(), before)


def test_probability_curve_crosses_one_half_where_the_formula_says() -> None:
    # cos(theta) = ln(C - 1) / s: 80.3 degrees for C = 10, s = 13.
    curves = probability_curves(figures.draw_angles(scored(hard_scale=13.0), config("norm_eos")))
    assert list(curves) == ["P(θ)"]
    theta, probability = curves["P(θ)"].T
    crossing = np.interp(-0.5, -probability, theta)
    assert np.degrees(crossing) == pytest.approx(math.degrees(math.acos(math.log(9) / 13)), abs=0.1)


@pytest.mark.parametrize(
    ("loss", "margin_cosine"),
    [
        ("cos_eos", lambda theta: np.cos(theta) - 0.15),
        ("arc_eos", lambda theta: np.cos(np.minimum(theta + 0.4, math.pi))),
    ],
)
def test_dashed_curve_is_the_probability_with_the_margin(loss: str, margin_cosine) -> None:
    curves = probability_curves(figures.draw_angles(scored(hard_scale=13.0), config(loss)))
    theta, probability = curves["with margin"].T
    odds = np.exp(13 * margin_cosine(theta))
    np.testing.assert_allclose(probability, odds / (odds + 9), rtol=1e-9)


def test_curve_of_a_soft_head_is_called_approximate() -> None:
    curves = probability_curves(figures.draw_angles(scored(), config("norm_os")))
    assert list(curves) == ["P(θ), approximate"]


def test_feature_panels_add_negatives_then_unknowns_then_directions() -> None:
    sample = scored()
    panels = figures.draw_features(sample, config("cos_os")).axes
    counts = [sum(len(dots.get_offsets()) for dots in panel.collections) for panel in panels]
    assert counts == [200, 200 + 150, 200 + 120, 200]
    radii = np.linalg.norm(panels[3].collections[0].get_offsets(), axis=1)
    np.testing.assert_allclose(radii, 1, rtol=1e-5)
    ends = np.array([line.get_xydata()[1] for line in panels[3].get_lines()])
    np.testing.assert_allclose(ends, sample.centers, atol=1e-6)
    assert [text.get_text() for text in panels[0].texts] == list("0123456789")


def test_a_zero_feature_has_no_direction_and_breaks_nothing() -> None:
    sample = scored()
    features = sample.features.copy()
    features[0] = 0
    panels = figures.draw_features(
        dataclasses.replace(sample, features=features), config("os")
    ).axes
    assert np.isfinite(panels[3].collections[0].get_offsets()).all()


@pytest.mark.parametrize("feature_dim", [2, 4])
def test_features_are_drawn_only_where_they_have_two_dimensions(
    tmp_path: Path, feature_dim: int
) -> None:
    style = dict(mpl.rcParams)
    figures.draw_all(scored(feature_dim), config("cos_os"), tmp_path / "figures", title="a model")
    names = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert names == {"oscr", "angles", "scores"} | ({"features"} if feature_dim == 2 else set())
    assert dict(mpl.rcParams) == style


@pytest.mark.parametrize("draw", [figures.draw_oscr, figures.draw_angles, figures.draw_scores])
def test_legend_lies_inside_the_picture(draw) -> None:
    figure = draw(scored(hard_scale=13.0), config("cos_eos"))
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
