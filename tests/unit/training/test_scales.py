"""The scale by rule, and the one that follows the batches, through checkpoint and export."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openset.labels import NEGATIVE
from tests.factories import begun_run
from training.data import load_protocol
from training.engine import Trainer
from training.losses import build_loss
from training.losses.margins import AngularMargin, CosineMargin
from training.losses.scales import magnitude_weight_above_bound, resolve_scale, scale_bound
from training.runs import Run, make_config


@pytest.mark.parametrize(
    ("classes", "bound", "thesis", "adacos", "cosine", "angular"),
    [
        (10, 12.963, 13, 3.1, (8.9, 12.0), (6.9, 9.2)),
        (30, 15.054, 16, 4.8, (11.6, 15.0), (8.7, 11.3)),
        (116, 16.805, 17, 6.7, (14.2, 17.7), (10.5, 13.1)),
        (151, 17.103, 18, 7.1, (14.6, 18.1), (10.9, 13.5)),
    ],
)
def test_scales_of_the_protocols(
    classes: int, bound: float, thesis: int, adacos: float, cosine: Any, angular: Any
) -> None:
    assert scale_bound(classes, 0.999995) == pytest.approx(bound, abs=5e-4)
    assert resolve_scale("thesis", num_classes=classes) == thesis
    assert resolve_scale("adacos", num_classes=classes) == pytest.approx(adacos, abs=0.05)
    for margin, expected in ((CosineMargin(), cosine), (AngularMargin(), angular)):
        for probability, value in zip((0.99, 0.999), expected, strict=True):
            scale = resolve_scale(
                "margin_aware", num_classes=classes, margin=margin, probability=probability
            )
            assert scale == pytest.approx(value, abs=0.051)


@pytest.mark.parametrize("probability", [0.9, 0.99])
def test_margin_aware_scale_gives_a_perfect_sample_its_probability(probability: float) -> None:
    classes, margin = 12, 0.35
    scale = resolve_scale(
        "margin_aware", num_classes=classes, margin=CosineMargin(margin), probability=probability
    )
    logits = torch.full((classes,), -scale / (classes - 1), dtype=torch.float64)
    logits[0] = scale * (1 - margin)
    assert logits.softmax(0)[0].item() == pytest.approx(probability)


@pytest.mark.parametrize(
    ("scale", "message"),
    [("arcos", "adacos_dynamic"), (0.0, "positive"), (math.nan, "positive"), (-3, "positive")],
)
def test_impossible_scale_is_refused(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss("cos_eos", num_classes=5, feature_dim=5, scale=scale)


@pytest.mark.parametrize(("rule", "fewest"), [("thesis", 2), ("margin_aware", 2), ("adacos", 3)])
def test_rule_needs_classes_to_tell_apart(rule: str, fewest: int) -> None:
    assert resolve_scale(rule, num_classes=fewest) > 0
    with pytest.raises(ValueError, match=f"at least {fewest} classes"):
        resolve_scale(rule, num_classes=fewest - 1)


def test_margin_beyond_the_simplex_has_no_scale() -> None:
    with pytest.raises(ValueError, match="smaller margin"):
        resolve_scale("margin_aware", num_classes=5, margin=CosineMargin(1.3))


@pytest.mark.parametrize("loss", ["softmax", "cos_os"])
def test_dynamic_scale_needs_a_hard_head(loss: str) -> None:
    with pytest.raises(ValueError, match="hard head"):
        build_loss(loss, num_classes=5, feature_dim=5, scale="adacos_dynamic")


@pytest.mark.parametrize("probability", [0.2, 1.0])
def test_probability_of_chance_or_certainty_has_no_scale(probability: float) -> None:
    with pytest.raises(ValueError, match=r"between 1/C = 0\.2 and 1"):
        resolve_scale("margin_aware", num_classes=5, probability=probability)


def test_probability_belongs_to_the_margin_aware_scale_only() -> None:
    options = {"num_classes": 5, "feature_dim": 5, "scale_probability": 0.9}
    assert build_loss("cos_eos", scale="margin_aware", **options)
    with pytest.raises(ValueError, match="scale_probability"):
        build_loss("cos_eos", scale="thesis", **options)


def adacos_by_hand(cosines: list[list[float]], labels: list[int], scale: float) -> float:
    """Equations 15 to 17 of the paper, sample by sample; negatives have no own class and do not count."""
    sums, angles = [], []
    for row, label in zip(cosines, labels, strict=True):
        if label >= 0:
            sums.append(sum(math.exp(scale * c) for i, c in enumerate(row) if i != label))
            angles.append(math.acos(row[label]))
    mean, median = sum(sums) / len(sums), statistics.median_low(angles)
    return math.log(mean) / math.cos(min(math.pi / 4, median))


@pytest.mark.parametrize("loss_name", ["norm_eos", "norm_bg"])
def test_dynamic_scale_follows_the_paper_and_carries_no_gradient(loss_name: str) -> None:
    head, criterion = build_loss(loss_name, num_classes=5, feature_dim=3, scale="adacos_dynamic")
    scale = math.sqrt(2) * math.log(4)
    assert criterion.adapted_scale == pytest.approx(scale)
    generator = torch.Generator().manual_seed(3)
    for labels in ([0, 1, NEGATIVE, 4, 2, NEGATIVE], [3, 3, 0], [NEGATIVE, 2]):
        features = torch.randn(len(labels), 3, generator=generator, requires_grad=True)
        output = head(features)
        scale = adacos_by_hand(output.cosines.tolist(), labels, scale)
        loss = criterion(output, torch.tensor(labels))
        assert criterion.adapted_scale == pytest.approx(scale, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, features)
        assert criterion.adapted_scale is not None
        fixed_head, fixed = build_loss(
            loss_name, num_classes=5, feature_dim=3, scale=criterion.adapted_scale
        )
        fixed_head.load_state_dict(head.state_dict())
        expected = fixed(fixed_head(features), torch.tensor(labels))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])


def test_dynamic_scale_rests_without_knowns_and_outside_training() -> None:
    head, criterion = build_loss("cos_eos", num_classes=5, feature_dim=3, scale="adacos_dynamic")
    before = criterion.adapted_scale
    output = head(torch.randn(4, 3))
    assert torch.isfinite(criterion(output, torch.full((4,), NEGATIVE)))
    assert criterion.adapted_scale == before
    criterion.eval()(output, torch.tensor([0, 1, 2, 3]))
    assert criterion.adapted_scale == before
    criterion.train()(output, torch.tensor([0, 1, 2, 3]))
    assert criterion.adapted_scale != before


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = load_protocol("glyphs", size="small", cache_dir=tmp_path_factory.mktemp("cache"))
    choice = np.random.default_rng(0).permutation(len(data.train))[:160]
    validation = np.random.default_rng(1).permutation(len(data.validation))[:60]
    return dataclasses.replace(
        data, train=data.train.subset(choice), validation=data.validation.subset(validation)
    )


def test_dynamic_scale_survives_the_checkpoint_exactly_and_ends_in_the_head(
    few: Any, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    options = {"scale": "adacos_dynamic"}

    def trainer(name: str, epochs: int) -> Trainer:
        config = make_config(
            "glyphs", "cos_eos", epochs=epochs, options=options, device="cpu", name=name
        )
        made = Trainer(config, few, tmp_path / name, show_progress=False)
        begun_run(tmp_path / name, config)
        return made

    trainer("whole", 2).run()
    trainer("broken", 1).run()
    continued = trainer("broken", 2)
    assert continued.resume()
    continued.run()
    whole, resumed = (Run(tmp_path / name).load_checkpoint() for name in ("whole", "broken"))
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    assert torch.equal(
        whole["criterion"]["dynamic_scale.value"], resumed["criterion"]["dynamic_scale.value"]
    )
    run = Run(tmp_path / "whole")
    _, head = run.load_model()
    adapted = float(whole["criterion"]["dynamic_scale.value"])
    assert head.scale == adapted != math.sqrt(2) * math.log(9)
    card = run.model_card(few, head)
    assert (card.scale, card.options["scale"]) == (adapted, "adacos_dynamic")


@pytest.mark.parametrize(
    ("margin", "target", "bound"),
    [
        (AngularMargin(), 13.0, 0.0184), (AngularMargin(), 17.0, 0.0141), (CosineMargin(), 17.0, 0.0103),
        (CosineMargin(), 18.0, 0.0097),
    ],
)  # fmt: skip
def test_weight_above_the_bound_of_the_science_reference(
    margin: Any, target: float, bound: float
) -> None:
    weight = magnitude_weight_above_bound(margin, target_magnitude=target)
    assert weight == pytest.approx(1.1 * bound, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "grows"),
    [
        ({}, False), ({"magnitude_weight": "above_bound"}, True), ({"detach_radial": True}, True),
        ({"margin_warmup_epochs": 5}, True),
    ],
)  # fmt: skip
def test_each_cure_of_arc_os_turns_the_push_on_the_magnitude(
    options: dict[str, Any], grows: bool
) -> None:
    """P1's numbers: a known at a right angle to all centers, near magnitude 0. Descent shrinks it; each cure lets it grow."""
    head, criterion = build_loss("arc_os", num_classes=116, feature_dim=117, scale=17.0, **options)
    criterion.set_epoch(0)
    head.weight.data = torch.eye(116, 117)
    features = torch.zeros(1, 117)
    features[0, 116] = 0.05
    features.requires_grad_()
    criterion(head(features), torch.tensor([0])).backward()
    assert features.grad is not None
    assert bool(features.grad[0, 116] < 0) is grows


def test_bound_is_refused_where_it_would_be_too_small() -> None:
    arguments = {"num_classes": 3, "feature_dim": 3, "scale": 5, "magnitude_weight": "above_bound"}
    with pytest.raises(ValueError, match="larger by N / N_k"):
        build_loss("arc_os", as_published=True, **arguments)
    build_loss("arc_os", as_published=True, cce_mean="all", **arguments)


def test_loss_without_a_cosine_margin_has_no_bound() -> None:
    with pytest.raises(ValueError, match="margin on the cosine"):
        build_loss("norm_os", num_classes=3, feature_dim=3, scale=5, magnitude_weight="above_bound")
