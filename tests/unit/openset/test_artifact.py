"""Artifact, classifier and card: what is written is what answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openset.artifact import BrokenArtifact, load_artifact, read_card
from openset.calibration import load_score_sets
from openset.classifier import SCORE_TOLERANCE
from openset.model_card import ModelCard, PathIdentity
from openset.networks import build_network
from tests.factories import tiny_artifact, tiny_card


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.mark.parametrize("precision", sorted(SCORE_TOLERANCE))
def test_stored_scores_are_reproduced_whatever_the_batch_size(
    artifact: Path, precision: str
) -> None:
    classifier = load_artifact(artifact, precision=precision)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 28, 28), dtype=torch.uint8)
    together = classifier.predict(images).scores["softmax"]
    alone = torch.cat([classifier.predict(image[None]).scores["softmax"] for image in images])
    torch.testing.assert_close(together, alone, atol=SCORE_TOLERANCE[precision], rtol=0)


def test_bfloat16_is_another_path_with_nearby_scores(artifact: Path) -> None:
    exact, fast = load_artifact(artifact), load_artifact(artifact, precision="bfloat16")
    assert exact.path.key != fast.path.key
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    difference = exact.predict(images).scores["softmax"] - fast.predict(images).scores["softmax"]
    assert 0 < difference.abs().max() < SCORE_TOLERANCE["bfloat16"]


def test_the_factory_point_belongs_to_the_path_that_serves(artifact: Path) -> None:
    classifier = load_artifact(artifact)
    factory = classifier.card.factory
    assert factory is not None
    assert factory["path"] == classifier.path.key
    assert classifier.path.key in load_score_sets(artifact / "calibration.npz")


def test_each_image_is_judged_by_its_own_tau_and_score(artifact: Path) -> None:
    classifier = load_artifact(artifact)
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    prediction = classifier.predict(images)
    names = ["softmax", "logit", "softmax", "logit"]
    own = torch.stack([prediction.scores[name][row] for row, name in enumerate(names)])
    above = torch.nextafter(own, torch.full_like(own, float("inf")))
    taus = torch.stack([own[0], own[1], above[2], above[3]])
    chosen, accepted = classifier.decide(prediction, taus, names)
    assert torch.equal(chosen, own)
    assert accepted.tolist() == [True, True, False, False]


def test_a_non_finite_score_is_never_accepted(artifact: Path) -> None:
    classifier = load_artifact(artifact)
    prediction = classifier.predict(torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    prediction.scores["softmax"] = torch.tensor([float("inf"), float("nan"), 1.0])
    _, accepted = classifier.decide(prediction, torch.full((3,), -1e9), ["softmax"] * 3)
    assert accepted.tolist() == [False, False, True]


@pytest.mark.parametrize("damage", ["weights.safetensors", "model_card.json"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, artifact: Path, damage: str) -> None:
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / damage).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"weights\.safetensors|model card"):
        load_artifact(tmp_path)


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BrokenArtifact, match="make export"):
        read_card(tmp_path)


def test_card_survives_json_and_refuses_strangers() -> None:
    card = tiny_card()
    assert ModelCard.from_json(card.to_json()) == card
    with pytest.raises(ValueError, match="unknown keys"):
        ModelCard.from_json(card.to_json().replace('"loss"', '"lozz"'))
    with pytest.raises(ValueError, match="num_classes"):
        tiny_card(num_classes=3)
    with pytest.raises(ValueError, match="unknown"):
        tiny_card(class_names=[*"012345678", "unknown"])


def test_card_digest_follows_what_changes_scores_only() -> None:
    card = tiny_card()
    assert (
        card.digest()
        == tiny_card(name="other", factory={"tau": 1.0}, training={"seed": 7}).digest()
    )
    assert card.digest() != tiny_card(scale=14.0).digest()


def test_path_key_tells_device_precision_and_mode() -> None:
    assert (
        PathIdentity("0123456789abcdef99", "cuda", "bfloat16", "compiled").key
        == "cuda-bfloat16-compiled-0123456789abcdef"
    )


def test_networks_have_the_documented_size() -> None:
    published = build_network(
        "lenet_plus_plus", feature_dim=10, activation="none", feature_bias=True
    )
    assert sum(parameter.numel() for parameter in published.parameters()) == 806_826
    assert published(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert build_network("resnet50", feature_dim=7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match="resnet50"):
        build_network("alexnet", feature_dim=7)
