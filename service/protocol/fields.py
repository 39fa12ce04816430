"""The fields of a parsed JSON body: a list of tensors, parameters, a flag, an integer.

`null` counts as a field that was left out, as many clients write it. Any other value of a wrong
type is BadRequest, whose message begins with the path of the field, as `inputs.0.name`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import parse_json, shown_flat, shown_key

# The least similarity (`difflib`) of a misspelt key: it takes `input` for `inputs`, but does not
# take `ids` for `id`.
_SIMILARITY = 0.85

# The time of a comparison grows with the length of a key, and a request chooses its keys.
_COMPARED_CHARACTERS = 20


class TensorEntry(NamedTuple):
    """One object in a list of tensors: its path in the body, its name, and all of its fields."""

    path: str
    name: str
    fields: dict[str, Any]


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`."""
    fields = parse_json(raw, subject="the body")
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, got {shown_flat(fields)}")
    return fields


def parse_optional_object(raw: bytes, *, allowed: Sequence[str]) -> dict[str, Any]:
    """The JSON object in `raw`, which may have the `allowed` fields; {} for an empty body."""
    fields = parse_object(raw) if raw.strip() else {}
    require_allowed(fields, allowed)
    return fields


def require_allowed(fields: dict[str, Any], allowed: Sequence[str], *, path: str = "") -> None:
    """Raise BadRequest for a field that is not `allowed`, because a misspelt one would be ignored.

    `path` is the path of the object; it is empty for the body itself.
    """
    for key in fields:
        if key not in allowed:
            field = _join(path, shown_key(key))
            raise BadRequest(
                f"{field} is not a field of {path or 'this request'}, which has"
                f" {', '.join(allowed)}",
                field=field,
            )


def require_no_misspelt(fields: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raise BadRequest for a field whose name is similar to one that is `allowed`.

    All other fields are ignored: clients add fields for their own use, as `model_name`.
    """
    for key in fields:
        if key in allowed:
            continue
        start = key[:_COMPARED_CHARACTERS].lower()
        similar = difflib.get_close_matches(start, allowed, n=1, cutoff=_SIMILARITY)
        if similar:
            raise BadRequest(
                f"{shown_key(key)} is not a field of this request: did you mean {similar[0]}?",
                field=shown_key(key),
            )


def tensor_entries(
    fields: dict[str, Any], key: str, *, allowed: Sequence[str]
) -> Iterator[TensorEntry]:
    """The entries of the list of tensors at `key`, each with the `allowed` fields.

    The list may be missing. Raises BadRequest for an entry without a name, for a name that was used
    before, and for an unknown field.
    """
    entries = fields.get(key)
    if entries is None:
        return
    if not isinstance(entries, list):
        raise BadRequest(f"{key} must be a list of tensors, got {shown_flat(entries)}", field=key)
    names: set[str] = set()
    for index, entry in enumerate(entries):
        path = f"{key}.{index}"
        if not isinstance(entry, dict):
            raise BadRequest(f"{path} must be an object, got {shown_flat(entry)}", field=path)
        name = entry.get("name")
        if not isinstance(name, str):
            raise BadRequest(
                f"{path}.name must be a string, got {describe_field(entry, 'name')}",
                field=f"{path}.name",
            )
        if name in names:
            raise BadRequest(
                f"{path}.name is {shown_flat(name)}, the name of an earlier tensor",
                field=f"{path}.name",
            )
        names.add(name)
        require_allowed(entry, allowed, path=path)
        yield TensorEntry(path, name, entry)


def parameters_of(fields: dict[str, Any], *, path: str = "") -> dict[str, Any]:
    """The parameters of the object at `path`: of a tensor, or of the request itself."""
    field = _join(path, "parameters")
    parameters = fields.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"{field} must be an object, got {shown_flat(parameters)}", field=field)
    if "shared_memory_region" in parameters:
        raise BadRequest(
            f"{field}.shared_memory_region: this server offers no shared memory", field=field
        )
    return parameters


def flag(fields: dict[str, Any], key: str, *, default: bool, path: str = "") -> bool:
    """The boolean at `key` of the object at `path`."""
    value = fields.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        field = _join(path, key)
        raise BadRequest(f"{field} must be true or false, got {shown_flat(value)}", field=field)
    return value


def integer(
    fields: dict[str, Any], key: str, *, lowest: int, highest: int, path: str
) -> int | None:
    """The integer at `key` of the object at `path`, from `lowest` to `highest`; None if missing."""
    value = fields.get(key)
    # `type`, because Python counts a bool as an integer.
    if value is not None and (type(value) is not int or not lowest <= value <= highest):
        field = _join(path, key)
        raise BadRequest(
            f"{field} must be an integer from {lowest} to {highest}, got {shown_flat(value)}",
            field=field,
        )
    return value


def describe_field(fields: dict[str, Any], key: str) -> str:
    """The value at `key` as an error message shows it; "nothing" if it is missing."""
    return shown_flat(fields[key]) if key in fields else "nothing"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
