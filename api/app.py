"""Composition root: ``uvicorn --factory api.app:from_environment``."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from api import declared, problems
from api.archive import read_archive
from api.backend import Backend
from api.metrics import Metrics
from api.middleware import RequestContext, configure_logging
from api.routes import calibrate, predict, status
from api.service import Service
from api.settings import Settings
from api.store import Store


def create_app(settings: Settings) -> FastAPI:
    """The gateway for one archive.

    Raises:
        ValueError: the archive is not one of ours.
    """
    model = read_archive(settings.archive)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = Store(settings.database_url, timeout_s=settings.store_timeout_s)
        await asyncio.to_thread(store.create_tables)
        backend = Backend(settings)
        service = app.state.service = Service(settings, model, store, backend, metrics)
        # What lives until the end is not looked through again by every full collection under load.
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()
        service.close()
        await backend.close()
        store.close()

    app = FastAPIOffline(  # /docs from the wheel: neither host nor browser need the internet
        redoc_url=None,
        title="openset-serve",
        version=model.card.version,
        summary="Classifies images into known classes and says unknown to the rest.",
        lifespan=lifespan,
    )
    app.add_middleware(RequestContext, metrics=metrics)
    problems.install(app)
    for module in (predict, calibrate, status):
        app.include_router(module.router)
    declared.install(app)
    return app


def from_environment() -> FastAPI:
    """The app that ``OPENSET_*`` variables describe, with JSON logs."""
    settings = Settings()  # type: ignore[call-arg]  # required fields come from the environment
    configure_logging(settings.log_level)
    return create_app(settings)
