"""JPEG decoders side by side: speed, and what another decoder would do to the scores.

    python benchmarks/decoders.py --images FOLDER [--artifact runs/<name>/artifact] [--json FILE]

Every decoder is followed by the very same transform. Pixels and scores are compared with Pillow's, which trains, evaluates,
calibrates and serves; a decoder that changes scores would need calibrations of its own (its name is part of the path).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.serving.models import PHOTOGRAPHS, photographs
from benchmarks.serving.report import machine
from openset.artifact import load_artifact
from openset.decision import accept
from openset.preprocessing import Preprocessing

Decoder = Callable[[bytes, Preprocessing], Image.Image]


def pillow(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """The product's own: libjpeg-turbo behind Pillow, with all its rules for hostile and odd files."""
    return preprocessing.decode(data)


def pillow_draft(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """Pillow, decoded at half, quarter or eighth size where that still covers the resize."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (preprocessing.resize, preprocessing.resize))
    return image.convert("RGB")


def torchvision(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """torchvision.io.decode_jpeg."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def simplejpeg_exact(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """Simplejpeg with the slow, exact transforms."""
    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False))


def simplejpeg_fast(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """Simplejpeg with fast transforms."""
    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True))


DECODERS: dict[str, Decoder] = {
    "Pillow": pillow,
    "Pillow, draft": pillow_draft,
    "torchvision decode_jpeg": torchvision,
    "simplejpeg": simplejpeg_exact,
    "simplejpeg, fast": simplejpeg_fast,
}


@dataclass(frozen=True)
class Result:
    """One decoder against Pillow.

    Attributes:
        decode_ms: median over the images of the fastest of several passes, decoding alone.
        whole_ms: the same with resize and crop.
        speed: of the whole, times Pillow's.
        pixel_mean: mean absolute difference of the model's input, 0 to 255.
        pixel_max: largest.
        score_median: median absolute difference of the default score, in its own unit.
        score_max: largest.
        decisions_changed: images whose answer at the factory threshold differs.
        images: compared.
    """

    decoder: str
    decode_ms: float
    whole_ms: float
    speed: float
    pixel_mean: float
    pixel_max: int
    score_median: float | None
    score_max: float | None
    decisions_changed: int | None
    images: int


def fastest_ms(work: Callable[[bytes], object], images: Sequence[bytes], passes: int) -> float:
    """Median over the images of each one's fastest pass."""
    best = [float("inf")] * len(images)
    for _ in range(passes):
        for number, image in enumerate(images):
            started = time.perf_counter()
            work(image)
            best[number] = min(best[number], time.perf_counter() - started)
    return statistics.median(best) * 1e3


def compare(images: Sequence[bytes], artifact: Path | None, passes: int) -> list[Result]:
    """Measure every decoder."""
    classifier = None if artifact is None else load_artifact(artifact)
    preprocessing = PHOTOGRAPHS if classifier is None else classifier.preprocessing
    inputs, whole_ms, decode_ms = {}, {}, {}
    for name, decoder in DECODERS.items():
        decode_ms[name] = fastest_ms(lambda data, d=decoder: d(data, preprocessing), images, passes)
        whole_ms[name] = fastest_ms(
            lambda data, d=decoder: preprocessing.transform(d(data, preprocessing)), images, passes
        )
        inputs[name] = torch.stack(
            [preprocessing.transform(decoder(data, preprocessing)) for data in images]
        )
    scores = {}
    if classifier is not None:
        kind = classifier.card.default_score
        scores = {
            name: np.concatenate(
                [classifier.predict(part).scores[kind].numpy() for part in batch.split(16)]
            )
            for name, batch in inputs.items()
        }
    results = []
    for name in DECODERS:
        pixels = (inputs[name].int() - inputs["Pillow"].int()).abs()
        median = largest = changed = None
        if classifier is not None and classifier.card.factory is not None:
            apart = np.abs(scores[name] - scores["Pillow"])
            median, largest = float(np.median(apart)), float(apart.max())
            tau = np.float32(classifier.card.factory["tau"])
            changed = int((accept(scores[name], tau) != accept(scores["Pillow"], tau)).sum())
        results.append(
            Result(
                name,
                round(decode_ms[name], 3),
                round(whole_ms[name], 3),
                round(whole_ms["Pillow"] / whole_ms[name], 3),
                round(float(pixels.float().mean()), 4),
                int(pixels.max()),
                median,
                largest,
                changed,
                len(images),
            )
        )
    return results


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs; default: rendered")
    parser.add_argument("--artifact", type=Path, help="of a trained model, for the scores")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        results = compare(photographs(arguments.images, 64), arguments.artifact, arguments.passes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for result in results:
        scores = "" if result.score_max is None else (
            f"  scores: median {result.score_median:.4f}, max {result.score_max:.4f}, "
            f"{result.decisions_changed} decisions changed"
        )  # fmt: skip
        print(
            f"{result.decoder:24} {result.decode_ms:7.2f} ms decode {result.whole_ms:7.2f} ms with resize"
            f" {result.speed:5.2f}x  pixels: mean {result.pixel_mean:.3f}, max {result.pixel_max:3d}{scores}"
        )
    if arguments.json:
        content = {"machine": machine(), "rows": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
