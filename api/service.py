"""What the gateway does with an image or a target: the use cases, free of HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import exc

from api.admission import Admission
from api.archive import ServedModel
from api.backend import Backend, HandlerAnswer
from api.canary import canary_image
from api.current import Coalesced, SingleFlight, Unchanged
from api.metrics import Metrics
from api.problems import Problem
from api.schemas import HIGHEST, LOWEST, AppliedCalibration, PredictAnswer
from api.settings import Settings
from api.store import Calibration, Store
from openset.calibration import DEFAULT_CONFIDENCE, NotCertifiable, OperatingPoint, p_value

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OWN_TARGET = "request"

# Errors of a store that is away or damaged: of DatabaseError, a damaged SQLite file raises the class itself.
_STORE_AWAY = (
    exc.DatabaseError,
    exc.InterfaceError,
    exc.TimeoutError,
    OSError,
    TimeoutError,
)
# Those of them that are an error of ours: values that the store refuses.
_OUR_ERROR = (exc.DataError, exc.IntegrityError)


@lru_cache(maxsize=4096)
def _on_the_wire(tau: float) -> tuple[str, float]:
    """The shortest text that reads back as the same float32, and that float32 value."""
    single = np.float32(tau)
    return str(single), float(single)


def _target(point: OperatingPoint) -> tuple[Any, ...]:
    return point.score_type, point.tau, point.fpr, point.confidence


class Wish(BaseModel):
    """How a client wants one image answered: the query of a prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        default=None, description="name of the served model; another one is refused"
    )
    fpr: float | None = Field(
        default=None, ge=LOWEST, le=HIGHEST, description="target for this request only"
    )
    top_k: int = Field(default=5, ge=1, le=1000)
    angles: Literal["all"] | None = Field(default=None, description="angles to all classes")


@dataclass(frozen=True)
class Applied:
    """The operating point of one request; ``calibration_id`` is None for a target of its own."""

    point: OperatingPoint
    calibration_id: int | None
    source: str


