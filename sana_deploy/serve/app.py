"""The routes of the images API on FastAPI, over any engine."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from .._version import __version__
from .engine import Drawn, Progress
from .gate import GONE, Gate, is_local
from .metrics import MEDIA_TYPE
from .openai import ApiError, ImagesRequest, event, remark_texts
from .orders import Placed
from .page import page
from .pictures import as_data, encoded
from .service import ClientGoneError, Service, answer_to, heard

_FILES = ("image", "image[]")
_SILENCE = 10.0
"""Seconds after which a stream says that it still works."""


def build(service: Service) -> Gate:
    """Make the application of a service, behind its gate."""
    app = FastAPI(title="sana_deploy", version=__version__, docs_url=None, redoc_url=None)
    _add_drawing(app, service)
    _add_models(app, service)
    _add_standing(app, service)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    for gone in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(gone, _on_gone)
    app.add_exception_handler(Exception, _on_defect)
    paths = [str(getattr(route, "path", "")) for route in app.routes]
    options = service.options
    return Gate(
        app,
        keys=service.keys,
        routes=[path for path in paths if "{" not in path],
        max_body=options.max_body_bytes,
        receive_timeout=options.receive_timeout,
        local=is_local(options.host),
        answered=service.metrics.answered,
    )


async def _on_api_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, ApiError)
    return JSONResponse(problem.body, problem.status, problem.headers)


async def _on_http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    said = {404: f"there is nothing at {request.url.path!r:.120}", 405: f"{request.method} is not for this path"}
    error = ApiError(problem.status_code, said.get(problem.status_code, str(problem.detail)), headers=problem.headers)
    return await _on_api_error(request, error)


async def _on_gone(request: Request, problem: Exception) -> Response:
    return Response(status_code=GONE)  # nobody reads it


async def _on_defect(request: Request, problem: Exception) -> Response:
    name = request.state.request_id  # the gate logs the traceback
    error = ApiError(500, f"an unexpected failure; the service's log has it under request {name}", "internal_error")
    return await _on_api_error(request, error)


def _add_drawing(app: FastAPI, service: Service) -> None:
    """The routes that draw."""
    schema = ImagesRequest.model_json_schema()
    fields = {**schema["properties"], "image": {"type": "string", "format": "binary"}}
    as_json = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    form = {"type": "object", "properties": fields, "required": ["prompt", "image"]}
    as_form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}

    @app.post("/v1/images/generations", openapi_extra=as_json)
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt, and of `control_image` where the pipeline takes one and it is there."""
        with service.uploading():
            asked = ImagesRequest.read(await _json(request))
        return await _answer(service, request, asked, None, "image_generation")

    @app.post("/v1/images/edits", openapi_extra=as_form)
    async def edits(request: Request) -> Response:
        """Draw pictures of a prompt and of the file `image`, where the pipeline takes one."""
        with service.uploading():
            fields, image = await _form(request, service.options.max_body_bytes)
        return await _answer(service, request, ImagesRequest.read_form(fields), image, "image_edit")


def _add_models(app: FastAPI, service: Service) -> None:
    """The routes that tell what is served."""
    bounds, image = service.orders.defaults, service.plan.pipeline.image
    model = {
        "id": service.orders.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sana_deploy",
        "plan": service.plan.digest,
        "size": f"{bounds.width}x{bounds.height}",
        "steps": bounds.steps,
        "pipeline": service.plan.pipeline_class,
        "image": image and {"title": image.title, "optional": image.optional},
    }

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model of this service."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def named(name: str) -> Response:
        """The model of this name."""
        if name != model["id"]:
            raise ApiError(404, f"there is no model {name!r:.80} here", "model_not_found", "model")
        return JSONResponse(model)

    @app.get("/plan")
    async def plan() -> Response:
        """The plan that is served, as plan.json."""
        return Response(service.plan.to_json(), media_type="application/json")


def _add_standing(app: FastAPI, service: Service) -> None:
    """The routes that tell how the service stands, and the page."""
    html = page()

    @app.get("/health")
    async def health() -> Response:
        """That the process is alive."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are drawn: 503 while it loads and once it is stopping."""
        now = service.engine.standing
        ready = now.ready > 0 and not now.draining
        state = "ready" if ready else "stopping" if now.draining else "loading"
        return JSONResponse({"status": state, "replicas": now.ready, "of": now.replicas}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=MEDIA_TYPE)

    @app.get("/")
    async def root() -> Response:
        """A page to try it."""
        return HTMLResponse(html.text, headers={"Content-Security-Policy": html.policy})


