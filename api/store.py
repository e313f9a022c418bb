"""The store of calibrations: rows are appended, never edited. SQLite by default, PostgreSQL by URL.

Current = the newest activation for a path. All calls block; the gateway makes them in a thread.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from openset.calibration import OperatingPoint

_metadata = sa.MetaData()

calibrations = sa.Table(
    "calibrations",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("model_sha256", sa.String(64), nullable=False),
    sa.Column("path", sa.String(128), nullable=False, index=True),
    sa.Column("source", sa.String(128), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("score_type", sa.String(64), nullable=False),
    sa.Column("tau", sa.Double, nullable=False),
    sa.Column("fpr", sa.Double, nullable=False),
    sa.Column("confidence", sa.Double, nullable=False),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("k", sa.Integer, nullable=False),
    sa.Column("accepted", sa.Integer, nullable=False),
    sa.Column("expected_fpr", sa.Double, nullable=False),
    sa.Column("fpr_upper_bound", sa.Double, nullable=False),
    sa.Column("expected_ccr", sa.Double, nullable=True),
    # One factory row a path: several processes may start at once.
    sa.Column("factory_of", sa.String(128), nullable=True, unique=True),
)

activations = sa.Table(
    "activations",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("calibration_id", sa.ForeignKey("calibrations.id"), nullable=False),
    sa.Column("path", sa.String(128), nullable=False, index=True),
    sa.Column("activated_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class Calibration:
    """A row of the store: an operating point with its history."""

    id: int
    created_at: datetime
    model_sha256: str
    source: str
    reason: str
    point: OperatingPoint


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an acknowledged calibration survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _engine_options(url: sa.URL, timeout_s: float) -> dict[str, Any]:
    """So that a question that was given up ends by itself: it must neither block the next nor commit later on."""
    if url.get_backend_name() == "sqlite":
        waiting: dict[str, Any] = {"connect_args": {"timeout": 0.8 * timeout_s}}  # for a lock
        return waiting | ({"pool_timeout": timeout_s} if url.database else {})
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": timeout_s}
    if url.get_backend_name() == "postgresql":
        milliseconds = int(800 * timeout_s)
        options["connect_args"] = {
            "connect_timeout": max(2, round(timeout_s)),  # libpq takes no less
            "tcp_user_timeout": milliseconds,  # a connection that silently broke
            "options": f"-c statement_timeout={milliseconds}",
        }
    return options


class Store:
    """Calibrations and activations in a database.

    Args:
        url: SQLAlchemy URL.
        timeout_s: after which whoever asks gives up; the database is told to give up a little earlier.
    """

    def __init__(self, url: str, *, timeout_s: float = 3.0) -> None:
        self.engine = sa.create_engine(url, **_engine_options(sa.make_url(url), timeout_s))
        self._timeout_s = timeout_s
        self._watch: sqlite3.Connection | None = None
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            if file := self.engine.url.database:
                self._watch = sqlite3.connect(file, timeout=0, check_same_thread=False)

    def create_tables(self) -> None:
        """Create what is missing; safe when several processes start at once."""
        try:
            _metadata.create_all(self.engine)
        except sa.exc.DBAPIError:  # another process was faster
            _metadata.create_all(self.engine)

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()
        if self._watch is not None:
            self._watch.close()

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction that is rolled back where whoever asked has been refused by now.

        Raises:
            TimeoutError: too late.
        """
        started = time.monotonic()
        with self.engine.begin() as connection:
            yield connection
            if time.monotonic() - started > 0.9 * self._timeout_s:
                raise TimeoutError("the store took too long; nothing was changed")

    def version(self) -> int | None:
        """A number that changes with every commit of any process, at the price of a look into shared memory.

        None where the database has no such number (PostgreSQL) or cannot tell now.
        """
        if self._watch is None:
            return None
        try:
            # This connection never writes: every commit is another's.
            return int(self._watch.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return None

    def current(self, path: str) -> Calibration | None:
        """The calibration of the newest activation for a path."""
        query = (
            sa.select(calibrations)
            .join(activations, activations.c.calibration_id == calibrations.c.id)
            .where(activations.c.path == path)
            .order_by(activations.c.id.desc())
            .limit(1)
        )
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _from_row(row)

    def get(self, calibration_id: int) -> Calibration | None:
        """One calibration by id."""
        query = sa.select(calibrations).where(calibrations.c.id == calibration_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _from_row(row)

    def history(self, path: str, limit: int) -> list[tuple[Calibration, datetime | None]]:
        """Calibrations of a path, newest first, with the time of their last activation."""
        last = sa.func.max(activations.c.activated_at)
        query = (
            sa.select(calibrations, last.label("activated_at"))
            .outerjoin(activations, activations.c.calibration_id == calibrations.c.id)
            .where(calibrations.c.path == path)
            .group_by(calibrations.c.id)
            .order_by(calibrations.c.id.desc())
            .limit(limit)
        )
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [(_from_row(row), _aware(row["activated_at"])) for row in rows]

    def add(
        self,
        point: OperatingPoint,
        *,
        model_sha256: str,
        source: str,
        reason: str,
        factory: bool = False,
    ) -> Calibration:
        """Append a calibration and activate it, in one transaction.

        Raises:
            sqlalchemy.exc.IntegrityError: a second factory row for a path.
        """
        now = datetime.now(UTC)
        values = {
            **point.to_dict(),
            "created_at": now,
            "model_sha256": model_sha256,
            "source": source,
            "reason": reason,
            "factory_of": point.path if factory else None,
        }
        with self._writing() as connection:
            inserted = connection.execute(calibrations.insert().values(values)).inserted_primary_key
            assert inserted is not None
            calibration_id = int(inserted[0])
            connection.execute(
                activations.insert().values(
                    calibration_id=calibration_id, path=point.path, activated_at=now, reason=reason
                )
            )
        return Calibration(calibration_id, now, model_sha256, source, reason, point)

    def activate(self, calibration: Calibration, *, reason: str) -> None:
        """Make a calibration of the past current again."""
        with self._writing() as connection:
            connection.execute(
                activations.insert().values(
                    calibration_id=calibration.id,
                    path=calibration.point.path,
                    activated_at=datetime.now(UTC),
                    reason=reason,
                )
            )

    def factory(self, path: str) -> Calibration | None:
        """The calibration that an archive brought for this path."""
        query = sa.select(calibrations).where(calibrations.c.factory_of == path)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _from_row(row)

    def ensure_factory(self, point: OperatingPoint, *, model_sha256: str) -> None:
        """Make the archive's factory operating point row one of its path, once."""
        if self.current(point.path) is not None:
            return
        try:
            self.add(
                point,
                model_sha256=model_sha256,
                source="factory",
                reason="first start",
                factory=True,
            )
        except IntegrityError:  # another process was faster
            return


def _aware(value: datetime | None) -> datetime | None:
    """SQLite forgets the time zone; all times are UTC."""
    return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def _from_row(row: sa.RowMapping) -> Calibration:
    fields = OperatingPoint.__dataclass_fields__
    created = _aware(row["created_at"])
    assert created is not None
    return Calibration(
        id=row["id"],
        created_at=created,
        model_sha256=row["model_sha256"],
        source=row["source"],
        reason=row["reason"],
        point=OperatingPoint(**{name: row[name] for name in fields}),
    )
