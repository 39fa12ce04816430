"""The documentation at /docs, which works without a connection to the internet.

The page, its scripts and its styles come from this server. The files are in a fixed table, so the
path of a request never becomes the path of a file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse

from evalmode.service.errors import StartFailed
from evalmode.service.health import PROBE_PATHS

PATH = "/docs"

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
# `unsafe-inline` is for styles alone, because Swagger UI writes styles into its elements.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_CACHED = {"cache-control": "max-age=3600"}
# All addresses are relative, so that the page also works behind a proxy that adds a prefix.
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
# Without `validatorUrl: null` the page would send its schema to a validator on the internet.
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
    """Add /docs to the application.

    Raises StartFailed if the package with the files of Swagger UI is not installed.
    """

    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})

    async def init() -> Response:
        return Response(_INIT, media_type="text/javascript", headers=_CACHED)

    def file_handler(path: Path, media_type: str) -> Callable[[], Awaitable[FileResponse]]:
        async def file() -> FileResponse:
            return FileResponse(path, media_type=media_type, headers=_CACHED)

        return file

    # The package is located and not imported: only its files are needed.
    package = find_spec("fastapi_offline")
    if package is None or not package.submodule_search_locations:
        raise StartFailed(
            "setting docs needs the package fastapi_offline: pip install fastapi_offline, or"
            " --no-docs"
        )
    folder = Path(package.submodule_search_locations[0]) / "static"

    app.add_api_route(PATH, page, include_in_schema=False, response_class=HTMLResponse)
    app.add_api_route(
        f"{PATH}/static/init.js", init, include_in_schema=False, response_class=Response
    )
    for name, media_type in _ASSETS.items():
        app.add_api_route(
            f"{PATH}/static/{name}",
            file_handler(folder / name, media_type),
            include_in_schema=False,
            response_class=FileResponse,
            name=name,
        )


def describe_keys(schema: dict[str, Any]) -> None:
    """Add to an OpenAPI schema how an API key is sent, so that the page has a button for it."""
    schema.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    # A list in OpenAPI means that one of them is enough.
    schema["security"] = [{"bearer": []}, {"header": []}]
    for path in PROBE_PATHS & schema["paths"].keys():
        for operation in schema["paths"][path].values():
            operation["security"] = []
