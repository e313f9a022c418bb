"""JPEG decoders side by side: speed, and by how much another decoder would move the scores.

    python benchmarks/decoders.py --images FOLDER [--artifact runs/<name>/artifact] [--json FILE]

Every decoder is followed by the very same transform. Pixels and scores are compared with Pillow's, which trains, evaluates,
calibrates and serves; a decoder that changes scores would need calibrations of its own (its name is part of the path).
Moved scores and changed decisions are no accuracy: most photographs need not be of the model's classes.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.serving.models import PHOTOGRAPHS, photographs
from benchmarks.serving.report import machine
from openset.artifact import load_artifact
from openset.classifier import OpenSetClassifier
from openset.decision import accept
from openset.preprocessing import Preprocessing


@dataclass(frozen=True)
class Decoder:
    """Decodes into whatever it makes; what turns that into the transform's input is not charged to decoding.

    Attributes:
        decode: from the file's bytes.
        image: for the transform, from what was decoded.
        missing: what this machine lacks for it; None if nothing.
    """

    decode: Callable[[bytes, Preprocessing], Any]
    image: Callable[[Any], Image.Image]
    missing: str | None = None


def pillow(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """The product's own: libjpeg-turbo behind Pillow, with all its rules for hostile and odd files."""
    return preprocessing.decode(data)


def pillow_draft(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """Pillow, decoded at half, quarter or eighth size where that still covers the resize."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (preprocessing.resize, preprocessing.resize))
    return image.convert("RGB")


def _torchvision(device: str) -> Callable[[bytes, Preprocessing], Tensor]:
    """torchvision.io.decode_jpeg; on a GPU nvJPEG, one file at a time, waited for."""

    def decode(data: bytes, preprocessing: Preprocessing) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        return pixels

    return decode


def torchcodec(data: bytes, preprocessing: Preprocessing) -> Tensor:
    """Torchcodec's own JPEG decoder, which 0.17 has."""
    from torchcodec.decoders import decode_jpeg as decode

    pixels: Tensor = decode(data, mode="RGB")
    return pixels


def simplejpeg_exact(data: bytes, preprocessing: Preprocessing) -> Any:
    """Simplejpeg with the slow, exact transforms."""
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)


def simplejpeg_fast(data: bytes, preprocessing: Preprocessing) -> Any:
    """Simplejpeg with fast transforms."""
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)


def _itself(image: Image.Image) -> Image.Image:
    return image


