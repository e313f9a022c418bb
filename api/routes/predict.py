"""``/predict``: a label or "unknown"."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request

from api.deps import RequestId, ServiceDep, admitted, requires
from api.image_input import check_header, read_images
from api.problems import Problem
from api.schemas import BatchAnswer, BatchItem, PredictAnswer
from api.service import Wish

router = APIRouter(tags=["predict"], dependencies=[Depends(requires("predict")), Depends(admitted)])

_BATCH_CONCURRENCY = 16

_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")


def _body_of(field: str, *, several: bool) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    form = {"type": "array", "items": binary} if several else binary
    content: dict[str, Any] = {
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {field: form}, "required": [field]}
        }
    }
    if not several:
        content |= {media_type: {"schema": binary} for media_type in _IMAGE_TYPES}
    return {"requestBody": {"required": True, "content": content}}


def get_wish(
    service: ServiceDep,
    model: Annotated[
        str | None, Query(description="name of the served model; another one is refused")
    ] = None,
    fpr: Annotated[
        float | None, Query(gt=0, lt=1, description="target for this request only")
    ] = None,
    top_k: Annotated[int, Query(ge=1, le=1000)] = 5,
    angles: Annotated[Literal["all"] | None, Query(description="angles to all classes")] = None,
) -> Wish:
    """The query of a prediction."""
    if model is not None and model != service.settings.model_name:
        raise Problem(
            "not-found", f"this gateway serves {service.settings.model_name!r}, not {model[:100]!r}"
        )
    return Wish(fpr=fpr, top_k=top_k, all_angles=angles == "all")


WishDep = Annotated[Wish, Depends(get_wish)]


@router.post("/predict", openapi_extra=_body_of("image", several=False))
async def predict(
    request: Request, service: ServiceDep, wish: WishDep, request_id: RequestId
) -> PredictAnswer:
    """Classify one image: the raw body, or the multipart field ``image``."""
    images = await read_images(request, service.settings, field="image", most=1)
    check_header(images[0], service.settings.max_pixels)
    return await service.predict(images[0], wish, request_id)


@router.post("/predict/batch", openapi_extra=_body_of("images", several=True))
async def predict_batch(
    request: Request, service: ServiceDep, wish: WishDep, request_id: RequestId
) -> BatchAnswer:
    """Classify several images of the multipart field ``images``; one result or one problem each, in order."""
    images = await read_images(
        request, service.settings, field="images", most=service.settings.max_batch_images
    )
    places = asyncio.Semaphore(_BATCH_CONCURRENCY)

    async def one(number: int, image: bytes) -> BatchItem:
        own_id = f"{request_id}-{number}"
        try:
            async with places:
                check_header(image, service.settings.max_pixels)
                return BatchItem(status=200, result=await service.predict(image, wish, own_id))
        except Problem as problem:
            return BatchItem(status=problem.status, problem=problem.document(own_id))

    results = await asyncio.gather(*(one(number, image) for number, image in enumerate(images)))
    return BatchAnswer(results=list(results), request_id=request_id)
