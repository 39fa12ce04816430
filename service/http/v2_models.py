"""The routes of the Open Inference Protocol v2 that run no model.

They are health, metadata, configuration and statistics, and the repository of models, which can be
listed and changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

import evalmode
from evalmode.bundle.manifest import is_name
from evalmode.service.all_processes import Change
from evalmode.service.components import components_of
from evalmode.service.errors import BadRequest, Forbidden, NotReady, UnknownModel
from evalmode.service.http import health
from evalmode.service.http.body import JSON, read_request_body
from evalmode.service.http.cross_site import refuse_cross_site
from evalmode.service.http.v2_inference import inputs_of, is_batched, outputs_of
from evalmode.service.models.model import Model
from evalmode.service.models.repository import CONTROL_OFF
from evalmode.service.protocol.fields import flag, parameters_of, parse_optional_object
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
from evalmode.service.telemetry.statistics import new_record

_READY = "READY"

# The statuses other than 200, by kind of route.
_ANY = (401,)
_HEALTH = (503,)
_MODEL = (400, 401, 404, 500, 503)
_INDEX = (400, 401, 408, 413, 415)
_CHANGE = (400, 401, 403, 404, 408, 413, 415, 500, 503)


def routes(settings: Settings) -> APIRouter:
    """Health, metadata, configuration, statistics, and the model repository."""
    router = APIRouter(
        generate_unique_id_function=lambda route: route.name, tags=["Open Inference Protocol"]
    )

    def add(
        path: str,
        handler: Callable[..., Any],
        *,
        name: str,
        response: Any,
        statuses: tuple[int, ...] = _ANY,
        body: dict[str, Any] | None = None,
    ) -> None:
        """Add a route: POST if there is the schema of a JSON body, otherwise GET."""
        openapi: dict[str, Any] | None = None
        if body is not None:
            openapi = {"requestBody": {"required": False, "content": {JSON: {"schema": body}}}}
        router.add_api_route(
            path,
            handler,
            methods=["GET" if body is None else "POST"],
            name=name,
            response_model=response,
            responses={status: {"model": ErrorBody} for status in statuses},
            openapi_extra=openapi,
        )

    # Both paths are served: Triton's clients do not follow a redirect from one to the other.
    router.add_api_route("/v2", server_metadata, name="v2", response_model=ServerMetadata)
    router.add_api_route(
        "/v2/",
        server_metadata,
        name="v2_slash",
        response_model=ServerMetadata,
        include_in_schema=False,
    )
    for name, handler in (("live", health.live), ("ready", health.ready)):
        add(
            f"/v2/health/{name}",
            handler,
            name=f"v2_{name}",
            response=ServerState,
            statuses=_HEALTH,
        )

    # Before the routes of one model, which would take "stats" for the name of a model.
    add("/v2/models/stats", all_statistics, name="v2_all_stats", response=ModelStatistics)
    for suffix, version in (("", ""), ("_version", "/versions/{version}")):
        for path, model_handler, name, response in (
            ("", model_metadata, "v2_model", ModelMetadata),
            ("/ready", model_ready, "v2_model_ready", ModelState),
            ("/config", model_configuration, "v2_config", ModelConfig),
            ("/stats", model_statistics, "v2_stats", ModelStatistics),
        ):
            add(
                f"/v2/models/{{model}}{version}{path}",
                model_handler,
                name=f"{name}{suffix}",
                response=response,
                statuses=_MODEL,
            )

    add(
        "/v2/repository/index",
        repository_index,
        name="v2_index",
        response=list[IndexEntry],
        statuses=_INDEX,
        body=INDEX_REQUEST,
    )
    for verb, change in (("load", load_model), ("unload", unload_model)):
        add(
            f"/v2/repository/models/{{model}}/{verb}",
            change,
            name=f"v2_{verb}",
            response=None,
            statuses=_CHANGE,
            body=PARAMETERS_REQUEST,
        )
    return router


async def server_metadata(request: Request) -> Response:
    """The server, and the extensions of the protocol that it implements."""
    return _json_response(ServerMetadata(version=evalmode.__version__))


async def model_metadata(request: Request, model: str, version: str | None = None) -> Response:
    """A model's tensors, and its versions that are served."""
    repository = components_of(request).repository
    served_model = repository.get(model, version)
    return _json_response(
        ModelMetadata(
            name=served_model.name,
            versions=tuple(served.version for served in repository.versions_of(model)),
            inputs=inputs_of(served_model),
            outputs=outputs_of(served_model),
        )
    )


