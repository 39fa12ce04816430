"""The HTTP application: routes, their limits, and one shape for every error. Knows no ONNX and no batching.

`create_app(settings)` builds it; importing this file does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import evalmode
from evalmode.service.body import parse_predict, read_body, require_json
from evalmode.service.errors import BodyTooLarge, NotReady, RequestError, RunFailed
from evalmode.service.predictor import Predictor
from evalmode.service.schemas import ErrorResponse, ModelResponse, PredictResponse, StateResponse, request_schema
from evalmode.service.settings import Settings

_log = structlog.get_logger("evalmode.service")

_JSON = "application/json"


def open_predictor(settings: Settings) -> Predictor:
    """The predictor that these settings ask for."""
    return Predictor.open(
        settings.bundle,
        provider=settings.provider,
        threads=settings.threads,
        workers=settings.workers,
        allow_uncertified=settings.allow_uncertified,
    )


def create_app(settings: Settings, *, open_predictor: Callable[[Settings], Predictor] = open_predictor) -> FastAPI:
    """The application. It opens its predictor when it starts and closes it, finishing what was asked, when it stops."""
    app = FastAPI(
        title="evalmode",
        summary="Predictions of a model that was proven to be in eval mode.",
        version=evalmode.__version__,
        docs_url=None,  # FastAPI's pages load their scripts from a CDN: nothing for a server without a way out
        redoc_url=None,
        redirect_slashes=False,  # a redirect answers no POST, and is no error in our form
        lifespan=_lifespan(settings, open_predictor),
    )
    app.state.settings = settings
    app.state.predictor = None
    app.include_router(_routes(settings))
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(ClientDisconnect, _hung_up)
    app.add_exception_handler(Exception, _fail)
    return app


def _lifespan(
    settings: Settings, open_predictor: Callable[[Settings], Predictor]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        predictor = await asyncio.to_thread(open_predictor, settings)
        app.state.predictor = predictor
        yield
        app.state.predictor = None
        await asyncio.to_thread(predictor.close)

    return lifespan


def _routes(settings: Settings) -> APIRouter:
    body = {"schema": request_schema(max_rows=settings.max_rows, max_top_k=settings.max_top_k)}
    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": ErrorResponse}}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 413, 415, 422, 500, 503)
    }
    router = APIRouter(generate_unique_id_function=lambda route: route.name)
    router.add_api_route(
        "/v1/predict",
        _predict,
        methods=["POST"],
        name="predict",
        response_model=PredictResponse,
        responses=refusals,
        # The body is read by hand: within the limit, and with our own sentences for what is wrong with it.
        openapi_extra={"requestBody": {"required": True, "content": {_JSON: body}}},
    )
    router.add_api_route("/v1/model", _model, name="model", response_model=ModelResponse, responses=not_ready)
    router.add_api_route("/livez", _livez, name="livez", response_model=StateResponse)
    router.add_api_route("/readyz", _readyz, name="readyz", response_model=StateResponse, responses=not_ready)
    return router


async def _predict(request: Request) -> Response:
    """Classify texts. The same text gets the same bits, whatever else is asked in this request or beside it."""
    settings: Settings = request.app.state.settings
    predictor = _predictor(request)
    require_json(request.headers.get("content-type"))
    body = await read_body(
        request.stream(),
        declared_bytes=request.headers.get("content-length"),
        max_body_bytes=settings.max_body_bytes,
    )
    asked = parse_predict(body, max_rows=settings.max_rows, max_top_k=settings.max_top_k)
    found = await predictor.predict_async(asked.inputs, top_k=asked.top_k, truncate=asked.truncate)
    return _answer(PredictResponse.of(predictor, found))


async def _model(request: Request) -> Response:
    """What is being served: manifest, certificate, and how its known answers came out on this machine."""
    return _answer(ModelResponse.of(_predictor(request)))


async def _livez() -> Response:
    """Whether this process answers at all."""
    return _answer(StateResponse())


async def _readyz(request: Request) -> Response:
    """Whether predictions can be asked: the bundle is checked and its known answers came out."""
    _predictor(request)
    return _answer(StateResponse(ready=True))


def _predictor(request: Request) -> Predictor:
    predictor: Predictor | None = request.app.state.predictor
    if predictor is None:
        raise NotReady("no model is loaded: the server is starting or stopping")
    return predictor


def _answer(model: PredictResponse | ModelResponse | StateResponse) -> Response:
    # Serialised once, here; numbers are written with as many digits as it takes to read the same bits back.
    return Response(model.model_dump_json(), media_type=_JSON)


def _error(status: int, sentence: str, *, field: str | None = None, headers: dict[str, str] | None = None) -> Response:
    body = ErrorResponse(error=sentence, field=field).model_dump_json()
    return Response(body, status_code=status, media_type=_JSON, headers=headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if isinstance(error, RunFailed):
        _log.error("request failed", path=request.url.path, error=str(error), exc_info=error)
    # What is left of the body is not read, so the connection cannot carry another request.
    headers = {"connection": "close"} if isinstance(error, BodyTooLarge) else None
    return _error(error.status, str(error), field=error.field, headers=headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not answer {request.method}",
    }.get(error.status_code, str(error.detail))
    return _error(error.status_code, sentence, headers=dict(error.headers or {}))


async def _hung_up(request: Request, error: Exception) -> Response:
    return _error(400, "the connection was closed before the whole body came")  # for the record: nobody reads it


async def _fail(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, and the server's log shows it; the caller must not see its inside.
    return _error(500, "the server failed on this request; its log says why")
