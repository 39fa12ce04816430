"""A short way to the routes of inference: past Starlette's middleware and FastAPI's routing.

FastAPI's way through its middleware, router, dependencies and error pages takes longer than a small
model runs. The short way calls the same handlers, and the same handlers answer their errors. What
it does not recognise goes to FastAPI, which knows these routes too and documents them.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterable

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class DirectRoutes:
    """Middleware that calls the handlers of some POST routes of `application` directly.

    A handler takes the request and the parameters of its path, and returns a response. The requests
    of all other routes go to `app`.
    """

    def __init__(self, app: ASGIApp, application: FastAPI, routes: Iterable[APIRoute]) -> None:
        self._app = app
        self._application = application
        self._fixed: dict[str, APIRoute] = {}
        self._patterns: list[tuple[re.Pattern[str], APIRoute]] = []
        for route in routes:
            if "{" in route.path:
                self._patterns.append((route.path_regex, route))
            else:
                self._fixed[route.path] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        route: APIRoute | None = None
        parameters: dict[str, str] = {}
        # A server below a prefix has the prefix in its paths. FastAPI removes it.
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            path = scope["path"]
            route = self._fixed.get(path)
            if route is None:
                for pattern, pattern_route in self._patterns:
                    match = pattern.match(path)
                    if match is not None:
                        route, parameters = pattern_route, match.groupdict()
                        break
        if route is None:
            await self._app(scope, receive, send)
            return

        # As FastAPI does: the log and the metrics show the path of the route.
        scope["route"] = route
        scope["path_params"] = parameters
        request = Request(scope, receive, send)
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            response = await route.endpoint(request, **parameters)
            await response(scope, receive, send_and_note)
        except Exception as error:
            # A status that is sent cannot be replaced.
            if has_started:
                raise
            handlers = self._application.exception_handlers
            error_class = next(kind for kind in type(error).__mro__ if kind in handlers)
            answering = handlers[error_class](request, error)
            # Starlette allows handlers that are plain functions; ours are coroutines.
            response = await answering if isinstance(answering, Awaitable) else answering
            await response(scope, receive, send)
            # As Starlette does after its page for an unexpected error: the log gets the traceback.
            if error_class is Exception:
                raise