class Service:
    """The gateway's state and use cases.

    Args:
        settings: of the gateway.
        model: read from the archive.
        store: of calibrations.
        backend: client of the model server.
        metrics: counters.
    """

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        store: Store,
        backend: Backend,
        metrics: Metrics,
    ) -> None:
        self.settings, self.model, self.store = settings, model, store
        self.backend, self.metrics = backend, metrics
        self.path: str | None = None
        self.admission = Admission(
            most=settings.max_in_flight,
            most_bytes=settings.max_bytes_in_flight,
            deadline_s=settings.deadline_s,
        )
        self.upload = self.admission.upload
        self._answered_at = float("-inf")
        self._current: dict[str, Unchanged[Calibration | None]] = {}
        self._canary = SingleFlight(self._ask_canary)
        self._why_no_factory: dict[str, str] = {}
        self._why_not_ready: str | None = None

    def close(self) -> None:
        """Give up what is still asked."""
        self._canary.cancel()

    # -- store ---------------------------------------------------------------------------------------------------------

    async def ask_store(self, question: asyncio.Future[T] | asyncio.Task[T]) -> T:
        """Wait for the store; if it cannot be asked the request fails, never a stale tau."""
        try:
            async with asyncio.timeout(self.settings.store_timeout_s):
                return await question
        except _OUR_ERROR:
            raise
        except _STORE_AWAY as error:
            logger.error("the calibration store cannot be asked: %s", error)
            raise Problem(
                "store-away",
                "the calibration store cannot be asked; no decision is made without it",
                retry_after_s=2,
            ) from error

    async def latest(self, path: str) -> Calibration | None:
        """The newest activation of a path, as of now, whether or not this archive can serve it."""
        if path not in self._current:
            read = Coalesced(lambda: self.store.current(path), self.settings.store_timeout_s)
            self._current[path] = Unchanged(self.store.version, read)
        known = self._current[path]
        if known.is_current():
            return known.value
        return await self.ask_store(asyncio.ensure_future(known.renewed()))

    async def current(self, path: str) -> Calibration:
        """The current calibration of a path, as of now.

        Raises:
            Problem: there is none, or this archive has no scores for it: neither of the path nor of its score type.
        """
        if path not in self.model.score_sets:
            raise self._not_calibrated(path)
        calibration = await self.latest(path)
        if calibration is None:
            raise Problem(
                "not-calibrated",
                f"no operating point is set for the serving path {path}{self._why_no_factory.get(path, '')}; "
                "set one: POST /calibrate?fpr=<rate>",
                path=path,
            )
        if not self.has_score(path, calibration.point.score_type):
            raise Problem(
                "not-calibrated",
                f"calibration {calibration.id} thresholds the score {calibration.point.score_type!r}, which the archive "
                f"does not have; set another: POST /calibrate?score={self.model.card.default_score}",
                path=path,
            )
        return calibration

    def has_score(self, path: str, score_type: str) -> bool:
        """Whether this archive can be thresholded by a score on a path."""
        in_set = score_type in self.model.score_sets[path].scores
        return in_set and score_type in self.model.card.scores

    def _not_calibrated(self, path: str) -> Problem:
        device, precision, mode, _ = path.split("-", 3)
        compiled = " COMPILED=1" if mode == "compiled" else ""
        return Problem(
            "not-calibrated",
            f"the serving path {path} has no calibration scores; add them, on a machine like this one, with: "
            f"make calibrate RUN=<run> DEVICE={device} PRECISION={precision}{compiled}, then make archive RUN=<run>, and start "
            "again (make serve, make up)",
            path=path,
        )

    # -- path ----------------------------------------------------------------------------------------------------------

    async def serving_path(self) -> str:
        """The path that the model server computes on, learnt from a real prediction."""
        while self.path is None:  # a mismatch may forget it again in between
            await self._canary.get()
        return self.path

    async def _ask_canary(self) -> None:
        """One prediction of our own; learns the path and makes its factory point row one."""
        sent = time.perf_counter()
        with self.admission.asking() as position:
            # A threshold of its own: the factory's may belong to another path.
            headers = {
                "x-openset-tau": "0",
                "x-openset-score": self.model.card.default_score,
                "x-openset-calibration": "canary",
            }
            answer = await self.backend.predict(canary_image(), headers)
        if self.admission.seconds_an_answer is None:  # later on, answers to real images know better
            self.admission.learn(position, time.perf_counter() - sent)
        self._check_model(answer)
        await self._learn(answer.path)
        self._answered_at = time.monotonic()

    async def _learn(self, path: str) -> None:
        if path in self.model.score_sets:
            try:
                point = self._factory_point(path)
            except (LookupError, TypeError, ValueError) as error:
                logger.warning("the factory operating point cannot be used on %s: %s", path, error)
                self._why_no_factory[path] = f", and the factory point cannot be used ({error})"
            else:
                await self.ask_store(
                    asyncio.ensure_future(asyncio.to_thread(self._take_over, point))
                )
        self.path = path

    def _factory_point(self, path: str) -> OperatingPoint:
        factory = self.model.card.factory
        if factory is not None and factory["path"] == path:
            return OperatingPoint.from_dict(factory)
        # A path added by make calibrate: the factory target on its own scores.
        target = factory or {"fpr": 1e-2, "confidence": DEFAULT_CONFIDENCE}
        return self.model.operating_point(
            path, self.model.card.default_score, target["fpr"], target["confidence"]
        )

    def _take_over(self, point: OperatingPoint) -> None:
        """Make the archive's factory point row one; say so where an earlier archive's is in its place."""
        self.store.ensure_factory(point, model_sha256=self.model.sha256)
        known = self.store.factory(point.path)
        if known is None or _target(known.point) != _target(point):
            logger.warning(
                "the archive's factory point (fpr %r, score %s, tau %r) is not applied: %s has calibrations already; apply it "
                "with POST /calibrate?fpr=%r&confidence=%r&score=%s",
                point.fpr, point.score_type, point.tau, point.path, point.fpr, point.confidence, point.score_type,
            )  # fmt: skip

    def _check_model(self, answer: HandlerAnswer) -> None:
        if answer.model.sha256 != self.model.sha256:
            self.metrics.mismatches.inc()
            raise Problem(
                "operating-point-mismatch",
                "the model server holds other weights than the gateway's archive; restart both with the same archive",
            )

    # -- calibrate -----------------------------------------------------------------------------------------------------

    def choose(
        self, path: str, fpr: float, score_type: str | None, confidence: float
    ) -> OperatingPoint:
        """Choose tau for a path.

        Raises:
            Problem: not attainable, or a bad target.
        """
        if path not in self.model.score_sets:
            raise self._not_calibrated(path)
        score_type = score_type or self.model.card.default_score
        if not self.has_score(path, score_type):
            known = set(self.model.card.scores) & self.model.score_sets[path].scores.keys()
            raise Problem(
                "invalid-parameter",
                f"score must be one of {sorted(known)}, got {score_type[:100]!r}",
            )
        try:
            return self.model.operating_point(path, score_type, fpr, confidence)
        except NotCertifiable as error:
            raise Problem(
                "not-certifiable",
                str(error),
                smallest_attainable_fpr=error.smallest_attainable_fpr,
                n=error.n,
            ) from error
        except ValueError as error:
            raise Problem("invalid-parameter", str(error)) from error

    # -- predict -------------------------------------------------------------------------------------------------------

    @contextmanager
    def place(self, images: int = 1) -> Iterator[None]:
        """Places among the images in flight.

        Raises:
            Problem: overloaded.
        """
        with self.admission.places(images):
            self.metrics.in_flight.inc(images)
            try:
                yield
            finally:
                self.metrics.in_flight.dec(images)

    async def predict(self, image: bytes, wish: Wish, request_id: str) -> PredictAnswer:
        """Judge one image by the operating point that is current now, or by the request's own target."""
        started = time.perf_counter()
        applied = await self._applied(wish)
        point = applied.point
        name = _OWN_TARGET if applied.calibration_id is None else str(applied.calibration_id)
        headers = {
            "x-openset-tau": _on_the_wire(point.tau)[0],
            "x-openset-score": point.score_type,
            "x-openset-calibration": name,
            "x-openset-top-k": str(wish.top_k),
            "x-request-id": request_id,
        }
        if wish.angles is not None:
            headers["x-openset-angles"] = wish.angles
        sent = time.perf_counter()
        with self.admission.asking() as position:
            try:
                answer = await self.backend.predict(image, headers)
            except Problem as problem:
                if problem.slug == "deadline":
                    self.admission.learn(position, self.settings.deadline_s)
                raise
        answered = time.perf_counter()
        self.admission.learn(position, answered - sent)
        self._check_model(answer)
        self._check_echo(answer, point, name)
        self._answered_at = time.monotonic()
        self.metrics.observe(answer, answered - sent)
        negatives = self.model.sorted_negatives(point.path, point.score_type)
        return PredictAnswer(
            label=answer.label,
            accepted=answer.accepted,
            score=answer.score,
            score_type=answer.score_type,
            score_probability=answer.score_probability,
            tau=answer.tau,
            tau_probability=answer.tau_probability,
            p_value=None if answer.score is None else p_value(answer.score, negatives),
            nearest=answer.nearest,
            top_k=answer.top_k,
            angles=answer.angles,
            calibration=AppliedCalibration(
                id=applied.calibration_id,
                fpr=point.fpr,
                fpr_upper_bound=point.fpr_upper_bound,
                confidence=point.confidence,
                source=applied.source,
            ),
            model=answer.model,
            image=answer.image,
            timing_ms={
                **answer.timing_ms,
                "backend": round((answered - sent) * 1e3, 3),
                "total": round((time.perf_counter() - started) * 1e3, 3),
            },
            request_id=request_id,
        )

    async def _applied(self, wish: Wish) -> Applied:
        path = await self.serving_path()
        if wish.fpr is None:
            calibration = await self.current(path)
            return Applied(calibration.point, calibration.id, calibration.source)
        current = await self.current(path)
        point = self.choose(path, wish.fpr, current.point.score_type, current.point.confidence)
        return Applied(point, None, _OWN_TARGET)

    def _check_echo(self, answer: HandlerAnswer, point: OperatingPoint, name: str) -> None:
        """The model server must have applied what was sent, on the path the threshold was made for."""
        if answer.path != point.path:
            self.metrics.mismatches.inc()
            self.path = None  # learnt anew by the next request
            raise Problem(
                "operating-point-mismatch",
                f"the model server answered on path {answer.path}, the threshold belongs to {point.path}; try again",
                retry_after_s=1,
            )
        applied = (answer.tau, answer.score_type, answer.calibration)
        if applied != (_on_the_wire(point.tau)[1], point.score_type, name):
            self.metrics.mismatches.inc()
            raise Problem(
                "operating-point-mismatch",
                "the model server did not apply the operating point it was sent",
            )

    # -- readiness -----------------------------------------------------------------------------------------------------

    async def ready(self) -> tuple[str, Calibration]:
        """Path and calibration, proven by a recent prediction or a canary.

        Raises:
            Problem: why the stack is not ready; logged when the reason changes, since whoever asks may not keep the answer.
        """
        try:
            proven = await self._proven()
        except Problem as problem:
            if problem.detail != self._why_not_ready:
                logger.warning("not ready (%s): %s", problem.slug, problem.detail)
            self._why_not_ready = problem.detail
            raise
        self._why_not_ready = None
        return proven

    async def _proven(self) -> tuple[str, Calibration]:
        if time.monotonic() - self._answered_at > self.settings.ready_seconds or self.path is None:
            await self._canary.get()
        path = await self.serving_path()
        return path, await self.current(path)
