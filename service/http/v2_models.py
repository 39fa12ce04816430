"""The routes of the Open Inference Protocol v2 that ask nothing of a model: health, metadata,
statistics, repository.

Knows no ONNX, no batching and no tensors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

import evalmode
from evalmode.bundle.manifest import is_name
from evalmode.service.components import Components, components_of
from evalmode.service.errors import BadRequest, Conflict, Forbidden, NotReady, UnknownModel
from evalmode.service.http import health
from evalmode.service.http.body import JSON, read_request
from evalmode.service.http.own_pages import require_own_request
from evalmode.service.http.v2_inference import inputs_of, is_batched, outputs_of
from evalmode.service.models.model import Model
from evalmode.service.models.repository import CONTROL_OFF, Repository
from evalmode.service.protocol.fields import flag, parameters_of, parse_optional
from evalmode.service.protocol.metadata import (
    ErrorBody,
    IndexEntry,
    ModelConfig,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    ServerMetadata,
    ServerState,
    model_config,
)
from evalmode.service.protocol.schemas import INDEX_REQUEST, PARAMETERS_REQUEST
from evalmode.service.settings import Settings
from evalmode.service.strict_json import shown, shown_key

_READY = "READY"
_OF_A_MODEL = (400, 401, 404, 500, 503)


def routes(settings: Settings) -> APIRouter:
    """Health, metadata, configuration, statistics, and the model repository."""
    router = APIRouter(
        generate_unique_id_function=lambda route: route.name, tags=["Open Inference Protocol"]
    )
    # both: a redirect is no answer to these clients
    for name, path in (("v2", "/v2"), ("v2_slash", "/v2/")):
        router.add_api_route(
            path, _server, name=name, response_model=ServerMetadata, include_in_schema=path == "/v2"
        )
    _add(router, "v2_live", "/v2/health/live", health.live, ServerState, statuses=(503,))
    _add(router, "v2_ready", "/v2/health/ready", health.ready, ServerState, statuses=(503,))
    _add(router, "v2_all_stats", "/v2/models/stats", _all_stats, ModelStatistics)
    for suffix, path in (("", ""), ("_version", "/versions/{version}")):
        model = f"/v2/models/{{model}}{path}"
        _add(router, f"v2_model{suffix}", model, _metadata, ModelMetadata, statuses=_OF_A_MODEL)
        _add(
            router,
            f"v2_model_ready{suffix}",
            f"{model}/ready",
            _model_ready,
            ModelState,
            statuses=_OF_A_MODEL,
        )
        _add(
            router,
            f"v2_config{suffix}",
            f"{model}/config",
            _config,
            ModelConfig,
            statuses=_OF_A_MODEL,
        )
        _add(
            router,
            f"v2_stats{suffix}",
            f"{model}/stats",
            _stats,
            ModelStatistics,
            statuses=_OF_A_MODEL,
        )
    _add_repository(router)
    return router


def _add_repository(router: APIRouter) -> None:
    changes = (400, 401, 403, 404, 408, 409, 413, 415, 500, 503)
    index = (400, 401, 408, 413, 415)
    _add(
        router,
        "v2_index",
        "/v2/repository/index",
        _index,
        list[IndexEntry],
        statuses=index,
        takes=INDEX_REQUEST,
    )
    for name, handler in (("load", _load), ("unload", _unload)):
        path = f"/v2/repository/models/{{model}}/{name}"
        _add(router, f"v2_{name}", path, handler, None, statuses=changes, takes=PARAMETERS_REQUEST)


def _add(
    router: APIRouter,
    name: str,
    path: str,
    handler: Callable[..., Any],
    answer: Any,
    *,
    statuses: tuple[int, ...] = (401,),
    takes: dict[str, Any] | None = None,
) -> None:
    body = (
        None
        if takes is None
        else {"requestBody": {"required": False, "content": {JSON: {"schema": takes}}}}
    )
    router.add_api_route(
        path,
        handler,
        methods=["GET" if body is None else "POST"],
        name=name,
        response_model=answer,
        responses={status: {"model": ErrorBody} for status in statuses},
        openapi_extra=body,
    )


async def _server(request: Request) -> Response:
    """The server, and the extensions of the protocol that it speaks."""
    return _answer(ServerMetadata(version=evalmode.__version__))


async def _metadata(request: Request, model: str, version: str | None = None) -> Response:
    """A model's tensors, and the versions of it that are served."""
    repository = components_of(request).repository
    served_model = repository.get(model, version)
    versions = tuple(other.version for other in repository.versions_of(model))
    return _answer(
        ModelMetadata(
            name=served_model.name,
            versions=versions,
            inputs=inputs_of(served_model),
            outputs=outputs_of(served_model),
        )
    )


