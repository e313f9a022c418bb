"""What a classifier does to its process, and how it shares a batch among cores."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openset.artifact import load_artifact
from openset.classifier import SCORE_TOLERANCE, OpenSetClassifier, exact_convolutions
from tests.factories import tiny_artifact


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.mark.usefixtures("rounding")
def test_rounding_of_convolutions_is_off_within_a_prediction_alone() -> None:
    with exact_convolutions(True):
        assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is True
    with pytest.raises(RuntimeError), exact_convolutions(True):
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32 is True
    with exact_convolutions(False):
        assert torch.backends.cudnn.allow_tf32 is True


class Watched(nn.Module):
    """Notes of each call: images, the thread and how many threads that computes with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[tuple[int, str, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((len(images), threading.current_thread().name, torch.get_num_threads()))
        features: Tensor = self.network(images)
        return features


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(params=["float32", "bfloat16"])
def classifier(request: pytest.FixtureRequest, artifact: Path) -> OpenSetClassifier:
    return load_artifact(artifact, precision=request.param)


def images(count: int) -> Tensor:
    """Noise in more and more rows: far apart for the network."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    rows = torch.arange(28)[:, None] * count < 28 * torch.arange(1, count + 1)[:, None, None, None]
    return noise * rows


@pytest.mark.parametrize("count", [4, 5, 7, 32])
def test_batch_computed_side_by_side_has_the_same_scores_in_the_same_order(
    classifier: OpenSetClassifier, count: int
) -> None:
    expected = classifier.predict(images(count))
    assert classifier.compute_side_by_side(2)
    found = classifier.predict(images(count))
    limit = SCORE_TOLERANCE[classifier.precision]
    cdist = torch.cdist(
        expected.output.logits, expected.output.logits, compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert (cdist + torch.eye(count) * 1e3).min() > 5 * limit  # so that a wrong order is seen
    for name, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=0, atol=limit)
    torch.testing.assert_close(found.output.logits, expected.output.logits, rtol=0, atol=limit)


def test_every_core_has_a_part_of_a_large_batch_and_a_share_of_a_small_one(
    classifier: OpenSetClassifier,
) -> None:
    watched = classifier._features = Watched(classifier.network)
    threads, prepared = torch.get_num_threads(), []
    classifier.compute_side_by_side(2, prepare=lambda: prepared.append(1))
    classifier.predict(images(3))
    assert watched.calls == [(3, threading.current_thread().name, threads)]
    watched.calls.clear()
    classifier.predict(images(5))
    assert sorted(count for count, _, _ in watched.calls) == [2, 3]
    assert all(name.startswith("compute") and alone == 1 for _, name, alone in watched.calls)
    assert prepared
    assert torch.get_num_threads() == threads


def test_part_that_fails_fails_the_batch(classifier: OpenSetClassifier) -> None:
    def fail(_: Tensor) -> Tensor:
        raise ValueError("no features")

    classifier.compute_side_by_side(2)
    classifier._features = fail
    with pytest.raises(ValueError, match="no features"):
        classifier.predict(images(4))


def test_one_core_has_nothing_to_share(classifier: OpenSetClassifier) -> None:
    watched = classifier._features = Watched(classifier.network)
    assert classifier.compute_side_by_side(2)
    assert not classifier.compute_side_by_side(1)
    classifier.predict(images(8))
    assert [count for count, _, _ in watched.calls] == [8]


def test_threads_that_cannot_be_prepared_leave_the_cores_sharing(
    classifier: OpenSetClassifier,
) -> None:
    def refuse() -> None:
        raise OSError("no such core")

    assert not classifier.compute_side_by_side(2, prepare=refuse)
    assert len(classifier.predict(images(8)).predictions) == 8


def test_threads_made_afterwards_compute_with_as_many_as_before(
    classifier: OpenSetClassifier,
) -> None:
    torch.set_num_threads(2)
    classifier.compute_side_by_side(2)
    with ThreadPoolExecutor(1) as later:
        product = later.submit(lambda: (torch.ones(300, 300).exp().sum(), torch.get_num_threads()))
        assert product.result()[1] == 2
