"""The model, health, metrics and the playground page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter, Depends, Response
from fastapi.responses import HTMLResponse

from api.declared import KEYS, PATH, problems_of_route
from api.deps import ServiceDep, requires
from api.schemas import Alive, ModelAnswer, Ready

router = APIRouter(tags=["status"])

_PAGE_POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'"
)


@router.get(
    "/model", dependencies=[Depends(requires("predict"))], responses=problems_of_route(*KEYS)
)
async def model(service: ServiceDep) -> ModelAnswer:
    """Model card, weights' digest and calibrated paths."""
    from dataclasses import asdict

    return ModelAnswer(
        card=asdict(service.model.card),
        sha256=service.model.sha256,
        serving_path=service.path,
        calibrated_paths=sorted(service.model.score_sets),
    )


@router.get("/livez", responses=problems_of_route())
async def livez() -> Alive:
    """The process answers."""
    return Alive()


@router.get("/readyz", responses=problems_of_route(*PATH, "not-calibrated"))
async def readyz(service: ServiceDep) -> Ready:
    """A prediction was seen moments ago, or a canary is sent now; the path must be calibrated, the store answer."""
    path, calibration = await service.ready()
    return Ready(path=path, calibration_id=calibration.id)


@router.get("/metrics", include_in_schema=False)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus exposition."""
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@cache
def _page() -> str:
    return (Path(__file__).parents[1] / "page.html").read_text()


@router.get("/", include_in_schema=False)
async def playground() -> HTMLResponse:
    """A page to try the model by hand; everything it needs is in it."""
    return HTMLResponse(_page(), headers={"content-security-policy": _PAGE_POLICY})
