"""The bare model in one process, without a server: what serving is measured against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from openset.classifier import OpenSetClassifier
from openset.compilation import CALLS_UNTIL_RECORDED

# Batches that may be under way on a device before one is waited for.
_UNDER_WAY = 4


def warm_up(classifier: OpenSetClassifier, batch_size: int) -> None:
    """Call with a batch until nothing is compiled or recorded any more."""
    preprocessing = classifier.preprocessing
    side, channels = preprocessing.image_size, preprocessing.channels
    images = torch.zeros(batch_size, channels, side, side, dtype=torch.uint8)
    for _ in range(CALLS_UNTIL_RECORDED):
        classifier.predict(images).scores["softmax"].cpu()


def call(classifier: OpenSetClassifier, images: Sequence[bytes]) -> None:
    """Decode, compute, and bring the scores to the host."""
    preprocessing = classifier.preprocessing
    batch = torch.stack([preprocessing.transform(preprocessing.decode(image)) for image in images])
    classifier.predict(batch).scores["softmax"].cpu()


def call_seconds(
    classifier: OpenSetClassifier, images: Sequence[bytes], *, seconds: float
) -> list[float]:
    """Time of each call with one image, in turn over ``images``, for so long."""
    warm_up(classifier, 1)
    taken: list[float] = []
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        call(classifier, [images[len(taken) % len(images)]])
        taken.append(time.perf_counter() - now)
    return taken


def rate(
    classifier: OpenSetClassifier,
    images: Sequence[bytes],
    *,
    batch_size: int,
    threads: int,
    seconds: float,
) -> float:
    """Images a second of a loop that decodes a batch with a pool of threads, then computes it."""
    preprocessing = classifier.preprocessing
    warm_up(classifier, batch_size)
    done, first = 0, True
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        while first or time.perf_counter() - started < seconds:
            chosen = [images[(done + number) % len(images)] for number in range(batch_size)]
            decoded = pool.map(lambda image: preprocessing.transform(preprocessing.decode(image)), chosen)  # fmt: skip
            classifier.predict(torch.stack(list(decoded))).scores["softmax"].cpu()
            done += batch_size
            if first:  # the threads start and the files are read for the first time
                started, done, first = time.perf_counter(), 0, False
        return done / (time.perf_counter() - started)


def resident_rate(classifier: OpenSetClassifier, *, batch_size: int, seconds: float) -> float:
    """Images a second with the decoded images already on the device."""
    preprocessing = classifier.preprocessing
    side = preprocessing.image_size
    images = torch.randint(
        0,
        256,
        (batch_size, preprocessing.channels, side, side),
        dtype=torch.uint8,
        device=classifier.device,
    )
    warm_up(classifier, batch_size)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(_UNDER_WAY):
            scores = classifier.predict(images).scores["softmax"]
        scores.cpu()
        done += _UNDER_WAY * batch_size
    return done / (time.perf_counter() - started)


def decode_rate(
    classifier: OpenSetClassifier, images: Sequence[bytes], *, threads: int, seconds: float
) -> float:
    """Images a second decoded and transformed by a pool of threads, nothing computed."""
    preprocessing = classifier.preprocessing

    def decode(number: int) -> None:
        preprocessing.transform(preprocessing.decode(images[number % len(images)]))

    with ThreadPoolExecutor(threads) as pool:
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            list(pool.map(decode, range(done, done + 8 * threads)))
            done += 8 * threads
        return done / (time.perf_counter() - started)


def median_ms(seconds: Sequence[float]) -> float:
    """Median in milliseconds."""
    return statistics.median(seconds) * 1e3