def _of_tensor(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


DECODERS: dict[str, Decoder] = {
    "Pillow": Decoder(pillow, _itself),
    "Pillow, draft": Decoder(pillow_draft, _itself),
    "torchvision decode_jpeg": Decoder(_torchvision("cpu"), _of_tensor),
    "simplejpeg": Decoder(simplejpeg_exact, Image.fromarray),
    "simplejpeg, fast": Decoder(simplejpeg_fast, Image.fromarray),
    "torchcodec": Decoder(
        torchcodec,
        _of_tensor,
        None if importlib.util.find_spec("torchcodec") else "torchcodec is not installed",
    ),
    "torchvision decode_jpeg, GPU": Decoder(
        _torchvision("cuda"), _of_tensor, None if torch.cuda.is_available() else "no CUDA device"
    ),
}


@dataclass(frozen=True)
class Result:
    """One decoder against Pillow; all but its name is None where it is missing.

    Attributes:
        decoder: its name.
        missing: why there is nothing else.
        images: compared.
        decode_ms: median over the images of the fastest of several passes, decoding alone.
        whole_ms: the same with resize and crop, and what brings the pixels there.
        speed: of decoding alone, times Pillow's.
        whole_speed: of the whole, times Pillow's.
        pixel_mean: mean absolute difference of the model's input, 0 to 255.
        pixel_max: largest.
        score_median: median absolute difference of the default score, in its own unit.
        score_max: largest.
        decisions_changed: images whose answer at the factory threshold differs.
    """

    decoder: str
    missing: str | None = None
    images: int | None = None
    decode_ms: float | None = None
    whole_ms: float | None = None
    speed: float | None = None
    whole_speed: float | None = None
    pixel_mean: float | None = None
    pixel_max: int | None = None
    score_median: float | None = None
    score_max: float | None = None
    decisions_changed: int | None = None


def fastest_ms(
    works: dict[str, Callable[[bytes], object]], images: Sequence[bytes], passes: int
) -> dict[str, float]:
    """Of each work, the median over the images of each one's fastest pass; all works take turns at every image."""
    best = {name: [float("inf")] * len(images) for name in works}
    for _ in range(passes):
        for number, image in enumerate(images):
            for name, work in works.items():
                started = time.perf_counter()
                work(image)
                best[name][number] = min(best[name][number], time.perf_counter() - started)
    return {name: statistics.median(seconds) * 1e3 for name, seconds in best.items()}


def compare(images: Sequence[bytes], artifact: Path | None, passes: int) -> list[Result]:
    """Measure every decoder; one that is missing, or fails, has a row that says so."""
    classifier = None if artifact is None else load_artifact(artifact)
    preprocessing = PHOTOGRAPHS if classifier is None else classifier.preprocessing

    def whole(decoder: Decoder) -> Callable[[bytes], Tensor]:
        return lambda data: preprocessing.transform(
            decoder.image(decoder.decode(data, preprocessing))
        )

    inputs: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for name, decoder in DECODERS.items():
        if decoder.missing:
            missing[name] = decoder.missing
            continue
        try:
            inputs[name] = torch.stack([whole(decoder)(data) for data in images])
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            if name == "Pillow":
                raise
            missing[name] = f"failed: {str(error).partition(chr(10))[0]}"
    decode_ms = fastest_ms(
        {name: lambda data, d=DECODERS[name]: d.decode(data, preprocessing) for name in inputs},
        images,
        passes,
    )
    whole_ms = fastest_ms({name: whole(DECODERS[name]) for name in inputs}, images, passes)
    scores = {} if classifier is None else {name: _scores(classifier, batch) for name, batch in inputs.items()}  # fmt: skip
    results = []
    for name in DECODERS:
        if name in missing:
            results.append(Result(name, missing[name]))
            continue
        pixels = (inputs[name].int() - inputs["Pillow"].int()).abs()
        median = largest = changed = None
        if classifier is not None:
            apart = np.abs(scores[name] - scores["Pillow"])
            median, largest = float(np.median(apart)), float(apart.max())
            if classifier.card.factory is not None:
                tau = np.float32(classifier.card.factory["tau"])
                changed = int((accept(scores[name], tau) != accept(scores["Pillow"], tau)).sum())
        results.append(
            Result(
                name,
                images=len(images),
                decode_ms=round(decode_ms[name], 3),
                whole_ms=round(whole_ms[name], 3),
                speed=round(decode_ms["Pillow"] / decode_ms[name], 3),
                whole_speed=round(whole_ms["Pillow"] / whole_ms[name], 3),
                pixel_mean=round(float(pixels.float().mean()), 4),
                pixel_max=int(pixels.max()),
                score_median=median,
                score_max=largest,
                decisions_changed=changed,
            )
        )
    return results


def _scores(classifier: OpenSetClassifier, images: Tensor) -> Any:
    kind = classifier.card.default_score
    if classifier.card.factory is not None:
        kind = classifier.card.factory["score_type"]
    return np.concatenate(
        [classifier.predict(part).scores[kind].numpy() for part in images.split(16)]
    )


def line_of(result: Result) -> str:
    """One row for people."""
    if result.missing:
        return f"{result.decoder:30} {result.missing}"
    scores = "" if result.score_max is None else (
        f"  scores moved: median {result.score_median:.4f}, max {result.score_max:.4f}"
    )  # fmt: skip
    if result.decisions_changed is not None:
        scores += f", {result.decisions_changed} of {result.images} decisions changed"
    return (
        f"{result.decoder:30} {result.decode_ms:7.2f} ms decode {result.speed:5.2f}x {result.whole_ms:7.2f} ms with resize"
        f" {result.whole_speed:5.2f}x  pixels: mean {result.pixel_mean:.3f}, max {result.pixel_max:3d}{scores}"
    )


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
        images = photographs(arguments.images, 64)
        print(f"{len(images)} images, {'rendered' if arguments.images is None else 'photographs'}")
        results = compare(images, arguments.artifact, arguments.passes)
        for result in results:
            print(line_of(result))
        if arguments.json:
            content = {"machine": machine(), "rows": [asdict(result) for result in results]}
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
