"""The documentation at /docs, whole without a way out: the page, its scripts and its styles come
from this server.

Knows no route but its own. Files are served by a fixed table, so no path of a request ever names
one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse

from evalmode.service.errors import StartFailed
from evalmode.service.http.security import OPEN_PATHS

PATH = "/docs"

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
# `unsafe-inline` is for styles alone: Swagger UI writes them into its elements.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_CACHED = {"cache-control": "max-age=3600"}
# Every address is relative, so that the page works behind a proxy that adds a prefix.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>evalmode</title>
<link rel="icon" href="docs/static/favicon.png">
<link rel="stylesheet" href="docs/static/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/swagger-ui-bundle.js"></script>
<script src="docs/static/init.js"></script>
</body>
</html>
"""
# validatorUrl: null, or the page would show its schema to a validator on the internet.
_INIT = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
});
"""


def mount(app: FastAPI) -> None:
    """Add /docs to the application. Raises StartFailed when the package with Swagger UI's files is
    not installed.
    """
    folder = _folder()
    app.add_api_route(PATH, _page, include_in_schema=False, response_class=HTMLResponse)
    app.add_api_route(
        f"{PATH}/static/init.js", _init, include_in_schema=False, response_class=Response
    )
    for name, media_type in _ASSETS.items():
        app.add_api_route(
            f"{PATH}/static/{name}",
            _file(folder / name, media_type),
            include_in_schema=False,
            response_class=FileResponse,
            name=name,
        )


def describe_keys(schema: dict[str, Any]) -> None:
    """Add to an OpenAPI schema how an API key is sent: the page then has a button to enter one."""
    schema.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    schema["security"] = [{"bearer": []}, {"header": []}]  # one of them is enough
    for path in OPEN_PATHS & schema["paths"].keys():
        for operation in schema["paths"][path].values():
            operation["security"] = []


def _folder() -> Path:
    found = find_spec("fastapi_offline")  # found and not imported: only its files are wanted
    if found is None or not found.submodule_search_locations:
        raise StartFailed(
            "setting docs wants the package fastapi_offline: pip install fastapi_offline, or"
            " --no-docs"
        )
    return Path(found.submodule_search_locations[0]) / "static"


async def _page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})


async def _init() -> Response:
    return Response(_INIT, media_type="text/javascript", headers=_CACHED)


def _file(path: Path, media_type: str) -> Callable[[], Awaitable[FileResponse]]:
    async def answer() -> FileResponse:
        return FileResponse(path, media_type=media_type, headers=_CACHED)

    return answer
