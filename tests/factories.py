"""Small real things for tests: geometry you can picture, a tiny trained-looking model, images."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openset.artifact import load_artifact, save_artifact
from openset.calibration import ScoreSet, operating_point
from openset.fitted_scores import FITTED_SCORES
from openset.heads import build_head
from openset.labels import NEGATIVE, UNKNOWN
from openset.model_card import ModelCard
from openset.networks import build_network
from openset.preprocessing import Preprocessing
from training.data import ProtocolData, Split
from training.runs import CONFIG, TrainConfig
from training.scoring import Scored

DIGITS = [str(digit) for digit in range(10)]


def features_at(angles_deg: Sequence[float], magnitudes: Sequence[float] | None = None) -> Tensor:
    """Two-dimensional features at given angles to the x axis, (N, 2)."""
    radians = torch.tensor([math.radians(angle) for angle in angles_deg])
    lengths = torch.ones(len(angles_deg)) if magnitudes is None else torch.tensor(magnitudes)
    return torch.stack([radians.cos(), radians.sin()], dim=1) * lengths[:, None]


def grey_image(seed: int = 0, size: tuple[int, int] = (28, 28)) -> NDArray[np.uint8]:
    """A random grey image, (H, W) uint8."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def image_bytes(
    array: NDArray[np.uint8] | None = None, *, format: str = "PNG", **options: Any
) -> bytes:
    """Encode an array; a random 28x28 grey PNG by default."""
    stream = io.BytesIO()
    Image.fromarray(grey_image() if array is None else array).save(stream, format, **options)
    return stream.getvalue()


def fill_with_images(
    folder: Path, count: int, color: tuple[int, int, int] = (90, 90, 90), first: int = 0
) -> None:
    """Noisy 40x36 images of one color, ``000.png`` and on, in a folder that is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        noise = np.random.default_rng(number).integers(-25, 26, (36, 40, 3))
        pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def tiny_card(**changes: Any) -> ModelCard:
    """Model card of a ten-digit LeNet++ with a hard head."""
    card = ModelCard(
        name="tiny",
        version="1.0",
        loss="cos_eos",
        options={},
        protocol="glyphs",
        normalization="hard",
        scale=13.0,
        num_classes=10,
        feature_dim=10,
        network="lenet_plus_plus",
        network_options={},
        class_ids=DIGITS,
        class_names=DIGITS,
        preprocessing=Preprocessing(
            mode="L", image_size=28, resize=28, polarity="light_on_dark"
        ).to_dict(),
        default_score="softmax",
        training={"seed": 0},
    )
    return card.with_changes(**changes)


def tiny_artifact(folder: Path, *, samples: int = 1200, seed: int = 0, **card_changes: Any) -> Path:
    """An artifact with random weights and a real score set: scores of random images through its own classifier.

    The better-scored half are knowns labelled by the model's own prediction, the others negatives (every twentieth
    swapped, so that the groups overlap); enough to certify 1e-2.
    """
    torch.manual_seed(seed)
    card = tiny_card(**card_changes)
    network = build_network(card.network, feature_dim=card.feature_dim, **card.network_options)
    head = build_head(
        card.normalization,
        num_classes=card.num_classes,
        feature_dim=card.feature_dim,
        scale=card.scale,
        background=card.background,
    )
    fitted = _fitted(card)
    save_artifact(folder, network=network, head=head, card=card, fitted=fitted)
    classifier = load_artifact(folder)
    images = torch.randint(0, 256, (samples, 1, 28, 28), dtype=torch.uint8)
    # Blanking a random share of rows spreads the scores of images that would else look alike.
    rows = torch.randint(1, 28, (samples,))
    images *= (torch.arange(28)[None, :] < rows[:, None])[:, None, :, None]
    batches = [classifier.predict(images[start : start + 500]) for start in range(0, samples, 500)]
    predictions = torch.cat([batch.predictions for batch in batches]).numpy()
    log_odds = torch.cat([batch.scores["softmax"] for batch in batches]).numpy()
    looks_known = (log_odds >= np.median(log_odds)) ^ (np.arange(samples) % 20 == 0)
    labels = np.where(looks_known, predictions, NEGATIVE)
    score_set = ScoreSet(
        path=classifier.path.key,
        scores={
            name: torch.cat([batch.scores[name] for batch in batches]).numpy()
            for name in batches[0].scores
        },
        predictions=predictions,
        labels=labels,
        groups=np.array([str(label) for label in labels]),
        sample_ids=np.array([f"random/{index}" for index in range(samples)]),
    )
    factory = operating_point(score_set, score_type=card.default_score, fpr=1e-2)
    save_artifact(
        folder,
        network=classifier.network,
        head=classifier.head,
        card=card.with_changes(factory=factory.to_dict()),
        fitted=fitted,
        score_sets=[score_set],
    )
    return folder


KNOWN_DEG = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0)
FOREIGN_DEG = (60.0, 70.0, 80.0, 90.0)


def scored_at(known_deg: Sequence[float], foreign_deg: Sequence[float], wrong: int = 0) -> Scored:
    """Knowns of class 0 and unknowns at these angles to center 0, magnitude 2; center 1 lies far behind.

    The first ``wrong`` knowns are taken for class 1.
    """
    angles = np.radians(np.array([*known_deg, *foreign_deg]))
    cosines = np.stack([np.cos(angles), np.full(len(angles), -0.99)], axis=1).astype(np.float32)
    labels = np.array([0] * len(known_deg) + [UNKNOWN] * len(foreign_deg))
    predictions = np.zeros(len(labels), dtype=np.int64)
    predictions[:wrong] = 1
    return Scored(
        features=np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 2,
        logits=10 * cosines,
        cosines=cosines,
        scores={"softmax": 10 * cosines[:, 0]},
        predictions=predictions,
        labels=labels,
        groups=labels.astype(str),
        sample_ids=np.arange(len(labels)).astype(str),
        centers=np.eye(2, dtype=np.float32),
    )


def begun_run(folder: Path, config: TrainConfig) -> None:
    """What training leaves in a run's folder before its first checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config.to_json())


