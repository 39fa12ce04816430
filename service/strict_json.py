"""JSON of requests, read strictly, and its values as an error's sentence shows them."""

from __future__ import annotations

import json
from typing import Any

from evalmode.service.errors import BadRequest

SHOWN_CHARACTERS = 60


def parse_json(raw: bytes, *, subject: str) -> Any:
    """The JSON value in `raw`. Raises BadRequest, whose sentence begins with `subject`."""
    try:
        # Python's parser, not pydantic's: a lone surrogate escape (half an emoji) is valid JSON and
        # a text to answer.
        return json.loads(raw.decode(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadRequest(f"{subject} is nested too deeply") from error
    except ValueError as error:
        raise BadRequest(f"{subject} is not valid JSON: {error}") from error


def shown(value: object) -> str:
    """The value as JSON, cut where it gets long."""
    if isinstance(value, str):
        value = value[: SHOWN_CHARACTERS + 1]
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def shown_flat(value: object) -> str:
    """The same, but a list or an object is only called so: it may hold a million numbers."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return shown(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
