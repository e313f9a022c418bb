"""Closed response models; they are the contract and the OpenAPI page."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from api.backend import ClassAngle, ClassScore, ImageFacts, ModelIdentity
from api.store import Calibration
from openset.calibration import NEAREST_TO_BOUNDARY, OperatingPoint

# Targets and confidences that are accepted; see openset.calibration.
LOWEST, HIGHEST = NEAREST_TO_BOUNDARY, 1 - NEAREST_TO_BOUNDARY

COVERAGE = (
    "The bound holds for new images of the calibration negatives' population; "
    "it does not cover new kinds of foreign images."
)


class Closed(BaseModel):
    """Base of all answers: no unknown member leaves the house."""

    model_config = ConfigDict(extra="forbid")


class AppliedCalibration(Closed):
    """The operating point an answer was decided with; ``id`` is null for a target chosen by this request alone."""

    id: int | None
    fpr: float
    fpr_upper_bound: float
    confidence: float
    source: str = Field(description='of the calibration; "request" for a target of its own')


class PredictAnswer(Closed):
    """A label, or "unknown"."""

    label: str = Field(description='class name, or "unknown"')
    accepted: bool = Field(description="score >= tau")
    score: float | None = Field(
        description="in its own unit; null if it was not finite (then unknown)"
    )
    score_type: str
    score_probability: float | None
    tau: float
    tau_probability: float | None
    p_value: float | None = Field(description="conformal p-value against the calibration negatives")
    nearest: ClassScore
    top_k: list[ClassScore]
    angles: list[ClassAngle] | None
    calibration: AppliedCalibration
    model: ModelIdentity
    image: ImageFacts
    timing_ms: dict[str, float]
    request_id: str


class BatchItem(Closed):
    """One image of a batch: a result or a problem."""

    status: int
    result: PredictAnswer | None = None
    problem: dict[str, Any] | None = None


class BatchAnswer(Closed):
    """Results in the order of the images."""

    results: list[BatchItem]
    request_id: str


class OperatingPointAnswer(Closed):
    """A threshold with everything one must know about it."""

    calibration_id: int | None
    score_type: str
    tau: float
    fpr: float
    confidence: float
    n: int = Field(description="calibration negatives")
    k: int = Field(description="how many of them may be accepted")
    accepted: int
    expected_fpr: float
    fpr_upper_bound: float
    expected_ccr: float | None = Field(description="on the calibration knowns")
    source: str

    @classmethod
    def of(
        cls, point: OperatingPoint, *, calibration_id: int | None, source: str
    ) -> OperatingPointAnswer:
        """From the shared maths."""
        content = point.to_dict()
        del content["path"]
        return cls(calibration_id=calibration_id, source=source, **content)

    @classmethod
    def of_row(cls, calibration: Calibration) -> OperatingPointAnswer:
        """From a row of the store."""
        return cls.of(calibration.point, calibration_id=calibration.id, source=calibration.source)

    @classmethod
    def of_latest(cls, calibration: Calibration | None) -> OperatingPointAnswer | None:
        """From the newest row of a path, where there is one."""
        return None if calibration is None else cls.of_row(calibration)


class CalibrateAnswer(Closed):
    """What ``/calibrate`` did, or would do."""

    applied: bool
    operating_point: OperatingPointAnswer
    previous: OperatingPointAnswer | None
    path: str
    smallest_attainable_fpr: float
    coverage: str = COVERAGE
    how_to_apply: str | None = None
    request_id: str


class CalibrationRow(Closed):
    """One calibration of the history."""

    operating_point: OperatingPointAnswer
    created_at: datetime
    activated_at: datetime | None
    reason: str
    current: bool


class CalibrationsAnswer(Closed):
    """History of the served path, newest first."""

    path: str
    calibrations: list[CalibrationRow]


class CurvePoint(Closed):
    """FPR and CCR on the calibration data at one tau, with a 95 % interval of the FPR at this tau alone."""

    tau: float
    fpr: float
    fpr_low: float
    fpr_high: float
    ccr: float | None


class CurveAnswer(Closed):
    """FPR with its interval, and CCR, against tau."""

    path: str
    score_type: str
    points: list[CurvePoint]


class ModelAnswer(Closed):
    """The served model."""

    card: dict[str, Any]
    sha256: str
    serving_path: str | None
    calibrated_paths: list[str]


class Alive(Closed):
    """The process answers."""

    status: str = "alive"


class Ready(Closed):
    """A real prediction has just been seen and its path is calibrated."""

    status: str = "ready"
    path: str
    calibration_id: int
