"""``/calibrate`` and its history: choosing tau for a target false-positive rate."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Path, Query

from api.archive import ServedModel
from api.declared import KEYS, PATH, POINT, problems_of_route
from api.deps import RequestId, ServiceDep, nothing_unknown, requires
from api.origin import own_origin
from api.problems import Problem
from api.schemas import (
    HIGHEST,
    LOWEST,
    CalibrateAnswer,
    CalibrationRow,
    CalibrationsAnswer,
    CurveAnswer,
    CurvePoint,
    OperatingPointAnswer,
)
from openset.calibration import DEFAULT_CONFIDENCE, DEFAULT_FPR, smallest_attainable_fpr
from openset.labels import NEGATIVE, is_known
from openset.metrics import clopper_pearson_bounds, count_at_least

router = APIRouter(tags=["calibrate"], dependencies=[Depends(nothing_unknown)])
may_calibrate = Depends(requires("calibrate"))
may_read = Depends(requires("predict"))

Fpr = Annotated[float, Query(ge=LOWEST, le=HIGHEST, description="target false-positive rate")]
Confidence = Annotated[float, Query(ge=LOWEST, le=HIGHEST)]
Score = Annotated[str | None, Query(description="score to threshold; default: the model card's")]
Source = Annotated[Literal["factory"], Query(description="calibration negatives")]
# PostgreSQL keeps no NUL in a text.
Reason = Annotated[
    str, Query(max_length=500, pattern=r"^[^\x00]*$", description="kept in the history")
]
CalibrationId = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.post(
    "/calibrate",
    dependencies=[may_calibrate, Depends(own_origin)],
    responses=problems_of_route(*KEYS, *POINT, "foreign-origin"),
)
async def set_operating_point(
    service: ServiceDep,
    request_id: RequestId,
    fpr: Fpr = DEFAULT_FPR,
    confidence: Confidence = DEFAULT_CONFIDENCE,
    score: Score = None,
    source: Source = "factory",
    reason: Reason = "",
) -> CalibrateAnswer:
    """Set tau for the served path; every request received from now on, by any process, is decided by it."""
    path = await service.serving_path()
    point = service.choose(path, fpr, score, confidence)
    previous = await service.latest(path)
    added = await service.ask_store(
        asyncio.ensure_future(
            asyncio.to_thread(
                service.store.add,
                point,
                model_sha256=service.model.sha256,
                source=source,
                reason=reason,
            )
        )
    )
    service.metrics.calibrations.inc()
    return CalibrateAnswer(
        applied=True,
        operating_point=OperatingPointAnswer.of_row(added),
        previous=OperatingPointAnswer.of_latest(previous),
        path=path,
        smallest_attainable_fpr=smallest_attainable_fpr(point.n, confidence=confidence),
        request_id=request_id,
    )


@router.get("/calibrate", dependencies=[may_read], responses=problems_of_route(*KEYS, *POINT))
async def compute_operating_point(
    service: ServiceDep,
    request_id: RequestId,
    fpr: Fpr = DEFAULT_FPR,
    confidence: Confidence = DEFAULT_CONFIDENCE,
    score: Score = None,
    source: Source = "factory",
) -> CalibrateAnswer:
    """The same computation; nothing is changed."""
    path = await service.serving_path()
    point = service.choose(path, fpr, score, confidence)
    current = await service.latest(path)
    return CalibrateAnswer(
        applied=False,
        operating_point=OperatingPointAnswer.of(point, calibration_id=None, source=source),
        previous=OperatingPointAnswer.of_latest(current),
        path=path,
        smallest_attainable_fpr=smallest_attainable_fpr(point.n, confidence=confidence),
        how_to_apply=f"POST /calibrate?fpr={fpr!r}&confidence={confidence!r}&score={point.score_type}",
        request_id=request_id,
    )


@router.get(
    "/calibrations",
    dependencies=[may_read],
    responses=problems_of_route(*KEYS, *PATH, "invalid-parameter"),
)
async def list_calibrations(
    service: ServiceDep, limit: Annotated[int, Query(ge=1, le=1000)] = 50
) -> CalibrationsAnswer:
    """History of the served path, newest first."""
    path = await service.serving_path()
    rows = await service.ask_store(
        asyncio.ensure_future(asyncio.to_thread(service.store.history, path, limit))
    )
    current = await service.latest(path)
    return CalibrationsAnswer(
        path=path,
        calibrations=[
            CalibrationRow(
                operating_point=OperatingPointAnswer.of_row(calibration),
                created_at=calibration.created_at,
                activated_at=activated_at,
                reason=calibration.reason,
                current=current is not None and calibration.id == current.id,
            )
            for calibration, activated_at in rows
        ],
    )


@router.post(
    "/calibrations/{calibration_id}/activate",
    dependencies=[may_calibrate, Depends(own_origin)],
    responses=problems_of_route(*KEYS, *POINT, "foreign-origin", "not-found", "wrong-path"),
)
async def activate_calibration(
    calibration_id: CalibrationId,
    service: ServiceDep,
    request_id: RequestId,
    reason: Reason = "rollback",
) -> CalibrateAnswer:
    """Make a calibration of the past current again."""
    path = await service.serving_path()
    store = service.store
    wanted = await service.ask_store(
        asyncio.ensure_future(asyncio.to_thread(store.get, calibration_id))
    )
    if wanted is None:
        raise Problem(
            "not-found", f"there is no calibration {calibration_id}; see GET /calibrations"
        )
    if wanted.point.path != path:
        raise Problem(
            "wrong-path",
            f"calibration {calibration_id} belongs to {wanted.point.path}, served is {path}",
        )
    # Refuses an uncalibrated path, and a score that only an earlier archive had.
    service.choose(path, 0.5, wanted.point.score_type, 0.5)
    previous = await service.latest(path)
    await service.ask_store(
        asyncio.ensure_future(asyncio.to_thread(store.activate, wanted, reason=reason))
    )
    return CalibrateAnswer(
        applied=True,
        operating_point=OperatingPointAnswer.of_row(wanted),
        previous=OperatingPointAnswer.of_latest(previous),
        path=path,
        smallest_attainable_fpr=smallest_attainable_fpr(
            wanted.point.n, confidence=wanted.point.confidence
        ),
        request_id=request_id,
    )


@router.get(
    "/calibration/curve", dependencies=[may_read], responses=problems_of_route(*KEYS, *POINT)
)
async def calibration_curve(
    service: ServiceDep, score: Score = None, points: Annotated[int, Query(ge=2, le=1000)] = 100
) -> CurveAnswer:
    """FPR with a 95 % interval at each tau singly, and CCR, on the calibration data.

    To set a threshold use POST /calibrate, whose confidence covers the choice.
    """
    path = await service.serving_path()
    score_type = score or service.model.card.default_score
    service.choose(path, 0.5, score_type, 0.5)  # refuses an uncalibrated path and an unknown score
    curve = await asyncio.to_thread(_curve, service.model, path, score_type, points)
    return CurveAnswer(path=path, score_type=score_type, points=curve)


def _curve(model: ServedModel, path: str, score_type: str, points: int) -> list[CurvePoint]:
    """About ``points`` thresholds at equal shares of the calibration scores, duplicates left out."""
    score_set = model.score_sets[path]
    scores, labels = score_set.of_type(score_type), score_set.labels
    shares = np.linspace(0, 1, points)
    tau = np.unique(np.quantile(scores[labels >= NEGATIVE], shares).astype(np.float32))
    negatives = model.sorted_negatives(path, score_type)
    accepted = count_at_least(negatives, tau)
    low, high = clopper_pearson_bounds(accepted, len(negatives))
    known = is_known(labels)
    correct = known & (score_set.predictions == labels)
    labelled = count_at_least(np.sort(scores[correct]), tau)
    ccr = (labelled / known.sum()).tolist() if known.any() else [None] * len(tau)
    columns = zip(tau.tolist(), accepted, low.tolist(), high.tolist(), ccr, strict=True)
    return [
        CurvePoint(tau=at, fpr=int(k) / len(negatives), fpr_low=lower, fpr_high=upper, ccr=share)
        for at, k, lower, upper, share in columns
    ]
