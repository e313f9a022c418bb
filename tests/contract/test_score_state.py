"""A score with a state from the archive to the answer: gateway's threshold, handler's comparison, offline value."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from api.archive import read_archive
from handlers.open_set_handler import OpenSetHandler
from openset.artifact import load_artifact
from openset.classifier import SCORE_TOLERANCE
from openset.fitted_scores import ALL_SCORES
from serving.archive import build_archive
from tests.factories import grey_image, image_bytes, tiny_artifact


class Context:
    """What the worker hands to a handler."""

    def __init__(self, folder: Path, headers: list[dict[str, str]]) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": 1}
        self.model_yaml_config: dict[str, Any] = {}
        self.headers = headers
        self.status: dict[int, int] = {}

    def get_request_header(self, index: int, name: str) -> str | None:
        return self.headers[index].get(name)

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.status[index] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        pass


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    artifact = tiny_artifact(folder, scores=list(ALL_SCORES), default_score="ghost")
    return build_archive(artifact, "tiny", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def handler(unpacked: Path) -> OpenSetHandler:
    made = OpenSetHandler()
    made.initialize(Context(unpacked, []))
    return made


def ask(
    handler: OpenSetHandler, folder: Path, headers: list[dict[str, str]]
) -> tuple[list[dict[str, Any]], Context]:
    context = Context(folder, headers)
    bodies = [{"body": bytearray(image_bytes(grey_image(seed)))} for seed in range(len(headers))]
    return [json.loads(answer) for answer in handler.handle(bodies, context)], context


def test_every_score_of_a_batch_is_compared_with_its_own_tau(
    handler: OpenSetHandler, unpacked: Path, archive: Path
) -> None:
    classifier = load_artifact(unpacked)
    arrays = [classifier.preprocessing.from_array(grey_image(s)) for s in range(len(ALL_SCORES))]
    offline = classifier.predict(torch.stack(arrays)).scores
    model = read_archive(archive)
    points = [model.operating_point(classifier.path.key, n, 0.2, 0.95) for n in ALL_SCORES]
    headers = [
        {
            "x-openset-tau": repr(float(np.float32(p.tau))),
            "x-openset-score": p.score_type,
            "x-openset-calibration": "7",
        }
        for p in points
    ]
    answers, _ = ask(handler, unpacked, headers)
    for row, (name, point, answer) in enumerate(zip(ALL_SCORES, points, answers, strict=True)):
        expected = offline[name][row].item()
        assert answer["score_type"] == name
        assert answer["score"] == pytest.approx(expected, abs=SCORE_TOLERANCE["float32"])
        assert answer["tau"] == float(np.float32(point.tau))
        assert answer["accepted"] == (answer["score"] >= answer["tau"])
        assert (answer["score_probability"] is None) == (name != "softmax")


def test_factory_point_of_a_fitted_score_serves_without_headers(
    handler: OpenSetHandler, unpacked: Path
) -> None:
    (answer,), _ = ask(handler, unpacked, [{}])
    assert answer["score_type"] == "ghost"
    assert answer["calibration"] == "factory"


def test_score_that_the_model_lacks_is_a_bad_operating_point(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path)
    handler = OpenSetHandler()
    handler.initialize(Context(folder, []))
    headers = [{"x-openset-tau": "1", "x-openset-score": "ghost"}]
    (answer,), context = ask(handler, folder, headers)
    assert context.status == {0: 400}
    assert "['logit', 'softmax']" in answer["detail"]


def test_probabilities_of_a_model_with_a_background_leave_room_for_it(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path, background=True, loss="cos_bg")
    handler = OpenSetHandler()
    handler.initialize(Context(folder, []))
    (answer,), _ = ask(handler, folder, [{"x-openset-top-k": "10"}])
    total = sum(entry["probability"] for entry in answer["top_k"])
    assert 0 < total < 1 - 1e-4
    assert answer["nearest"]["probability"] == pytest.approx(answer["score_probability"], abs=1e-5)
