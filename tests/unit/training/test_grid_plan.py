"""The grid: which cells, in which order, under which names, and what is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openset.fitted_scores import ALL_SCORES
from tests.grid_runs import restricted_cells, restricted_tree
from training import precision
from training.grid.plan import Cell, all_classes, data_columns, plan, ranked_losses
from training.grid.rows import cell_columns
from training.losses import THESIS_LOSSES
from training.recommendations import RECOMMENDATIONS, Recommendation, recommendation


def test_every_loss_is_ranked_once_and_the_headline_losses_come_first() -> None:
    ranked = ranked_losses("toy")
    assert ranked[:4] == ["cos_eos", "arc_eos", "cos_os", "arc_os"]
    assert sorted(ranked) == sorted(THESIS_LOSSES)
    assert sorted(ranked_losses("toy_vis")) == sorted(THESIS_LOSSES)


def test_all_losses_come_with_one_seed_before_any_comes_with_the_next() -> None:
    cells = plan("toy", seeds=2, losses=["eos", "os"])
    order = [(cell.seed, cell.loss, cell.digits) for cell in cells]
    assert order == [
        (1, "eos", "mnist"), (1, "eos", "emnist"), (1, "os", "mnist"), (1, "os", "emnist"),
        (2, "eos", "mnist"), (2, "eos", "emnist"), (2, "os", "mnist"), (2, "os", "emnist"),
    ]  # fmt: skip
    assert len(plan("toy")) == 20 * 3 * 2
    assert len(plan("p1")) == 20 * 3


def test_thesis_preset_is_the_published_code_with_either_digits_unless_told_otherwise() -> None:
    mnist, emnist = plan("toy", seeds=1, losses=["cos_os"])
    for cell in (mnist, emnist):
        config = cell.config(data=None, device="cpu")
        assert config.as_published
        assert config.network_options == {"activation": "none", "feature_bias": True}
        assert config.data_options == {"digits": cell.digits}
    [own] = plan(
        "toy", seeds=1, losses=["cos_os"], digits=["emnist"], options={"as_published": False}
    )
    assert not own.config(data=None, device="cpu").as_published
    [modern] = plan("toy", seeds=1, losses=["cos_os"], digits=["emnist"], preset="modern")
    assert not modern.config(data=None, device="cpu").as_published


def test_option_spelt_out_with_its_default_is_the_same_cell() -> None:
    arguments = {"seeds": 1, "losses": ["cos_os"], "digits": ["mnist"]}
    [plain] = plan("toy", **arguments)
    [spelt] = plan("toy", **arguments, options={"cosine_margin": 0.35, "learning_rate": 1e-3})
    [other] = plan("toy", **arguments, options={"cosine_margin": 0.2})
    assert spelt == plain
    assert other.options == {"as_published": True, "cosine_margin": 0.2}
    assert len({plain.name, other.name}) == 2


@pytest.mark.parametrize(
    "spelt", [{"image_size": 224}, {"split_seed": 4242}, {"allow_missing_classes": False}], ids=str
)
def test_data_spelt_out_as_they_are_anyway_are_the_same_cell(spelt: dict[str, Any]) -> None:
    [plain] = plan("p1", seeds=1, losses=["cos_os"])
    assert plan("p1", seeds=1, losses=["cos_os"], options=spelt) == [plain]


@pytest.mark.parametrize(
    "options",
    [{"compile": True}, {"checkpoint_seconds": 30}, {"scores": "all"}, {"precision": "float32"}, {"download": True}],
    ids=str,
)  # fmt: skip
def test_option_of_speed_or_evaluation_is_the_same_cell_and_still_in_its_configuration(
    options: dict,
) -> None:
    arguments = {"seeds": 1, "losses": ["cos_os"], "digits": ["mnist"], "device": "cpu"}
    [plain] = plan("toy", **arguments)
    [fast] = plan("toy", **arguments, options=options)
    assert (fast, fast.name, fast.options) == (plain, plain.name, plain.options)
    config = fast.config(data=None, device="cpu")
    set_there = {
        "compile": config.compiled, "checkpoint_seconds": config.checkpoint_seconds, "scores": config.scores,
        "precision": config.training.precision, "download": config.data_options.get("download"),
    }  # fmt: skip
    [(key, value)] = options.items()
    assert set_there[key] == (list(ALL_SCORES) if value == "all" else value)


def test_precision_is_a_column_and_not_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"seeds": 1, "losses": ["cos_os"], "digits": ["mnist"], "device": "cpu"}
    [plain] = plan("toy", **arguments)
    [half] = plan("toy", **arguments, options={"precision": "bfloat16"})
    assert half.options == plain.options
    assert (half.precision, half.name) == ("bfloat16", f"{plain.name}-bf16")
    assert half.config(data=None, device="cpu").training.precision == "bfloat16"
    # "auto" is what the planning device makes of it, wherever the plan is carried out.
    for native, resolved in ((True, half), (False, plain)):
        monkeypatch.setattr(precision, "has_native_bfloat16", lambda _, native=native: native)
        [auto] = plan("toy", **arguments, options={"precision": "auto"})
        assert auto == resolved
        monkeypatch.setattr(precision, "has_native_bfloat16", lambda _, native=native: not native)
        trained = auto.config(data=None, device="cpu").training.precision
        assert trained == resolved.precision


def test_recommended_is_planned_as_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Recommendation(
        "cos_os", "modern", ("ghost", "softmax"), "", provisional=True, options={"scale": "adacos"}
    )
    monkeypatch.setitem(RECOMMENDATIONS, "toy", choice)
    arguments = {
        "seeds": 1,
        "digits": ["emnist"],
        "device": "cpu",
        "options": {"precision": "float32"},
    }
    [cell] = plan("toy", losses=["recommended"], **arguments)
    assert (cell.loss, cell.preset, cell.options) == ("cos_os", "modern", {"scale": "adacos"})
    assert cell.scores == ["ghost", "softmax"]
    assert cell.config(data=None, device="cpu").scores == ["ghost", "softmax"]
    assert cell_columns(cell, {"classes": "10/11/11"})["scores"] == ["ghost", "softmax"]
    # The same experiment under its own name is one cell.
    both = plan(
        "toy",
        losses=["recommended", "cos_os"],
        preset="modern",
        **arguments | {"options": {"scale": "adacos", "precision": "float32"}},
    )
    assert both == [cell]
    assert both[0].scores == ["ghost", "softmax"]


def test_recommended_is_planned_for_each_source_of_digits_as_what_it_stands_for_there() -> None:
    cells = plan("toy", seeds=1, losses=["recommended"], device="cpu")
    for cell in cells:
        choice = recommendation("toy", cell.digits)
        assert (cell.loss, cell.preset, cell.scores) == (
            choice.loss,
            choice.preset,
            list(choice.scores),
        )
    assert [cell.digits for cell in cells] == ["mnist", "emnist"]
    assert cells[0].loss != cells[1].loss


def test_beyond_the_thesis_nothing_was_published() -> None:
    [cell] = plan("toy", seeds=1, losses=["cos_bg"], digits=["mnist"], device="cpu")
    assert not cell.config(data=None, device="cpu").as_published


@pytest.mark.parametrize("scale", ["adacos", "adacos_dynamic", "margin_aware"])
def test_scale_by_rule_is_checked_with_the_protocols_classes(scale: str) -> None:
    [cell] = plan("toy", seeds=1, losses=["cos_eos"], digits=["mnist"], options={"scale": scale})
    assert cell.options["scale"] == scale


def test_name_tells_every_column_of_a_cell_apart() -> None:
    base = {
        "protocol": "toy", "loss": "eos", "preset": "thesis", "digits": "mnist", "epochs": 15, "seed": 1,
        "options": {},
    }  # fmt: skip
    changes = [
        {}, {"protocol": "toy_vis"}, {"loss": "os"}, {"preset": "modern"}, {"digits": "emnist"}, {"epochs": 5},
        {"seed": 2}, {"options": {"scale": 3.1}}, {"precision": "bfloat16"},
    ]  # fmt: skip
    assert len({Cell(**(base | change)).name for change in changes}) == len(changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": ["eos", "cosos"]}, "no loss cosos"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seeds": [2, 0]}, r"at least 1, got \[2, 0\]"),
        ({"digits": ["svhn"]}, "digits must be among"),
        ({"losses": ["eos"], "options": {"cosine_margin": 0.2}}, "has no option cosine_margin"),
        ({"preset": "ancient"}, "preset must be one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_the_grid_is_planned(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan("toy", **arguments)


def test_digits_are_refused_where_there_is_no_choice() -> None:
    with pytest.raises(ValueError, match="no choice of digits"):
        plan("p1", digits=["mnist"])


def test_data_columns_of_a_restricted_tree_are_those_of_the_tree(tmp_path: Path) -> None:
    [cell] = restricted_cells()
    one, other, more = (
        data_columns(cell.config(data=restricted_tree(tmp_path / name, *tree), device="cpu"))
        for name, tree in {"one": (), "other": (1,), "more": (0, 6)}.items()
    )
    assert one["classes"] == other["classes"] == more["classes"] == "3/2/1"
    assert one["counts"]["test"] == {"known": 15, "negative": 10, "unknown": 5}
    assert more == one | {"counts": more["counts"]}
    assert more["counts"] != one["counts"]
    assert other == one | {"classes_digest": other["classes_digest"]}
    assert other["classes_digest"] != one["classes_digest"]
    [whole] = plan("p2", seeds=1, losses=["eos"], device="cpu")
    assert data_columns(whole.config(data=None, device="cpu")) == {"classes": "30/31/55"}
    assert all_classes("p2") == "30/31/55"