async def _json(request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, got {kind!r:.80}", "wrong_content_type")
    body = await request.body()
    try:
        return await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as problem:
        raise ApiError(400, f"the body is no JSON: {str(problem)[:120]}", "invalid_json") from None


async def _form(request: Request, max_body: int) -> tuple[dict[str, str], bytes]:
    """The fields of a form, and the one file in it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, f"the body must be multipart/form-data, got {kind!r:.80}", "wrong_content_type")
    fields: dict[str, str] = {}
    files: list[bytes] = []
    try:
        async with request.form(max_files=4, max_fields=64, max_part_size=max_body) as form:
            for key, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if key not in _FILES:
                        raise ApiError(400, f"a file {key[:64]!r} is not taken; send image", "invalid_value", key[:64])
                    files.append(await value.read())
                elif key in fields or key in _FILES:
                    rule = "must be a file" if key in _FILES else "is given twice"
                    raise ApiError(400, f"{key[:64]} {rule}", "invalid_value", key[:64])
                else:
                    fields[key] = value
    except MultiPartException as problem:
        raise ApiError(400, f"the form cannot be read: {problem.message[:120]}", "invalid_form") from None
    if len(files) != 1:
        raise ApiError(400, f"one file image is needed, {len(files)} were sent", "missing_parameter", "image")
    return fields, files[0]


async def _answer(service: Service, request: Request, asked: ImagesRequest, image: bytes | None, kind: str) -> Response:
    """Draw what is asked for and answer with it, in one piece or as it comes."""
    name = request.state.request_id
    placed = await asyncio.to_thread(service.orders.place, name, asked, image)
    if not asked.stream:
        drawn = await service.draw(placed.order, request.receive)
        return JSONResponse(await asyncio.to_thread(_whole, placed, drawn))
    news = heard(lambda told: service.draw(placed.order, request.receive, told), _SILENCE)
    first = await anext(news)  # what is refused is answered with its status, before the stream begins
    return StreamingResponse(_events(placed, first, news, kind), media_type="text/event-stream")


def _common(placed: Placed) -> dict[str, Any]:
    """What every answer says of its pictures."""
    settings = placed.order.settings
    size = f"{settings.width}x{settings.height}"
    return {"output_format": placed.asked.output_format, "size": size, "background": "opaque", "quality": "auto"}


def _files(placed: Placed, drawn: Sequence[Drawn]) -> list[bytes]:
    asked = placed.asked
    return [
        encoded(one.picture, asked.output_format, asked.output_compression, placed.facts_of(number, one.batch))
        for number, one in enumerate(drawn)
    ]


def _own(placed: Placed, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """What we say beyond OpenAI's keys."""
    remarks = dict.fromkeys(remark_texts([*placed.remarks, *(remark for one in drawn for remark in one.remarks)]))
    return {
        "plan": placed.facts["plan"],
        "seeds": [content.seed for content in placed.order.contents],
        "queue_seconds": round(max(one.waited for one in drawn), 3),
        "seconds": dict(drawn[0].seconds),
        "batch": drawn[0].batch,
        "remarks": list(remarks),
    }


def _whole(placed: Placed, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """The answer in one piece; encodes pictures, so call it in a thread."""
    data = as_data(_files(placed, drawn), placed.asked)
    return {"created": int(time.time()), "data": data, **_common(placed), "sana_deploy": _own(placed, drawn)}


async def _events(placed: Placed, first: Any, news: AsyncIterator[Any], kind: str) -> AsyncIterator[bytes]:
    """The answer as it comes: previews and pictures as events, steps as comments, which clients skip."""
    shown: dict[int, int] = {}
    asked, common = placed.asked, {**_common(placed), "created_at": int(time.time())}
    try:
        yield b": accepted\n\n"
        while True:
            match first:
                case None:
                    yield b": waiting\n\n"
                case Progress(number=number, done=done, steps=steps, preview=preview):
                    yield f": step {done} of {steps}, picture {number}\n\n".encode()
                    if preview is not None:
                        facts = {**placed.facts_of(number, 1), "unfinished_after_step": done}
                        content = await asyncio.to_thread(encoded, preview, asked.output_format, 90, facts)
                        index = shown[number] = shown.get(number, -1) + 1
                        picture = {"b64_json": base64.b64encode(content).decode(), "partial_image_index": index}
                        yield event(f"{kind}.partial_image", {**picture, **common})
                case drawn:
                    for number, content in enumerate(await asyncio.to_thread(_files, placed, drawn)):
                        picture = {"b64_json": base64.b64encode(content).decode()}
                        own = {**_own(placed, drawn), "number": number}
                        yield event(f"{kind}.completed", {**picture, **common, "sana_deploy": own})
                    return
            first = await anext(news)
    except ClientGoneError:
        return
    except Exception as problem:
        yield event("error", answer_to(problem, placed.order.name).body)