async def model_ready(request: Request, model: str, version: str | None = None) -> Response:
    """Whether a model is ready for requests, which needs a server that is ready."""
    components = components_of(request)
    served_model = components.repository.get(model, version)
    reason = components.health.ready()
    if reason:
        raise NotReady(reason)
    return _json_response(ModelState(name=served_model.name))


async def model_configuration(request: Request, model: str, version: str | None = None) -> Response:
    """A model's configuration, as Triton's clients read it."""
    components = components_of(request)
    served_model = components.repository.get(model, version)
    return _json_response(
        model_config(
            name=served_model.name,
            digest=served_model.digest,
            known_answers=str(served_model.replayed or "not replayed"),
            inputs=inputs_of(served_model),
            outputs=outputs_of(served_model),
            are_inputs_optional=served_model.is_text,
            is_batched=is_batched(served_model),
            versions=components.settings.versions,
            max_rows=components.settings.max_rows,
        )
    )


async def model_statistics(request: Request, model: str, version: str | None = None) -> Response:
    """Counts and times of a model's requests; without a version, of each version that is served."""
    repository = components_of(request).repository
    if version is None:
        return await _statistics_response(request, repository.versions_of(model))
    return await _statistics_response(request, [repository.get(model, version)])


async def all_statistics(request: Request) -> Response:
    """Counts and times of the requests of all models."""
    return await _statistics_response(request, components_of(request).repository.models())


async def _statistics_response(request: Request, models: Sequence[Model]) -> Response:
    """The records of these models, added up over all processes of the server."""
    records = await components_of(request).processes.figures("statistics")
    by_version = {(record["name"], record["version"]): record for record in records}
    model_stats = []
    for model in models:
        record = by_version.get((model.name, model.version))
        model_stats.append(record or new_record(model.name, model.version))
    return _json_response(ModelStatistics(model_stats=tuple(model_stats)))


async def repository_index(request: Request) -> Response:
    """The model versions of the repository and their states.

    With `"ready": true` these are only the versions that are ready for requests.
    """
    components = components_of(request)
    body = await read_request_body(request, components.settings)
    only_ready = flag(parse_optional_object(body, allowed=("ready",)), "ready", default=False)
    entries: list[dict[str, Any]] = []
    for entry in components.repository.index():
        if entry.state == _READY or not only_ready:
            record = IndexEntry(
                name=entry.name, version=entry.version, state=entry.state, reason=entry.reason
            )
            entries.append(record.model_dump())
    return Response(json.dumps(entries), media_type=JSON)


async def load_model(request: Request, model: str) -> Response:
    """Load a model's newest versions from the repository, also if some are loaded already."""
    return await _change_repository(request, model, "load")


async def unload_model(request: Request, model: str) -> Response:
    """Unload a model: accepted requests are answered, and later ones are refused."""
    return await _change_repository(request, model, "unload")


async def _change_repository(request: Request, model: str, change: Change) -> Response:
    """Apply `change` to the model of this name in every process, unless the request may not do
    that.

    It is refused, in this order, with

    1. 403 where the settings allow no changes by requests;
    2. 403 or 415 where a page of another site may have sent it;
    3. 404 for a name that no model can have;
    4. 400 for a body with anything but the one parameter that the protocol has here.
    """
    components = components_of(request)
    settings = components.settings
    if not settings.model_control:
        raise Forbidden(CONTROL_OFF)
    refuse_cross_site(request, settings)
    # The name becomes a path: nothing but a plain name may reach the file system.
    if not is_name(model):
        raise UnknownModel(f"no model can be called {shown(model)}")
    body = await read_request_body(request, settings)
    parameters = parameters_of(parse_optional_object(body, allowed=("parameters",)))
    for key in parameters:
        # Triton also takes the files of a model and its configuration here.
        if key != "unload_dependents":
            raise BadRequest(
                f"parameters.{shown_key(key)}: a model is served as its bundle defines it,"
                " which no request can override",
                field=f"parameters.{shown_key(key)}",
            )
    flag(parameters, "unload_dependents", default=False, path="parameters")
    await components.processes.change(change, model)
    return Response(b"{}", media_type=JSON)


def _json_response(record: BaseModel) -> Response:
    """The record without the fields that are null, as Triton's clients expect."""
    return Response(record.model_dump_json(exclude_none=True), media_type=JSON)