def write_idx(file: Path, array: NDArray[np.uint8] | NDArray[np.int64]) -> None:
    """A gzipped idx file of bytes, as EMNIST and MNIST are published."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in array.shape
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def character_split(name: str, kinds: tuple[int, ...], count: int) -> Split:
    """Random images of which more or fewer rows are blank; each kind (a label) gets ``count`` of them."""
    generator = torch.Generator().manual_seed(len(name))
    labels = np.repeat(np.array(kinds, dtype=np.int64), count)
    shape = (len(labels), 1, 28, 28)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows = torch.randint(1, 28, (len(labels),), generator=generator)
    images *= (torch.arange(28)[None, :] < rows[:, None])[:, None, :, None]
    ids = np.array([f"{name}/{index}" for index in range(len(labels))])
    return Split(images, labels, labels.astype(str), ids)


def character_data(
    *,
    train: tuple[int, ...],
    validation: tuple[int, ...],
    test: tuple[int, ...],
    count: int,
    train_count: int | None = None,
) -> ProtocolData:
    """A protocol of ten digits made of random images; the parts hold these labels, each ``count`` times."""
    return ProtocolData(
        name="glyphs",
        class_ids=DIGITS,
        class_names=DIGITS,
        preprocessing=Preprocessing(mode="L", image_size=28, resize=28, polarity="light_on_dark"),
        train=character_split("train", train, train_count or count),
        validation=character_split("validation", validation, count),
        test=character_split("test", test, count),
        notes=["synthetic"],
    )


def _fitted(card: ModelCard) -> dict[str, torch.nn.Module]:
    """States for the card's scores, fitted on random features around one direction per class."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(card.num_classes).repeat(30)
    features = 0.2 * torch.randn(len(labels), card.feature_dim, generator=generator)
    features[torch.arange(len(labels)), labels % card.feature_dim] += 1
    return {
        name: FITTED_SCORES[name].fit(features, labels, labels, card.num_classes)
        for name in card.scores
        if name in FITTED_SCORES
    }


def emnist_files(root: Path) -> Path:
    """EMNIST's files, and MNIST's, with ten random images for each digit and letter."""
    random = np.random.default_rng(0)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for name, labels in (
            (f"emnist/emnist-mnist-{part}", np.arange(10)),
            (f"emnist/emnist-letters-{part}", np.arange(1, 27)),
            (f"mnist/{prefix}", np.arange(10)),
        ):
            repeated = np.repeat(labels, 10)
            images = random.integers(0, 256, (len(repeated), 28, 28), dtype=np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", repeated)):
                write_idx(root / f"{name}-{kind}-ubyte.gz", array)
    return root


__all__ = [
    "DIGITS",
    "FOREIGN_DEG",
    "KNOWN_DEG",
    "character_data",
    "character_split",
    "emnist_files",
    "features_at",
    "fill_with_images",
    "grey_image",
    "image_bytes",
    "scored_at",
    "tiny_artifact",
    "tiny_card",
]
