"""What the gateway knows of the model: model card, weights' digest and calibration scores, read from the archive."""

from __future__ import annotations

import errno
import hashlib
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openset.calibration import OperatingPoint, ScoreSet, SortedScores, load_score_sets
from openset.model_card import ModelCard

_CACHED_POINTS = 256


@dataclass(frozen=True, eq=False)
class ServedModel:
    """The model in the archive.

    Attributes:
        card: the model card.
        sha256: of the weights.
        score_sets: calibration scores by path.
    """

    card: ModelCard
    sha256: str
    score_sets: dict[str, ScoreSet]
    _sorted: dict[tuple[str, str], SortedScores] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operating_point", lru_cache(_CACHED_POINTS)(self.operating_point))

    def operating_point(
        self, path: str, score_type: str, fpr: float, confidence: float
    ) -> OperatingPoint:
        """Choose tau for a path; see ``openset.calibration.operating_point``."""
        return self._scores(path, score_type).operating_point(fpr=fpr, confidence=confidence)

    def sorted_negatives(self, path: str, score_type: str) -> NDArray[np.float32]:
        """Calibration negatives' scores, ascending, (n,)."""
        return self._scores(path, score_type).negatives

    def _scores(self, path: str, score_type: str) -> SortedScores:
        key = (path, score_type)
        if key not in self._sorted:
            self._sorted[key] = SortedScores.of(self.score_sets[path], score_type)
        return self._sorted[key]


def read_archive(file: Path) -> ServedModel:
    """Read a ``.mar``.

    Raises:
        ValueError: the file is not an archive of ours.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            card = ModelCard.from_json(archive.read("model_card.json"))
            score_sets = load_score_sets(archive.read("calibration.npz"))
            with archive.open("weights.safetensors") as weights:
                sha256 = hashlib.file_digest(weights, "sha256").hexdigest()  # type: ignore[arg-type]  # a readable is enough
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:
        # A place that does not exist in the file is an invalid argument to the system; all else it refuses is no damage.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # Damaged bytes: zipfile and what decompresses for it raise a dozen kinds.
        raise ValueError(
            f"{file} is not an archive of this product: {error}; make it with: make archive RUN=<run>"
        ) from error
    return ServedModel(card, sha256, score_sets)
