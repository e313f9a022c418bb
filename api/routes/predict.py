"""``/predict``: a label or "unknown"."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from api.declared import KEYS, POINT, UPLOAD, problems_of_route
from api.deps import ServiceDep, permit
from api.image_input import check_header, read_images, size_to_expect
from api.problems import Problem, request_id_of
from api.schemas import BatchAnswer, BatchItem, PredictAnswer
from api.service import Service, Wish

_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")


class DirectRoute(APIRoute):
    """A route that FastAPI documents and routes to, and nothing else.

    Its endpoint is called with the request, the service and the checked query, and returns the response itself. Solving
    FastAPI's dependencies and checking the answer a second time took most of the gateway's time a request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, in place of FastAPI's."""
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            service: Service = request.app.state.service
            permit(request, service, "predict")
            response: Response = await endpoint(request, service, _wish(request, service))
            return response

        return handle


router = APIRouter(
    tags=["predict"],
    route_class=DirectRoute,
    responses=problems_of_route(*KEYS, *UPLOAD, *POINT, "own-target-refused", "not-found"),
)


def _wish(request: Request, service: Service) -> Wish:
    if not request.scope["query_string"]:
        return Wish()
    try:
        wish = Wish.model_validate(dict(request.query_params))
    except ValidationError as error:
        errors = [{**item, "loc": ("query", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(errors) from error
    if wish.model is not None and wish.model != service.settings.model_name:
        raise Problem(
            "not-found",
            f"this gateway serves {service.settings.model_name!r}, not {wish.model[:100]!r}",
        )
    if wish.fpr is not None and service.settings.request_fpr == "refuse":
        raise Problem(
            "own-target-refused",
            "this gateway decides by its own operating point alone (OPENSET_REQUEST_FPR=refuse), got fpr; leave fpr out, or "
            "have the operating point changed: POST /calibrate?fpr=<rate>",
        )
    return wish


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


def _json(answer: BaseModel) -> Response:
    return Response(answer.__pydantic_serializer__.to_json(answer), media_type="application/json")


@router.post(
    "/predict", response_model=PredictAnswer, openapi_extra=_body_of("image", several=False)
)
async def predict(
    request: Request, service: ServiceDep, wish: Annotated[Wish, Query()]
) -> Response:
    """Classify one image: the raw body, or the multipart field ``image``."""
    limit = service.settings.max_form_bytes(1)
    service.admission.check()  # before megabytes are read for nothing
    with service.upload(size_to_expect(request, limit)):
        images = await read_images(request, service.settings, field="image", most=1)
        check_header(images[0], service.settings.max_pixels)
        # Only now: a slow upload keeps nobody waiting at the model.
        with service.place():
            return _json(await service.predict(images[0], wish, request_id_of(request)))


@router.post(
    "/predict/batch", response_model=BatchAnswer, openapi_extra=_body_of("images", several=True)
)
async def predict_batch(
    request: Request, service: ServiceDep, wish: Annotated[Wish, Query()]
) -> Response:
    """Classify several images of the multipart field ``images``; one result or one problem each, in order.

    The images are admitted together or refused together: the model server gets them at once and batches them.
    """
    request_id, settings = request_id_of(request), service.settings
    limit = settings.max_form_bytes(settings.max_batch_images)
    service.admission.check()  # before megabytes are read for nothing
    with service.upload(size_to_expect(request, limit)):
        images = await read_images(
            request, settings, field="images", most=settings.max_batch_images
        )

        async def one(number: int, image: bytes) -> BatchItem:
            own_id = f"{request_id}-{number}"
            try:
                check_header(image, settings.max_pixels)
                return BatchItem(status=200, result=await service.predict(image, wish, own_id))
            except Problem as problem:
                return BatchItem(status=problem.status, problem=problem.document(own_id))

        with service.place(len(images)):
            results = await asyncio.gather(
                *(one(number, image) for number, image in enumerate(images))
            )
    return _json(BatchAnswer(results=list(results), request_id=request_id))
