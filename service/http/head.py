"""HEAD for each route that has GET: the same status and headers, without a body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class AnswerHead:
    """Middleware that answers HEAD as the application answers GET, without the body.

    FastAPI adds no HEAD to its routes, and a second route for each would be in the OpenAPI schema.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything but HEAD is passed on unchanged."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # A copy, because the server reads the method in the original: a response to HEAD has no
        # body that it has to wait for.
        get_scope = {**scope, "method": "GET"}
        try:
            await self._app(get_scope, receive, send_without_body)
        finally:
            # What the application has added, as the route, is needed for logs and metrics.
            for name, value in get_scope.items():
                scope.setdefault(name, value)
