"""The grid: which cells, in which order, under which names, and what is refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.grid import Cell, all_classes, class_counts, plan, ranked_losses
from training.losses import THESIS_LOSSES


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


def test_name_tells_every_column_of_a_cell_apart() -> None:
    base = {
        "protocol": "toy", "loss": "eos", "preset": "thesis", "digits": "mnist", "epochs": 15, "seed": 1,
        "options": {},
    }  # fmt: skip
    changes = [
        {}, {"protocol": "toy_vis"}, {"loss": "os"}, {"preset": "modern"}, {"digits": "emnist"}, {"epochs": 5},
        {"seed": 2}, {"options": {"scale": 3.1}},
    ]  # fmt: skip
    assert len({Cell(**(base | change)).name for change in changes}) == len(changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": ["eos", "cosos"]}, "no loss cosos"),
        ({"seeds": 0}, "seeds must be at least 1"),
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


def test_class_counts_of_a_restricted_tree_are_those_of_the_tree(tmp_path: Path) -> None:
    from training.protocols import get_protocol

    protocol = get_protocol("p2")
    present = [*protocol.known[:3], *protocol.negative[:2], *protocol.unknown[:1]]
    for wnid in present:
        for part in ("train", "val"):
            folder = tmp_path / part / wnid
            folder.mkdir(parents=True)
            for number in range(5):
                (folder / f"{number}.jpeg").touch()
    [cell] = plan("p2", seeds=1, losses=["eos"], options={"allow_missing_classes": True})
    assert class_counts(cell.config(data=tmp_path, device="cpu")) == "3/2/1"
    assert all_classes("p2") == "30/31/55"
