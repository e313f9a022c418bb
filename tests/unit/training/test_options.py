"""The free options of a run: listed with types and defaults, and all named where one is unknown."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from openset.labels import NEGATIVE
from training.losses import LOSSES, build_loss
from training.losses.scales import MARGIN_AWARE
from training.options import listing, options_of
from training.protocols import PROTOCOLS
from training.recommendations import recommendation
from training.runs import TrainConfig, make_config
from training.train import main, parse_option


def defaults(protocol: str, loss: str, group: str) -> dict[str, object]:
    return {option.name: option.default for option in options_of(protocol, loss)[group]}


@pytest.mark.parametrize(
    ("protocol", "loss"),
    [*(("glyphs", loss) for loss in sorted(LOSSES)), *((name, "cos_os") for name in PROTOCOLS[1:])],
)
def test_every_option_of_the_list_is_taken_with_its_default(protocol: str, loss: str) -> None:
    config = make_config(protocol, loss, device="cpu")
    listed = {
        group: {option.name: option.default for option in options}
        for group, options in options_of(protocol, loss).items()
    }
    # The names without a value of their own: "as many as classes", "as the scale is".
    given = {
        name: value
        for group in ("loss", "network", "preset", "data")
        for name, value in listed[group].items()
        if name not in ("target_magnitude", "scale_probability", "feature_dim")
    }
    same = make_config(protocol, loss, device="cpu", options=given)
    assert same.training == config.training
    assert same.data_options == {
        {"split_seed": "seed"}.get(name, name): value for name, value in listed["data"].items()
    }
    build_loss(
        loss,
        num_classes=10,
        feature_dim=10,
        scale=same.loss_options["scale"],
        **same.criterion_options,
    )


def test_options_of_a_loss_change_with_loss_and_scale() -> None:
    assert defaults("toy", "cos_os", "loss")["cosine_margin"] == 0.35
    assert defaults("toy_vis", "cos_os", "loss")["cosine_margin"] == 0.15
    assert "cosine_margin" not in defaults("toy", "eos", "loss")
    with_scale = {o.name for o in options_of("toy", "cos_eos", scale=MARGIN_AWARE)["loss"]}
    without = {o.name for o in options_of("toy", "cos_eos", scale=13.0)["loss"]}
    assert with_scale - without == {"scale_probability"}


@pytest.mark.parametrize(
    ("protocol", "option"),
    [("glyphs", "size"), ("toy", "digits"), ("p1", "image_size"), ("p1", "allow_missing_classes")],
)
def test_data_options_are_the_protocols(protocol: str, option: str) -> None:
    holders = {name for name in PROTOCOLS if option in defaults(name, "eos", "data")}
    assert protocol in holders
    assert holders < set(PROTOCOLS)


@pytest.mark.parametrize(
    ("protocol", "option"),
    [("p1", "digits"), ("p1", "size"), ("toy", "image_size"), ("glyphs", "download"), ("folders", "allow_missing_classes")],
)  # fmt: skip
def test_option_of_other_data_is_refused_and_not_left_without_effect(
    protocol: str, option: str
) -> None:
    value = {"digits": "mnist", "size": "small", "image_size": 64}.get(option, True)
    with pytest.raises(ValueError, match=f"has no option {option}"):
        make_config(protocol, "eos", options={option: value}, device="cpu")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("as_published", "no", "true or false"),
        ("nesterov", 1, "true or false"),
        ("cosine_margin", "0,35", "number"),
        ("learning_rate", True, "number"),
        ("batch_size", 32.5, "whole number"),
        ("cosine_margin", math.nan, "number"),
        ("learning_rate", -math.inf, "number"),
        ("scale", True, "number or thesis, margin_aware, adacos, adacos_dynamic"),
        ("scale", "Thesis", "number or thesis, margin_aware, adacos, adacos_dynamic"),
        ("scale", math.inf, "number or thesis, margin_aware, adacos, adacos_dynamic"),
        ("magnitude_weight", True, "number or above_bound"),
        ("magnitude_weight", None, "number or above_bound"),
        ("feature_dim", True, "whole number or C-1, C, C+1, 4C"),
        ("feature_dim", 11.0, "whole number or C-1, C, C+1, 4C"),
        ("activation", 1, "prelu or none"),
        ("activation", "relu", "prelu or none"),
        ("digits", None, "mnist or emnist"),
        ("ema_decay", "none", "number or null"),
        ("initial_weights", 5, "folder of a finished run, or file of ResNet-50 weights"),
        ("scores", 5, "names, comma-separated, or all"),
        ("scores", [5], "names, comma-separated, or all"),
        ("image_size", True, "whole number (pixels)"),
        ("image_size", 64.5, "whole number (pixels)"),
        ("image_size", "64px", "whole number (pixels)"),
    ],
)
def test_value_of_another_type_is_refused(name: str, value: object, expected: str) -> None:
    protocol = "p2" if name == "image_size" else "toy"
    told = re.escape(f"{name} must be {expected}, got {value!r}")
    with pytest.raises(ValueError, match=f"^{told}$"):
        make_config(protocol, "cos_os", options={name: value}, device="cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 17), ("scale", "adacos"), ("magnitude_weight", "above_bound"), ("feature_dim", 0), ("feature_dim", "C+1"),
        ("ema_decay", None), ("initial_weights", None), ("initial_weights", "runs/one"), ("scores", None),
        ("scores", "softmax,energy"), ("scores", ["softmax", "energy"]),
    ],
)  # fmt: skip
def test_number_word_null_or_names_are_taken_where_they_mean_something(
    name: str, value: object
) -> None:
    assert make_config("toy", "cos_os", options={name: value}, device="cpu")


def test_options_that_mean_nothing_for_a_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="has no option cce_mean"):
        make_config("toy", "cosface", options={"cce_mean": "known"}, device="cpu")


def test_run_of_an_earlier_release_with_such_an_option_is_still_built() -> None:
    config = make_config("toy", "cosface", device="cpu")
    former = replace(config, loss_options={**config.loss_options, "cce_mean": "known"})
    head, criterion = TrainConfig.from_json(former.to_json()).head_and_criterion(10)
    _, without = config.head_and_criterion(10)
    output, labels = head(torch.randn(4, 10)), torch.tensor([0, 3, NEGATIVE, 9])
    assert criterion(output, labels) == without(output, labels)


def test_unknown_option_is_refused_before_any_data_with_all_that_there_are() -> None:
    with pytest.raises(ValueError, match="has no option featuredim") as refused:
        make_config("glyphs", "cos_os", options={"featuredim": 3}, device="cpu")
    told = str(refused.value)
    for group, option in (
        ("loss: ", "cosine_margin"), ("network: ", "activation"), ("preset: ", "learning_rate"), ("data: ", "size"),
        ("run: ", "as_published"),
    ):  # fmt: skip
        names = told.partition(group)[2].partition(";")[0]
        assert option in names.partition(". Types")[0].split(", ")
    assert "--list-options --protocol glyphs --loss cos_os" in told


def test_command_lists_groups_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-options", "--protocol", "glyphs", "--loss", "cos_eos"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for group in ("loss", "network", "preset", "data", "run"):
        assert [f"{group}:"] in lines
    rows = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert rows["size"] == "full or small default full"
    assert rows["batch_size"] == "whole number default 32"
    assert rows["cosine_margin"] == "number default 0.35"
    assert rows["nesterov"] == "true or false default false"
    assert main(["--list-options"]) == 0  # of glyphs and cos_eos
    assert "options of glyphs with cos_eos" in capsys.readouterr().out


def test_presets_and_recommendation_set_the_defaults_that_are_listed() -> None:
    assert "default 128" in next(
        line for line in listing("toy", "eos", "modern").splitlines() if "batch_size" in line
    )
    assert parse_option("size=small") == ("size", "small")
    for protocol in PROTOCOLS:
        scores = make_config(protocol, "recommended", device="cpu").scores
        assert defaults(protocol, "recommended", "run")["scores"] == ",".join(scores or [])
    assert re.search(r"scores .* default softmax$", listing("folders", "recommended"), re.MULTILINE)
    for digits, source in ((None, "EMNIST"), ("emnist", "EMNIST"), ("mnist", "MNIST")):
        text = listing("toy", "recommended", digits=digits)
        assert f"with recommended ({source}'s digits): " in text
        choice = recommendation("toy", digits)
        assert re.search(rf"scores .* default {choice.scores[0]}$", text, re.MULTILINE)
        width = choice.options.get("feature_dim", 10)
        assert re.search(rf"feature_dim .* default {width}$", text, re.MULTILINE)
    assert "digits" not in listing("toy", "os").splitlines()[0]
