"""Prometheus metrics; several gateway processes share them through PROMETHEUS_MULTIPROC_DIR."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from api.backend import HandlerAnswer

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SCORES = (-10, -5, -2, 0, 2, 4, 6, 8, 10, 12, 15, 20, 30)


class Metrics:
    """Counters and histograms of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "openset_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "openset_request_seconds",
            "Time to answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.backend_seconds = Histogram(
            "openset_backend_seconds",
            "Time of the model server",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.outcomes = Counter(
            "openset_outcomes",
            "Answers: accepted, unknown, non_finite",
            ["outcome"],
            registry=self.registry,
        )
        self.scores = Histogram(
            "openset_score",
            "Scores in their own unit",
            ["score_type"],
            buckets=_SCORES,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "openset_in_flight",
            "Requests being worked on",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.calibrations = Counter(
            "openset_calibrations",
            "Operating points set through this gateway",
            registry=self.registry,
        )
        self.mismatches = Counter(
            "openset_operating_point_mismatches",
            "Answers refused because another operating point or model was applied",
            registry=self.registry,
        )

    def observe(self, answer: HandlerAnswer, backend_seconds: float) -> None:
        """Count one answer of the model."""
        self.backend_seconds.observe(backend_seconds)
        outcome = (
            "accepted" if answer.accepted else "non_finite" if answer.score is None else "unknown"
        )
        self.outcomes.labels(outcome).inc()
        if answer.score is not None:
            self.scores.labels(answer.score_type).observe(answer.score)

    def render(self) -> bytes:
        """The exposition text, over all processes where they share a folder."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        _forget_the_dead(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        merged = CollectorRegistry()
        MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return generate_latest(merged)


def _forget_the_dead(folder: Path) -> None:
    """Drop the live gauges of processes that are gone: what they had in flight would be counted for ever."""
    for file in folder.glob("gauge_live*.db"):
        found = re.search(r"_(\d+)\.db$", file.name)
        if found is not None and not Path("/proc", found.group(1)).exists():
            file.unlink(missing_ok=True)
