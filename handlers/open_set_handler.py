"""TorchServe handler: images in, a label or "unknown" out, each judged by its own threshold, on the device.

It never raises: in TorchServe an exception costs the whole batch. An image that fails is answered in its own slot, its
neighbours are untouched. The gateway sends the operating point with every request; without it the factory operating
point of the model card applies, on the path it was made for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import torch

from openset import geometry
from openset.answers import BadOperatingPoint, Refusal, document, read_question
from openset.artifact import load_artifact, weights_digest
from openset.buckets import buckets_up_to
from openset.classifier import OpenSetClassifier
from openset.compilation import CALLS_UNTIL_RECORDED
from openset.cores import SharedCores
from openset.image_headers import MAX_PIXELS, ImageFacts, UnreadableImage, read_header
from openset.pixel_budget import PixelBudget
from openset.scores import class_probabilities

logger = logging.getLogger(__name__)

_JSON = "application/json"
_PROBLEM = "application/problem+json"

# Largest images that a worker decodes side by side, of 640 MB each; smaller ones count by their pixels. On a GPU's host all
# cores decode, and several photographs must be under way at once.
_LARGEST_IMAGES = {"cpu": 1, "cuda": 4}


class OpenSetHandler:
    """Life cycle of the worker: ``initialize`` once, ``handle`` per batch."""

    classifier: OpenSetClassifier
    cores: SharedCores | None

    def initialize(self, context: Any) -> None:
        """Load the artifact and warm up every batch size that can occur; the worker is ready when this returns.

        Raises:
            RuntimeError: another device was demanded (``OPENSET_REQUIRE_DEVICE``) than there is.
        """
        # The worker logs several lines per batch at INFO; the frontend must stay at INFO to show tracebacks.
        logging.getLogger().setLevel(logging.WARNING)
        # Pillow warns of each damaged tag in an upload's EXIF data, which may have thousands. Once and for all, since filters
        # belong to the process: one set around a call is taken away by the calls of other threads.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        properties = context.system_properties
        settings = (getattr(context, "model_yaml_config", None) or {}).get("handler") or {}
        device = self._choose_device(settings.get("device", "auto"), properties.get("gpu_id"))
        folder = Path(properties["model_dir"])
        self.cores = self._shared_cores(settings.get("shared_cores"), device)
        self.classifier = load_artifact(
            folder,
            device=device,
            precision=settings.get("precision", "float32"),
            compiled=bool(settings.get("compiled", False)),
        )
        self.weights_sha256 = weights_digest(folder)
        self.path = self.classifier.path.key
        threads = int(settings.get("decode_threads") or len(os.sched_getaffinity(0)))
        self.decoders = ThreadPoolExecutor(
            threads, thread_name_prefix="decode", initializer=_use_all_cores
        )
        self.budget = PixelBudget(MAX_PIXELS * _LARGEST_IMAGES[self.classifier.device.type])
        if self.cores:
            self.cores.follow(self.classifier.backbone)
        if self.classifier.path.mode == "packed":
            self.classifier.network.to("meta")  # the packed copy answers, nothing else needs them
        # Once for every number of threads that can occur.
        for _ in self.cores.every_part() if self.cores else [None]:
            self._warm_up(int(properties.get("batch_size") or 1))

    @staticmethod
    def _shared_cores(shared: dict[str, Any] | None, device: str) -> SharedCores | None:
        if shared is None or device != "cpu":
            return None
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cores)  # those of a worker that is alone: weights are packed for them
        return SharedCores(Path(shared["folder"]), workers=int(shared["workers"]), cores=cores)

    @staticmethod
    def _choose_device(wish: str, gpu_id: int | None) -> str:
        usable = gpu_id is not None and torch.cuda.is_available()
        demanded = os.environ.get("OPENSET_REQUIRE_DEVICE") or (wish if wish != "auto" else None)
        if demanded == "cuda" and not usable:
            raise RuntimeError(
                f"a CUDA device was demanded, but TorchServe assigned gpu_id={gpu_id} and torch reports "
                f"cuda available={torch.cuda.is_available()}; check the driver, CUDA_VISIBLE_DEVICES and "
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            )
        if demanded == "cpu" or not usable:
            return "cpu"
        torch.cuda.set_device(gpu_id)
        return f"cuda:{gpu_id}"

    def _warm_up(self, batch_size: int) -> None:
        preprocessing = self.classifier.preprocessing
        side, channels = preprocessing.image_size, preprocessing.channels
        compiled = self.classifier.path.mode == "compiled"
        calls = CALLS_UNTIL_RECORDED if compiled else 1
        for count in buckets_up_to(batch_size) if compiled else range(1, batch_size + 1):
            images = torch.zeros(count, channels, side, side, dtype=torch.uint8)
            for _ in range(calls):
                self.classifier.predict(images)
        if self.classifier.device.type == "cuda":
            torch.cuda.synchronize()  # ready means done, not queued

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one JSON document per request, in order."""
        with self.cores or contextlib.nullcontext():
            return self._answers(data, context)

    def _answers(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        requests = list(
            self.decoders.map(lambda i: self._read(data[i], context, i), range(len(data)))
        )
        sound = [request for request in requests if not isinstance(request, Refusal)]
        answers = iter(self._answer(sound))
        results = []
        for index, request in enumerate(requests):
            answer = request if isinstance(request, Refusal) else next(answers)
            if isinstance(answer, Refusal):
                context.set_response_status(answer.status, answer.title, index)
                context.set_response_content_type(index, _PROBLEM)
                results.append(orjson.dumps(answer))
            else:
                context.set_response_content_type(index, _JSON)
                results.append(orjson.dumps(answer))
        return results

    def _read(self, row: dict[str, Any], context: Any, index: int) -> tuple[Any, ...] | Refusal:
        """Question, uint8 image, facts about the image; or why there is none."""
        started = time.perf_counter()
        try:
            question = read_question(
                lambda name: context.get_request_header(index, name),
                self.classifier.card,
                self.path,
            )
            body = row.get("body", row.get("data"))
            if not isinstance(body, bytes | bytearray):
                raise UnreadableImage(f"expected image bytes, got {type(body).__name__}")
            image, facts = self._decode(body)
            decode_ms = (time.perf_counter() - started) * 1e3
            return question, image, facts._asdict(), decode_ms
        except BadOperatingPoint as error:
            return Refusal(400, "/problems/bad-operating-point", "Bad operating point", str(error))
        except UnreadableImage as error:
            return Refusal(422, "/problems/unreadable-image", "Unreadable image", str(error))
        except MemoryError:
            logger.exception("no memory to decode request %d of the batch", index)
            return _out_of_memory("the model server ran out of memory")
        except Exception:
            logger.exception("request %d of the batch failed", index)
            return _failure("the image could not be processed")

    def _decode(self, body: bytes | bytearray) -> tuple[torch.Tensor, ImageFacts]:
        header, preprocessing = read_header(body), self.classifier.preprocessing
        with self.budget.of(header.width * header.height):  # until the full-size image is gone
            decoded, facts = preprocessing.decode_with_facts(body)
            return preprocessing.transform(decoded), facts

    def _answer(self, requests: list[tuple[Any, ...]]) -> list[dict[str, Any] | Refusal]:
        if not requests:
            return []
        try:
            return self._predict(requests)
        except torch.cuda.OutOfMemoryError:
            pass  # gone on with below: here the error would still hold the tensors that did not fit
        except Exception:  # raised, it would cost TorchServe the whole batch without an answer
            logger.exception("a batch of %d failed", len(requests))
            if self._lost_device():
                sys.stderr.flush()
                os._exit(70)  # the frontend starts a clean worker
            return [_failure("the batch could not be processed")] * len(requests)
        torch.cuda.empty_cache()
        if len(requests) == 1:
            return [_out_of_memory("the device ran out of memory")]
        half = len(requests) // 2
        return self._answer(requests[:half]) + self._answer(requests[half:])

    def _lost_device(self) -> bool:
        """Whether the CUDA context is broken for good: after a fault in a kernel every further call fails."""
        if self.classifier.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except Exception:  # whatever the driver says of it
            logger.exception("the CUDA context is broken, this worker ends")
            return True
        return False

    def _predict(self, requests: list[tuple[Any, ...]]) -> list[dict[str, Any] | Refusal]:
        started = time.perf_counter()
        classifier, card = self.classifier, self.classifier.card
        questions, images, facts, decode_ms = zip(*requests, strict=True)
        prediction = classifier.predict(torch.stack(images))
        taus = torch.tensor([question.tau for question in questions], dtype=torch.float32)
        scores, accepted = classifier.decide(
            prediction, taus, [question.score_type for question in questions]
        )
        logits, cosines = prediction.output.logits, prediction.output.cosines
        degrees = geometry.angles(cosines).rad2deg()
        # One copy from the device to the host for everything that is answered.
        columns = [
            scores[:, None],
            accepted[:, None].float(),
            logits,
            class_probabilities(prediction.output),
            cosines,
            degrees,
        ]
        packed = torch.cat(columns, dim=1).cpu().numpy()
        per_class = packed[:, 2:].reshape(len(requests), 4, card.num_classes)
        compute_ms = (time.perf_counter() - started) * 1e3
        return [
            {
                **document(
                    questions[i],
                    card,
                    score=float(packed[i, 0]),
                    accepted=bool(packed[i, 1]),
                    logits=per_class[i, 0],
                    probabilities=per_class[i, 1],
                    cosines=per_class[i, 2],
                    angles_deg=per_class[i, 3],
                ),
                "image": facts[i],
                "model": {
                    "name": card.name,
                    "version": card.version,
                    "sha256": self.weights_sha256,
                },
                "path": self.path,
                "batch_size": len(requests),
                "timing_ms": {"decode": round(decode_ms[i], 3), "compute": round(compute_ms, 3)},
            }
            for i in range(len(requests))
        ]


def _use_all_cores() -> None:
    """Give the calling thread the frontend's cores: the main thread, whose core it took over, may be bound to a single one."""
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


def _out_of_memory(detail: str) -> Refusal:
    return Refusal(507, "/problems/out-of-memory", "Out of memory", detail)


def _failure(detail: str) -> Refusal:
    return Refusal(500, "/problems/handler-error", "Handler error", detail)
