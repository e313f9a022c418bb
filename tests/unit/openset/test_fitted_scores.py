"""Scores with a state: against slow formulas, and through the artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openset.artifact import BrokenArtifact, load_artifact, read_card, save_artifact, write_card
from openset.calibration import load_score_sets
from openset.fitted_scores import ALL_SCORES, FITTED_SCORES, Ghost, Neco, choose_scores
from openset.heads import OpenSetOutput, build_head
from openset.labels import NEGATIVE
from openset.model_card import ModelCard
from openset.scores import SCORES
from tests.factories import tiny_artifact, tiny_card

CLASSES, DIM = 4, 6


def features_of_classes(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(CLASSES).repeat_interleave(count)
    centers = 5 * torch.eye(CLASSES, DIM)
    return centers[labels] + torch.randn(len(labels), DIM, generator=generator), labels


def output_of(features: torch.Tensor) -> OpenSetOutput:
    head = build_head("soft", num_classes=CLASSES, feature_dim=DIM, scale=5.0).eval()
    head.weight.data = torch.eye(CLASSES, DIM)
    with torch.no_grad():
        return head(features)


def test_ghost_is_the_papers_formula() -> None:
    features, labels = features_of_classes()
    predictions = labels.clone()
    predictions[::7] = (labels[::7] + 1) % CLASSES  # these do not enter the statistics
    features[::7] += 100
    score = Ghost.fit(features, predictions, labels, CLASSES)
    new, _ = features_of_classes(3)
    output = output_of(new)
    for row, value in enumerate(score(output)):
        label = int(output.logits[row].argmax())
        own = features[(labels == label) & (predictions == label)].numpy().astype(np.float64)
        mean, deviation = own.mean(axis=0), own.std(axis=0, ddof=1)
        distance = sum(
            abs(float(new[row, d]) - mean[d]) / deviation[d] for d in range(DIM)
        )  # fmt: skip
        assert value.item() == pytest.approx(output.logits[row].max().item() / distance, rel=1e-4)


def test_ghost_ignores_dimensions_without_spread() -> None:
    features, labels = features_of_classes()
    features[:, 5] = 1.5
    score = Ghost.fit(features, labels, labels, CLASSES)
    moved = features.clone()
    moved[:, 5] += 3
    logits = output_of(features).logits
    before, after = (
        score(output_of(f)._replace(logits=logits, features=f)) for f in (features, moved)
    )
    torch.testing.assert_close(before, after)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("right", [0, 1])
def test_ghost_takes_all_samples_of_a_class_with_fewer_than_two_right_and_refuses_an_empty_one(
    right: int,
) -> None:
    features, labels = features_of_classes()
    predictions = labels.clone()
    predictions[labels == 2] = torch.tensor([2] * right + [0] * (40 - right))
    score = Ghost.fit(features, predictions, labels, CLASSES)
    torch.testing.assert_close(score.means[2], features[labels == 2].mean(dim=0))
    with pytest.raises(ValueError, match="class 2"):
        Ghost.fit(features[labels != 2], labels[labels != 2], labels[labels != 2], CLASSES)


def test_neco_is_the_share_inside_the_principal_subspace_times_the_logit() -> None:
    features, labels = features_of_classes()
    score = Neco.fit(features, labels, labels, CLASSES)
    known = features.numpy().astype(np.float64)
    _, _, rows = np.linalg.svd(known - known.mean(axis=0))
    leading = rows[: CLASSES - 1]
    new, _ = features_of_classes(3)
    output = output_of(new)
    for row, value in enumerate(score(output)):
        phi = new[row].numpy().astype(np.float64)
        share = np.linalg.norm(leading @ phi) / np.linalg.norm(phi)
        expected = share * output.logits[row].max().item()
        assert value.item() == pytest.approx(expected, rel=1e-4)


def test_neco_has_a_direction_less_than_there_are_classes_or_dimensions() -> None:
    features, labels = features_of_classes()
    assert Neco.fit(features, labels, labels, CLASSES).directions.shape == (CLASSES - 1, DIM)
    assert Neco.fit(features, labels, labels, DIM + 2).directions.shape == (DIM - 1, DIM)
    with pytest.raises(ValueError, match="more than 3 known"):
        Neco.fit(features[:3], labels[:3], labels[:3], CLASSES)


@pytest.mark.parametrize("name", FITTED_SCORES)
def test_negatives_do_not_enter_the_state(name: str) -> None:
    features, labels = features_of_classes()
    more = (
        torch.cat([features, features - 9]),
        torch.cat([labels, torch.full_like(labels, NEGATIVE)]),
    )
    expected = FITTED_SCORES[name].fit(features, labels, labels, CLASSES).state_dict()
    found = FITTED_SCORES[name].fit(more[0], more[1].clamp(min=0), more[1], CLASSES).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_neco_lowers_what_lies_outside_the_knowns_directions() -> None:
    features, labels = features_of_classes()
    score = Neco.fit(features, labels, labels, CLASSES)
    foreign = features[:5].clone()
    foreign[:, 5] += 8
    logits = output_of(features[:5]).logits
    inside, outside = (score(output_of(f)._replace(logits=logits)) for f in (features[:5], foreign))
    assert (outside < inside).all()


@pytest.mark.parametrize("name", FITTED_SCORES)
def test_zero_feature_has_a_finite_score(name: str) -> None:
    features, labels = features_of_classes()
    score = FITTED_SCORES[name].fit(features, labels, labels, CLASSES)
    assert torch.isfinite(score(output_of(torch.zeros(2, DIM)))).all()


def test_unknown_score_and_missing_state_are_named() -> None:
    with pytest.raises(ValueError, match="energie"):
        choose_scores(["softmax", "energie"], {})
    with pytest.raises(ValueError, match="ghost needs its state"):
        choose_scores(["softmax", "ghost"], {})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("all-scores"), scores=list(ALL_SCORES))


def test_artifact_gives_back_every_score_with_its_state(artifact: Path) -> None:
    classifier = load_artifact(artifact)
    assert list(classifier.scores) == list(ALL_SCORES)
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    prediction = classifier.predict(images)
    for name in FITTED_SCORES:
        again = classifier.fitted[name](prediction.output)
        torch.testing.assert_close(prediction.scores[name], again)
    stored = load_score_sets(artifact / "calibration.npz")[classifier.path.key]
    assert set(stored.scores) == set(ALL_SCORES)


def test_artifact_without_the_state_of_its_score_is_broken(tmp_path: Path) -> None:
    tiny_artifact(tmp_path)
    write_card(tmp_path, read_card(tmp_path).with_changes(scores=["softmax", "logit", "ghost"]))
    with pytest.raises(BrokenArtifact, match="Ghost"):
        load_artifact(tmp_path)


def test_state_is_part_of_the_paths_identity_and_the_names_are_not(tmp_path: Path) -> None:
    plain = load_artifact(tiny_artifact(tmp_path / "plain"))
    more = load_artifact(tiny_artifact(tmp_path / "more", scores=["softmax", "logit", "energy"]))
    fitted = load_artifact(tiny_artifact(tmp_path / "fitted", scores=["softmax", "neco"]))
    assert plain.path == more.path
    assert plain.path != fitted.path
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    expected = plain.predict(images).scores["softmax"]
    for other in (more, fitted):
        assert torch.equal(expected, other.predict(images).scores["softmax"])


def test_card_of_an_earlier_release_keeps_its_scores_and_its_digest() -> None:
    """Pinned: the digest that the release before background classes gave this card."""
    card = tiny_card(preprocessing={"mode": "L"})
    earlier = card.to_json()
    for line in ('  "background": false,\n', '  "scores": [\n    "softmax",\n    "logit"\n  ],\n'):
        assert line in earlier
        earlier = earlier.replace(line, "")
    read = ModelCard.from_json(earlier)
    assert read == card
    assert read.scores == ["softmax", "logit"]
    assert read.digest() == "799897ce2198c168979a49469148dbe016d864d760cd1638c67837d0c74bb1ed"
    assert tiny_card(background=True).digest() != tiny_card().digest()


def test_default_score_must_be_one_that_the_model_has() -> None:
    with pytest.raises(ValueError, match="default_score"):
        tiny_card(default_score="ghost")


def test_background_center_travels_in_the_artifact(tmp_path: Path) -> None:
    plain = load_artifact(tiny_artifact(tmp_path / "plain"))
    head = build_head("hard", num_classes=10, feature_dim=10, scale=13.0, background=True)
    card = tiny_card(background=True, loss="cos_bg")
    save_artifact(tmp_path / "background", network=plain.network, head=head, card=card)
    loaded = load_artifact(tmp_path / "background")
    assert torch.equal(loaded.head.background, head.background)
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    output = loaded.predict(images).output
    assert output.logits.shape == (8, 10)
    assert output.all_logits is not None
    assert output.all_logits.shape == (8, 11)
    assert set(loaded.scores) <= set(SCORES)
