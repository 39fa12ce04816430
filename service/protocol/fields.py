"""The fields of a parsed body: an entry's name, its parameters, a flag. Knows no tensor.

`null` stands for a field that is not given, as many clients write it; anything else of a wrong type
is BadRequest.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import parse_json, shown_flat, shown_key

_SIMILARITY = 0.85  # `input` is near to `inputs`, and `ids` is not to `id`
_LONGEST_MISSPELT = 20


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`."""
    fields = parse_json(raw, subject="the body")
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, got {shown_flat(fields)}")
    return fields


def parse_optional(raw: bytes, *, known: Sequence[str]) -> dict[str, Any]:
    """The JSON object in `raw`, empty where nothing was sent. It has no fields but the `known`."""
    fields = parse_object(raw) if raw.strip() else {}
    require_known(fields, known)
    return fields


def require_known(entry: dict[str, Any], known: Sequence[str], *, field: str = "") -> None:
    """Raise BadRequest for a key that is not `known`: a misspelt one would be passed over without a
    word. `field` is the place of the entry; empty for the request itself.
    """
    for key in entry:
        if key not in known:
            name = f"{field}.{shown_key(key)}" if field else shown_key(key)
            raise BadRequest(
                f"{name} is not a field of {field or 'this request'}, which has {', '.join(known)}",
                field=name,
            )


def require_no_misspelt(entry: dict[str, Any], known: Sequence[str]) -> None:
    """Raise BadRequest for a key that nearly is one of the `known`. Clients add keys of their own,
    which are passed over.
    """
    for key in entry:
        if key in known:
            continue
        word = key[:_LONGEST_MISSPELT].lower()
        if near := difflib.get_close_matches(word, known, n=1, cutoff=_SIMILARITY):
            raise BadRequest(
                f"{shown_key(key)} is not a field of this request: did you mean {near[0]}?",
                field=shown_key(key),
            )


def listed(entry: dict[str, Any], key: str) -> list[Any]:
    """The list at `key`; empty where nothing is given."""
    value = entry.get(key)
    if value is not None and not isinstance(value, list):
        raise BadRequest(f"{key} must be a list of tensors, got {shown_flat(value)}", field=key)
    return value or []


def name_of(entry: object, names: set[str], *, field: str) -> str:
    """The name of a tensor, added to `names`, the ones that its list holds already."""
    if not isinstance(entry, dict):
        raise BadRequest(f"{field} must be an object, got {shown_flat(entry)}", field=field)
    name = entry.get("name")
    if not isinstance(name, str):
        raise BadRequest(
            f"{field}.name must be a string, got {shown_field(entry, 'name')}",
            field=f"{field}.name",
        )
    if name in names:
        raise BadRequest(
            f"{field}.name names {shown_flat(name)} a second time", field=f"{field}.name"
        )
    names.add(name)
    return name


def parameters_of(entry: dict[str, Any], *, field: str) -> dict[str, Any]:
    """The parameters of a request or of one of its tensors."""
    parameters = entry.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise BadRequest(f"{field} must be an object, got {shown_flat(parameters)}", field=field)
    if parameters and "shared_memory_region" in parameters:
        raise BadRequest(
            f"{field}.shared_memory_region: this server offers no shared memory", field=field
        )
    return parameters or {}


def flag(entry: dict[str, Any], key: str, *, default: bool, field: str = "") -> bool:
    """The value at `key`, true or false. `field` is the place of the entry; empty for the request
    itself.
    """
    value = entry.get(key)
    if value is not None and not isinstance(value, bool):
        name = f"{field}.{key}" if field else key
        raise BadRequest(f"{name} must be true or false, got {shown_flat(value)}", field=name)
    return default if value is None else value


def integer(
    parameters: dict[str, Any], key: str, *, lowest: int, highest: int, field: str
) -> int | None:
    """The parameter `key`, an integer from `lowest` to `highest`; None where it is not given."""
    value = parameters.get(key)
    if value is not None and (type(value) is not int or not lowest <= value <= highest):
        raise BadRequest(
            f"{field}.{key} must be an integer from {lowest} to {highest}, got {shown_flat(value)}",
            field=f"{field}.{key}",
        )
    return value


def shown_field(entry: dict[str, Any], key: str) -> str:
    """The value of an entry at `key`, as a sentence shows it."""
    return shown_flat(entry[key]) if key in entry else "nothing"
