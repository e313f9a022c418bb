"""What travels with one image: an operating point in, a document or a refusal out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openset.labels import UNKNOWN_LABEL
from openset.model_card import ModelCard
from openset.scores import score_probability

DEFAULT_TOP_K = 5
FACTORY = "factory"

Header = Callable[[str], str | None]


class BadOperatingPoint(ValueError):
    """The headers of a request do not make an operating point."""


@dataclass(frozen=True)
class Refusal:
    """The answer to a request that failed; RFC 9457 problem details."""

    status: int
    type: str
    title: str
    detail: str


@dataclass(frozen=True)
class Question:
    """How one image is to be judged and answered.

    Attributes:
        score_type: one of the model card's scores.
        tau: threshold, a float32 value.
        calibration: echoed, so that the sender sees what was applied.
        top_k: classes listed.
        all_angles: whether every class's angle is wanted.
    """

    score_type: str
    tau: float
    calibration: str
    top_k: int
    all_angles: bool


def read_question(header: Header, card: ModelCard, path: str) -> Question:
    """Read a request's headers; without an operating point the model card's factory point applies.

    Args:
        header: gives the value of a lower-case header name, or None.
        card: of the served model.
        path: that computes the scores.

    Raises:
        BadOperatingPoint: a value is missing, not finite or out of range, or the factory point belongs to another path.
    """
    tau_text, score_type = header("x-openset-tau"), header("x-openset-score")
    if tau_text is None and score_type is None:
        if card.factory is None:
            raise BadOperatingPoint(
                "the model has no factory operating point; send x-openset-tau and x-openset-score"
            )
        if card.factory["path"] != path:
            raise BadOperatingPoint(
                f"the factory operating point belongs to the path {card.factory['path']}, this is {path}; "
                "send x-openset-tau and x-openset-score"
            )
        tau, score_type, calibration = card.factory["tau"], card.factory["score_type"], FACTORY
    else:
        calibration = header("x-openset-calibration") or ""
        try:
            tau = float(tau_text or "missing")
        except ValueError as error:
            raise BadOperatingPoint(f"x-openset-tau must be a number, got {tau_text!r}") from error
    with np.errstate(over="ignore"):
        rounded = float(np.float32(tau))  # what is beyond float32 becomes infinite
    if not math.isfinite(rounded):
        raise BadOperatingPoint(f"x-openset-tau must be finite as float32, got {tau}")
    if score_type not in card.scores:
        raise BadOperatingPoint(
            f"x-openset-score must be one of {sorted(card.scores)}, got {score_type!r}"
        )
    top_k = header("x-openset-top-k") or str(DEFAULT_TOP_K)
    if not top_k.isdecimal() or not int(top_k):
        raise BadOperatingPoint(f"x-openset-top-k must be a positive whole number, got {top_k!r}")
    return Question(
        score_type=score_type,
        tau=rounded,
        calibration=calibration,
        top_k=min(int(top_k), card.num_classes),
        all_angles=header("x-openset-angles") == "all",
    )


def document(
    question: Question,
    card: ModelCard,
    *,
    score: float,
    accepted: bool,
    logits: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    cosines: NDArray[np.float32],
    angles_deg: NDArray[np.float32],
) -> dict[str, Any]:
    """The answer to one image; arrays are (C,), angles in degrees."""

    def of_class(index: int) -> dict[str, Any]:
        return {
            "label": card.class_names[index],
            "class_id": card.class_ids[index],
            "index": index,
            "probability": _finite(probabilities[index]),
            "cosine": _finite(cosines[index]),
            "angle_deg": _finite(angles_deg[index]),
        }

    # Stable: ties go to the first index, as in argmax.
    order = np.argsort(-logits, kind="stable")[: question.top_k]
    top = [of_class(int(index)) for index in order]
    finite = math.isfinite(score)
    answer: dict[str, Any] = {
        "label": top[0]["label"] if accepted else UNKNOWN_LABEL,
        "accepted": accepted,
        "score": score if finite else None,
        "score_type": question.score_type,
        "score_probability": score_probability(question.score_type, score) if finite else None,
        "tau": question.tau,
        "tau_probability": score_probability(question.score_type, question.tau),
        "calibration": question.calibration,
        "nearest": top[0],
        "top_k": top,
    }
    if not finite:
        answer["non_finite"] = True
    if question.all_angles:
        answer["angles"] = [
            {
                "label": card.class_names[index],
                "class_id": card.class_ids[index],
                "cosine": _finite(cosines[index]),
                "angle_deg": _finite(angles_deg[index]),
            }
            for index in range(card.num_classes)
        ]
    return answer


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
