"""The handler in this process: batches, bad images, operating points, and equality with the offline classifier."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFile

from handlers.open_set_handler import OpenSetHandler
from openset.artifact import load_artifact
from openset.classifier import SCORE_TOLERANCE
from openset.compilation import CALLS_UNTIL_RECORDED
from openset.packing import PackedConv2d, can_pack
from openset.pixel_budget import PixelBudget
from openset.preprocessing import Preprocessing
from tests.factories import grey_image, image_bytes, tiny_artifact


class FakeContext:
    """What the worker hands to a handler."""

    def __init__(
        self, folder: Path, headers: list[dict[str, str]] | None = None, **settings: Any
    ) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": 4}
        self.model_yaml_config = {"handler": settings}
        self.headers = headers or []
        self.status: dict[int, int] = {}
        self.content_type: dict[int, str] = {}

    def get_request_header(self, index: int, name: str) -> str | None:
        return self.headers[index].get(name) if index < len(self.headers) else None

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        assert phrase.isascii()
        self.status[index] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        self.content_type[index] = value


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def handler(artifact: Path) -> OpenSetHandler:
    made = OpenSetHandler()
    made.initialize(FakeContext(artifact))
    return made


def ask(
    handler: OpenSetHandler,
    artifact: Path,
    bodies: list[Any],
    headers: list[dict[str, str]] | None = None,
) -> tuple[list[dict[str, Any]], FakeContext]:
    context = FakeContext(artifact, headers)
    answers = handler.handle([{"body": body} for body in bodies], context)
    assert all(isinstance(answer, bytes) for answer in answers)
    assert len(answers) == len(bodies)
    return [json.loads(answer) for answer in answers], context


def test_workers_share_the_cores_while_both_answer_a_batch(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    threads = torch.get_num_threads()
    shared = {"folder": str(tmp_path), "workers": 2}
    workers = [OpenSetHandler(), OpenSetHandler()]
    used: list[int] = []
    try:
        for worker in workers:
            worker.initialize(FakeContext(artifact, shared_cores=shared))
            decide = worker.classifier.decide

            def noted(*arguments: Any, decide: Any = decide) -> Any:
                used.append(torch.get_num_threads())
                return decide(*arguments)

            monkeypatch.setattr(worker.classifier, "decide", noted)
        first, second = workers
        body = image_bytes(grey_image())
        alone, _ = ask(first, artifact, [body])
        assert second.cores is not None
        with second.cores:
            beside, _ = ask(first, artifact, [body])
        ask(first, artifact, [body])
    finally:
        torch.set_num_threads(threads)
    assert used == [4, 2, 4]
    assert alone[0]["score"] == pytest.approx(beside[0]["score"], abs=1e-4)
    packed = [m for m in first.classifier.backbone.modules() if isinstance(m, PackedConv2d)]
    assert {module.threads for module in packed} <= {4}  # those of a worker that is alone


@pytest.mark.skipif(not can_pack("float32"), reason="this torch has no oneDNN")
def test_weights_that_were_packed_are_not_kept_beside(artifact: Path) -> None:
    handler = OpenSetHandler()
    handler.initialize(FakeContext(artifact))
    assert all(parameter.is_meta for parameter in handler.classifier.network.parameters())
    answers, _ = ask(handler, artifact, [image_bytes(grey_image())])
    assert answers[0]["path"].startswith("cpu-float32-packed-")


@pytest.mark.skipif(len(os.sched_getaffinity(os.getppid())) < 2, reason="needs two cores")
def test_decoding_is_not_confined_to_the_core_of_the_main_thread(artifact: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # as OpenMP binds it
    try:
        made = OpenSetHandler()
        made.initialize(FakeContext(artifact))
        cores = made.decoders.submit(os.sched_getaffinity, 0).result()
    finally:
        os.sched_setaffinity(0, before)
    assert cores == os.sched_getaffinity(os.getppid())


@pytest.mark.parametrize(("images", "alone"), [(1, True), (2, False)], ids=["one fits", "both fit"])
def test_images_are_decoded_side_by_side_as_far_as_the_pixel_budget_goes(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, images: int, alone: bool
) -> None:
    made = OpenSetHandler()
    made.initialize(FakeContext(artifact, decode_threads=2))
    made.budget = PixelBudget(images * 28 * 28)
    transform = Preprocessing.transform
    both = threading.Barrier(2)
    alones = []

    def noted(self: Preprocessing, image: Any) -> torch.Tensor:
        try:
            both.wait(0.2 if alone else 30)
        except threading.BrokenBarrierError:
            alones.append(image)
        return transform(self, image)  # still holds the image at its full size

    monkeypatch.setattr(Preprocessing, "transform", noted)
    answers, context = ask(made, artifact, [image_bytes(grey_image(seed)) for seed in (1, 2)])
    assert bool(alones) is alone
    assert not context.status
    assert all("label" in answer for answer in answers)


def test_scores_equal_the_offline_classifier(handler: OpenSetHandler, artifact: Path) -> None:
    arrays = [grey_image(seed) for seed in range(6)]
    answers, _ = ask(handler, artifact, [bytearray(image_bytes(array)) for array in arrays])
    classifier = load_artifact(artifact)
    offline = classifier.predict(
        torch.stack([classifier.preprocessing.from_array(array) for array in arrays])
    )
    name = answers[0]["score_type"]
    np.testing.assert_allclose(
        [answer["score"] for answer in answers],
        offline.scores[name].numpy(),
        atol=SCORE_TOLERANCE["float32"],
        rtol=0,
    )
    assert [answer["nearest"]["index"] for answer in answers] == offline.predictions.tolist()
    cosine = math.cos(math.radians(answers[0]["nearest"]["angle_deg"]))
    assert cosine == pytest.approx(answers[0]["nearest"]["cosine"], abs=1e-5)


def test_damaged_tags_of_an_upload_write_no_line_each(artifact: Path) -> None:
    beyond_the_end = b"".join(struct.pack("<HHLL", tag, 4, 100, 8) for tag in range(1_000, 5_000))
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 4_000) + beyond_the_end
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        handler = OpenSetHandler()
        handler.initialize(FakeContext(artifact))
        ask(handler, artifact, [image_bytes(format="JPEG", exif=exif)])
    assert not [warning.message for warning in heard if "PIL" in warning.filename]


def test_each_request_is_judged_by_its_own_tau_and_gets_its_echo(
    handler: OpenSetHandler, artifact: Path
) -> None:
    score = ask(handler, artifact, [image_bytes()])[0][0]["score"]
    above = float(np.nextafter(np.float32(score), np.float32(np.inf)))
    headers = [
        {
            "x-openset-tau": str(np.float32(score)),
            "x-openset-score": "softmax",
            "x-openset-calibration": "12",
        },
        {
            "x-openset-tau": str(np.float32(above)),
            "x-openset-score": "softmax",
            "x-openset-calibration": "13",
        },
        {"x-openset-tau": "-1000", "x-openset-score": "logit", "x-openset-calibration": "request"},
    ]
    answers, _ = ask(handler, artifact, [image_bytes()] * 3, headers)
    # Within a path, scores agree up to batching: the equality case must be asked alone.
    alone, _ = ask(handler, artifact, [image_bytes()], headers[:1])
    assert alone[0]["accepted"] is True
    alone, _ = ask(handler, artifact, [image_bytes()], headers[1:2])
    assert alone[0]["accepted"] is False
    assert alone[0]["label"] == "unknown"
    assert [answer["calibration"] for answer in answers] == ["12", "13", "request"]
    assert [np.float32(answer["tau"]) for answer in answers] == [
        np.float32(score),
        np.float32(above),
        -1000,
    ]
    assert answers[2]["score_probability"] is None


def test_without_headers_the_factory_point_applies(handler: OpenSetHandler, artifact: Path) -> None:
    answer = ask(handler, artifact, [image_bytes()])[0][0]
    factory = load_artifact(artifact).card.factory
    assert factory is not None
    assert (answer["tau"], answer["score_type"], answer["calibration"]) == (
        factory["tau"], factory["score_type"], "factory",
    )  # fmt: skip


def test_factory_point_of_another_path_is_never_applied(
    handler: OpenSetHandler, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "path", "cuda-float32-eager-0")
    own = {"x-openset-tau": "0", "x-openset-score": "softmax"}
    answers, context = ask(handler, artifact, [image_bytes()] * 2, [{}, own])
    assert context.status == {0: 400}
    assert answers[0]["type"] == "/problems/bad-operating-point"
    assert "send x-openset-tau" in answers[0]["detail"]
    assert answers[1]["path"] == "cuda-float32-eager-0"


def test_memory_that_runs_out_is_not_the_images_fault(
    handler: OpenSetHandler, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = ImageFile.ImageFile.load

    def load(image: ImageFile.ImageFile) -> Any:
        if image.width == 99:
            raise MemoryError
        return working(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    bodies = [image_bytes(), image_bytes(grey_image(0, (30, 99)))]
    answers, context = ask(handler, artifact, bodies)
    assert context.status == {1: 507}
    assert answers[1]["type"] == "/problems/out-of-memory"
    assert "score" in answers[0]


BAD = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"hello",
    "html": b"<html></html>",
    "pdf": b"%PDF-1.7" + b"0" * 100,
    "cut jpeg": image_bytes(format="JPEG")[:300],
    "gif": b"GIF89a" + b"\0" * 60,
    "none": None,
    "decoded json": {"a": 1},
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_image_leaves_its_neighbours_unharmed(
    handler: OpenSetHandler, artifact: Path, name: str
) -> None:
    good = ask(handler, artifact, [image_bytes()])[0][0]
    answers, context = ask(handler, artifact, [image_bytes(), BAD[name], image_bytes()])
    assert context.status == {1: 422}
    assert context.content_type[1] == "application/problem+json"
    assert answers[1]["type"] == "/problems/unreadable-image"
    for neighbour in (answers[0], answers[2]):
        assert neighbour["score"] == pytest.approx(good["score"], abs=SCORE_TOLERANCE["float32"])


@pytest.mark.parametrize(
    "headers",
    [
        {"x-openset-tau": "nan", "x-openset-score": "softmax"},
        {"x-openset-tau": "inf", "x-openset-score": "softmax"},
        {"x-openset-tau": "1e39", "x-openset-score": "softmax"},
        {"x-openset-tau": "-3.5e38", "x-openset-score": "softmax"},
        {"x-openset-tau": "abc", "x-openset-score": "softmax"},
        {"x-openset-score": "softmax"},
        {"x-openset-tau": "1"},
        {"x-openset-tau": "1", "x-openset-score": "energy"},
        {"x-openset-tau": "1", "x-openset-score": "softmax", "x-openset-top-k": "-1"},
        {"x-openset-tau": "1", "x-openset-score": "softmax", "x-openset-top-k": "²"},
    ],
)
def test_bad_operating_points_are_refused_in_their_slot(
    handler: OpenSetHandler, artifact: Path, headers: dict[str, str]
) -> None:
    answers, context = ask(handler, artifact, [image_bytes(), image_bytes()], [headers, {}])
    assert context.status == {0: 400}
    assert answers[0]["type"] == "/problems/bad-operating-point"
    assert "score" in answers[1]


def test_top_k_is_ordered_and_bounded_and_angles_cover_all_classes(
    handler: OpenSetHandler, artifact: Path
) -> None:
    headers = {
        "x-openset-tau": "0",
        "x-openset-score": "softmax",
        "x-openset-top-k": "99",
        "x-openset-angles": "all",
    }
    answer = ask(handler, artifact, [image_bytes()], [headers])[0][0]
    probabilities = [entry["probability"] for entry in answer["top_k"]]
    assert len(probabilities) == len(answer["angles"]) == 10
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert answer["nearest"] == answer["top_k"][0]


def test_non_finite_score_is_unknown_and_json_stays_valid(
    handler: OpenSetHandler, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = handler.classifier.predict

    def broken(images: torch.Tensor) -> Any:
        prediction = working(images)
        prediction.scores["softmax"] = torch.full((len(images),), math.nan)
        return prediction

    monkeypatch.setattr(handler.classifier, "predict", broken)
    headers = {"x-openset-tau": "-1000", "x-openset-score": "softmax"}
    answer = ask(handler, artifact, [image_bytes()], [headers])[0][0]
    assert (answer["label"], answer["accepted"], answer["score"], answer["non_finite"]) == (
        "unknown",
        False,
        None,
        True,
    )


def test_failing_model_answers_every_slot_and_never_raises(
    handler: OpenSetHandler, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(images: torch.Tensor) -> Any:
        raise ValueError("secret path /x/y")

    monkeypatch.setattr(handler.classifier, "predict", fail)
    answers, context = ask(handler, artifact, [image_bytes()] * 2)
    assert context.status == {0: 500, 1: 500}
    assert "secret" not in json.dumps(answers)


def test_out_of_memory_is_retried_in_halves(
    handler: OpenSetHandler, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working, sizes = handler.classifier.predict, []

    def small_device(images: torch.Tensor) -> Any:
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return working(images)

    monkeypatch.setattr(handler.classifier, "predict", small_device)
    answers, context = ask(handler, artifact, [image_bytes(grey_image(seed)) for seed in range(4)])
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert context.status == {}
    assert len({answer["score"] for answer in answers}) == 4


def test_batch_that_did_not_fit_holds_no_memory_while_its_halves_are_tried(
    handler: OpenSetHandler, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working, held, alive = handler.classifier.predict, [], []

    def small_device(images: torch.Tensor) -> Any:
        alive.append(sum(reference() is not None for reference in held))
        if len(images) > 1:
            features = images.float()  # what lies on the device when it is full
            held.append(weakref.ref(features))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return working(images)

    monkeypatch.setattr(handler.classifier, "predict", small_device)
    ask(handler, artifact, [image_bytes(grey_image(seed)) for seed in range(4)])
    assert alive == [0] * 7


@pytest.mark.parametrize("broken", [False, True])
def test_worker_ends_where_the_device_is_lost_and_only_there(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    handler = OpenSetHandler()
    handler.initialize(FakeContext(artifact))
    handler.classifier.device = torch.device("cuda")
    ended: list[int] = []
    monkeypatch.setattr(handler.classifier, "predict", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail if broken else lambda: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    _, context = ask(handler, artifact, [image_bytes()])
    assert ended == ([70] if broken else [])
    assert context.status == {0: 500}


def test_demanded_gpu_that_is_not_there_refuses_to_start(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSET_REQUIRE_DEVICE", "cuda")
    with pytest.raises(RuntimeError, match="CUDA device was demanded"):
        OpenSetHandler().initialize(FakeContext(artifact))


def test_every_batch_size_is_warmed_up(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    from openset.classifier import OpenSetClassifier

    working = OpenSetClassifier.predict

    def counted(self: OpenSetClassifier, images: torch.Tensor) -> Any:
        sizes.append(len(images))
        return working(self, images)

    monkeypatch.setattr(OpenSetClassifier, "predict", counted)
    OpenSetHandler().initialize(FakeContext(artifact))
    assert sizes == [1, 2, 3, 4]


def test_compiled_worker_warms_up_every_bucket_and_fills_batches_up_to_them(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def recorded(network: torch.nn.Module, device: torch.device) -> Any:
        def run(images: torch.Tensor) -> Any:
            sizes.append(len(images))
            return network(images)

        return run

    monkeypatch.setattr("openset.classifier.compile_backbone", recorded)
    handler, context = OpenSetHandler(), FakeContext(artifact, compiled=True)
    context.system_properties["batch_size"] = 6
    handler.initialize(context)
    assert sizes == [size for size in (1, 2, 4, 8) for _ in range(CALLS_UNTIL_RECORDED)]
    sizes.clear()
    bodies = [image_bytes(grey_image(seed)) for seed in range(5)]
    own = [{"x-openset-tau": "0", "x-openset-score": "softmax"}] * len(bodies)
    answers, _ = ask(handler, artifact, bodies, own)
    assert sizes == [8]
    alone = [ask(handler, artifact, [body], own)[0][0]["score"] for body in bodies]
    np.testing.assert_allclose(
        [answer["score"] for answer in answers], alone, atol=SCORE_TOLERANCE["float32"], rtol=0
    )
    assert answers[0]["path"].startswith("cpu-float32-compiled-")
