"""The routes of the server, and the middleware around them.

From outside in, a request passes traces, `middleware.py` (its id, log line, metrics and headers),
CORS, `api_keys.py` and `head.py`. The handlers are in `v1.py`, `v2.py`, `v2_models.py`, `health.py`
and `docs.py`. Errors of `service/errors.py` are raised where they are noticed, and `service/app.py`
turns them into responses. By status, a request is refused in these files:

    400  v1_request.py, v2_inference.py, v2_models.py, deadline.py, ../protocol/, ../strict_json.py;
         middleware.py for CORS
    401  api_keys.py
    403  cross_site.py, v2_models.py, ../models/repository.py
    404  v2_models.py, ../models/repository.py; ../app.py for a path without a route
    405  ../app.py
    408  body.py
    413  body.py, ../batching/
    415  body.py, cross_site.py, ../protocol/compression.py
    422  v1_request.py, v1.py, ../models/; in /v2 it becomes 400
    500  v2_inference.py, ../models/, ../batching/; middleware.py and ../app.py for a crash
    503  health.py, v2_models.py, ../models/repository.py, ../batching/
    504  ../batching/
"""

from evalmode.service.lean_imports import deferred_models

# FastAPI builds the models of an OpenAPI document when it is imported, which takes a fifth of its
# import. They are used for /openapi.json alone, and now built for its first request.
with deferred_models():
    import fastapi  # noqa: F401
