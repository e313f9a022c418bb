"""What the serving benchmark serves: random weights (speed does not depend on them) and photographs, real or rendered."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.serving.report import say
from openset.artifact import load_artifact, save_artifact
from openset.calibration import ScoreSet, operating_point
from openset.classifier import OpenSetClassifier, path_mode
from openset.heads import Head, build_head
from openset.labels import NEGATIVE
from openset.model_card import ModelCard
from openset.networks import build_network
from openset.preprocessing import Preprocessing

# The transform that the stock handler hard-codes.
PHOTOGRAPHS = Preprocessing(
    mode="RGB",
    image_size=224,
    resize=256,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
CHARACTERS = Preprocessing(mode="L", image_size=28, resize=28, polarity="light_on_dark")


def random_artifact(
    folder: Path, network_name: str, *, classes: int, scores: int, device: str, precision: str, compiled: bool
) -> Path:  # fmt: skip
    """An artifact of random weights with random calibration scores for the path that will serve.

    Args:
        folder: made.
        network_name: "resnet50" (photographs) or "lenet_plus_plus" (characters).
        classes: C; the deep feature has as many dimensions.
        scores: calibration scores, half of them of negatives.
        device: of the path.
        precision: of the path.
        compiled: of the path.
    """
    torch.manual_seed(0)
    names = [f"class {number}" for number in range(classes)]
    card = ModelCard(
        name=folder.name, version="1.0", loss="cos_os", options={}, protocol="none", normalization="soft", scale=13.0,
        num_classes=classes, feature_dim=classes, network=network_name, network_options={}, class_ids=names,
        class_names=names, default_score="softmax", training={"note": "random weights, for benchmarks"},
        preprocessing=(PHOTOGRAPHS if network_name == "resnet50" else CHARACTERS).to_dict(),
    )  # fmt: skip
    network = build_network(network_name, feature_dim=classes)
    head = build_head("soft", num_classes=classes, feature_dim=classes, scale=13.0)
    save_artifact(folder, network=network, head=head, card=card)
    mode = path_mode(device, precision, compiled=compiled)
    path = replace(load_artifact(folder).path, device=device, precision=precision, mode=mode)
    generator = np.random.default_rng(0)
    labels = np.where(np.arange(scores) % 2, NEGATIVE, generator.integers(0, classes, scores))
    values = generator.normal(np.where(labels == NEGATIVE, -1.0, 2.0)).astype(np.float32)
    score_set = ScoreSet(
        path=path.key,
        scores={"softmax": values, "logit": values},
        predictions=labels.clip(0),
        labels=labels,
        groups=labels.astype(str),
        sample_ids=np.arange(scores).astype(str),
    )
    factory = operating_point(score_set, score_type="softmax", fpr=1e-2)
    save_artifact(
        folder,
        network=network,
        head=head,
        card=card.with_changes(factory=factory.to_dict()),
        score_sets=[score_set],
    )
    return folder


class _Logits(nn.Module):
    def __init__(self, network: nn.Module, head: Head, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self.head, self.side = network, head, preprocessing.image_size
        self.grey = preprocessing.mode == "L"

    def forward(self, images: Tensor) -> Tensor:
        if self.grey:  # the stock handler makes colour images of 224 px alone
            grey = images.mean(dim=1, keepdim=True)
            images = nn.functional.adaptive_avg_pool2d(grey, self.side)
        logits: Tensor = self.head(self.network(images)).logits
        return logits


def stock_archive(artifact: Path, store: Path) -> Path:
    """The same weights as TorchScript with TorchServe's own ``image_classifier``, packed as its users pack it."""
    classifier = load_artifact(artifact)
    module = _Logits(classifier.network, classifier.head, classifier.preprocessing)
    module.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer deprecates itself
        traced = torch.jit.trace(module.eval(), torch.zeros(1, 3, 224, 224))
        model = store / "model.pt"
        torch.jit.save(traced, model)
    names = store / "index_to_name.json"
    names.write_text(json.dumps(dict(enumerate(classifier.card.class_names))))
    command = [
        sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "stock", "--version", "1.0", "--handler",
        "image_classifier", "--serialized-file", str(model), "--extra-files", str(names), "--export-path", str(store),
        "--archive-format", "zip-store", "--force",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    model.unlink()
    return store / "stock.mar"


def photographs(folder: Path | None, count: int) -> list[bytes]:
    """JPEG files of a folder (colour only: a grey one fails a whole batch of the stock handler), or rendered ones.

    Raises:
        ValueError: the folder holds no colour JPEG.
    """
    if folder is not None:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))  # fmt: skip
        found: list[bytes] = []
        grey = 0
        for file in files:
            if len(found) == count:
                break
            if _is_colour(file):
                found.append(file.read_bytes())
            else:
                grey += 1
        if not found:
            raise ValueError(f"{folder} holds no colour JPEG; name another folder with --images")
        if grey:
            say(
                f"{len(found)} of the first {len(found) + grey} photographs are used, {grey} are not in colour and left out"
            )
        return found
    return [_rendered(seed) for seed in range(count)]


def _is_colour(file: Path) -> bool:
    with Image.open(file) as image:
        return image.mode == "RGB"


def _rendered(seed: int) -> bytes:
    """Coloured noise of all scales, 500 x 375, about as large a JPEG as a photograph of that size."""
    generator = np.random.default_rng(seed)
    total = np.zeros((375, 500, 3))
    for scale in (1, 4, 16, 64):
        noise = generator.integers(0, 256, (375 // scale + 1, 500 // scale + 1, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
        total += np.asarray(image, float) * scale / 85
    stream = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def characters(count: int) -> list[bytes]:
    """Grey 28 x 28 PNG files of noise."""
    files = []
    for seed in range(count):
        stream = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def load(artifact: Path, *, device: str, precision: str, compiled: bool) -> OpenSetClassifier:
    """The classifier as the handler loads it, for the bare loops."""
    return load_artifact(
        artifact,
        device="cuda:0" if device == "cuda" else device,
        precision=precision,
        compiled=compiled,
    )