async def _model_ready(request: Request, model: str, version: str | None = None) -> Response:
    """Whether a model can be asked; also the server must be ready."""
    components = components_of(request)
    served_model = components.repository.get(model, version)
    if reason := components.health.ready():
        raise NotReady(reason)
    return _answer(ModelState(name=served_model.name))


async def _config(request: Request, model: str, version: str | None = None) -> Response:
    """A model's configuration as Triton's clients read it."""
    components = components_of(request)
    served_model = components.repository.get(model, version)
    return _answer(
        model_config(
            name=served_model.name,
            digest=served_model.digest,
            known_answers=str(served_model.replayed or "not replayed"),
            inputs=inputs_of(served_model),
            outputs=outputs_of(served_model),
            alternatives=served_model.is_text,
            batched=is_batched(served_model),
            versions=components.settings.versions,
            max_rows=components.settings.max_rows,
        )
    )


async def _stats(request: Request, model: str, version: str | None = None) -> Response:
    """What was asked of a model, and how long it took; of every version that is served, where none
    is named.
    """
    components = components_of(request)
    repository = components.repository
    models = repository.versions_of(model) if version is None else (repository.get(model, version),)
    return _figures(components, models)


async def _all_stats(request: Request) -> Response:
    """The same of all models."""
    components = components_of(request)
    return _figures(components, components.repository.models())


async def _index(request: Request) -> Response:
    """The model versions of the repository and their states; with `"ready": true` only those that
    can be asked.
    """
    components = components_of(request)
    body = await read_request(request, components.settings)
    only_ready = flag(parse_optional(body, known=("ready",)), "ready", default=False)
    entries = [
        IndexEntry(
            name=entry.name, version=entry.version, state=entry.state, reason=entry.reason
        ).model_dump()
        for entry in components.repository.index()
        if not only_ready or entry.state == _READY
    ]
    return Response(json.dumps(entries), media_type=JSON)


async def _load(request: Request, model: str) -> Response:
    """Load a model's newest versions from the repository, or look again at what stands there."""
    repository = await _controlled(request, model)
    async with _turn(request):
        await asyncio.to_thread(repository.load, model)
    return Response(b"{}", media_type=JSON)


async def _unload(request: Request, model: str) -> Response:
    """Let go of a model: its requests are answered, further ones find nothing, until it is loaded
    again.
    """
    repository = await _controlled(request, model)
    async with _turn(request):
        await asyncio.to_thread(repository.unload, model)
    return Response(b"{}", media_type=JSON)


async def _controlled(request: Request, model: str) -> Repository:
    """The repository, where this request may change it. Raises RequestError, saying what to do
    instead.
    """
    components = components_of(request)
    settings = components.settings
    if not settings.model_control:
        raise Forbidden(CONTROL_OFF)
    require_own_request(request, settings)
    if settings.workers > 1:
        raise Conflict(
            f"one of {settings.workers} workers cannot load or unload for the others: every worker"
            " polls the folder of bundles, put a new version there, or take one away"
        )
    if not is_name(model):  # nothing else is ever looked for in the file system
        raise UnknownModel(f"no model can be called {shown(model)}")
    fields = parse_optional(await read_request(request, settings), known=("parameters",))
    parameters = parameters_of(fields, field="parameters")
    for key in parameters:
        if key != "unload_dependents":
            raise BadRequest(
                f"parameters.{shown_key(key)}: a model is served as its bundle says it, which no"
                " request can override",
                field=f"parameters.{shown_key(key)}",
            )
    flag(parameters, "unload_dependents", default=False, field="parameters")
    return components.repository


def _figures(components: Components, models: Sequence[Model]) -> Response:
    figures = tuple(components.statistics.of(model.name, model.version) for model in models)
    return _answer(ModelStatistics(model_stats=figures))


def _turn(request: Request) -> asyncio.Lock:
    """One change of the repository at a time: others would wait in threads, and requests need these
    to be read in.
    """
    turn: asyncio.Lock = request.app.state.repository_turn
    return turn


def _answer(record: BaseModel) -> Response:
    return Response(record.model_dump_json(exclude_none=True), media_type=JSON)
