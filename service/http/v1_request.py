"""A request to /v1/predict: its query and its JSON body.

Both may hold the options of a prediction, but an option may not be in both. With lines as the body
the options are in the query alone. Each mistake is a sentence that names the field and the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from evalmode.service.errors import InvalidField
from evalmode.service.http.v1_schemas import PredictRequest
from evalmode.service.settings import setting_named
from evalmode.service.strict_json import parse_json, shown, shown_key, whole_number


@dataclass(frozen=True, kw_only=True)
class PredictQuery:
    """The options of a prediction in a query; None for one that is not there."""

    top_k: int | None = None
    truncate: bool | None = None
    model: str | None = None
    version: str | None = None


NO_OPTIONS = PredictQuery()


def parse_predict_query(items: Iterable[tuple[str, str]], *, max_top_k: int) -> PredictQuery:
    """The query with these parameters. Raises InvalidField, naming the parameter and its value."""
    names = [field.name for field in fields(PredictQuery)]
    parameters = unique_parameters(items, allowed=names)

    top_k: int | None = None
    if "top_k" in parameters:
        top_k = whole_number(parameters["top_k"])
        if top_k is None or not 1 <= top_k <= max_top_k:
            raise InvalidField(
                f"top_k must be an integer from 1 to {max_top_k}, got {shown(parameters['top_k'])}",
                field="top_k",
            )
    truncate: bool | None = None
    if "truncate" in parameters:
        if parameters["truncate"] not in ("true", "false"):
            raise InvalidField(
                f"truncate must be true or false, got {shown(parameters['truncate'])}",
                field="truncate",
            )
        truncate = parameters["truncate"] == "true"
    return PredictQuery(
        top_k=top_k,
        truncate=truncate,
        model=parameters.get("model"),
        version=parameters.get("version"),
    )


def unique_parameters(
    items: Iterable[tuple[str, str]], *, allowed: Sequence[str]
) -> dict[str, str]:
    """The parameters of a query by name.

    Raises InvalidField for one that is not `allowed`, and for one that is there twice.
    """
    parameters: dict[str, str] = {}
    for name, value in items:
        if name not in allowed:
            raise InvalidField(
                f"{shown_key(name)} is not a parameter of this query, which may hold"
                f" {', '.join(allowed)}",
                field=shown_key(name),
            )
        if name in parameters:
            raise InvalidField(f"{name} is twice in the query: send it once", field=name)
        parameters[name] = value
    return parameters


def parse_predict_request(
    body: bytes,
    *,
    max_rows: int,
    max_top_k: int,
    query: PredictQuery = NO_OPTIONS,
) -> PredictRequest:
    """The request for predictions in `body` and `query`, within the limits of this server.

    Raises BadRequest for a body that is not JSON, and InvalidField for a field that is wrong.
    """
    try:
        request = PredictRequest.model_validate(parse_json(body, subject="the body"))
    except ValidationError as error:
        raise _field_error(error.errors(include_url=False)[0], max_top_k=max_top_k) from error

    # The limits are settings, so the model of the request does not know them.
    if len(request.inputs) > max_rows:
        raise InvalidField(
            f"inputs must hold at most {max_rows} texts a request, got {len(request.inputs)}: split"
            f" them, or raise {setting_named('max_rows')}",
            field="inputs",
        )
    if request.top_k > max_top_k:
        raise _value_error("top_k", request.top_k, max_top_k=max_top_k)

    if query is NO_OPTIONS:
        return request
    options = {name: value for name, value in asdict(query).items() if value is not None}
    for name in options:
        # A `null` in the body counts as missing.
        if name in request.model_fields_set and getattr(request, name) is not None:
            raise InvalidField(
                f"{name} is in the query and in the body: send it in one of them", field=name
            )
    return request.model_copy(update=options)


def _field_error(error: ErrorDetails, *, max_top_k: int) -> InvalidField:
    """pydantic's first error, as a sentence that names the field and the value."""
    path = error["loc"]
    value = error["input"]
    if error["type"] == "extra_forbidden":
        return _unknown_field(str(path[0]))
    if not path:
        # For a key with half an emoji pydantic has no path (seen in 2.14): the value is the key.
        if error["type"] == "string_unicode" and isinstance(value, str):
            return _unknown_field(value)
        return InvalidField(
            f"the body must be a JSON object with the field inputs, got {shown(value)}"
        )
    field = ".".join(map(str, path))
    if error["type"] == "missing":
        return InvalidField(f"{field} is missing", field=field)
    return _value_error(field, value, max_top_k=max_top_k)


def _unknown_field(key: str) -> InvalidField:
    # Half an emoji in a key cannot be sent back as text; its escape can.
    name = shown_key(key)
    allowed = ", ".join(PredictRequest.model_fields)
    return InvalidField(f"{name} is not a field of this request, which has {allowed}", field=name)


def _value_error(field: str, value: object, *, max_top_k: int) -> InvalidField:
    if field == "inputs":
        expected = "a list of at least 1 text"
    elif field.startswith("inputs."):
        expected = "a string"
    elif field == "top_k":
        expected = f"an integer from 1 to {max_top_k}"
    elif field == "truncate":
        expected = "true or false"
    else:
        expected = "a string or null"
    return InvalidField(f"{field} must be {expected}, got {shown(value)}", field=field)
