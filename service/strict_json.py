"""JSON of requests, read strictly, and values as the sentences of errors show them.

No sentence of Python's own parser reaches a client: `json_problems.py` writes them.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from evalmode.service.errors import BadRequest
from evalmode.service.json_problems import constant_problem, other_encoding, problem_of

SHOWN_CHARACTERS = 60

_LARGEST_NUMBER = 10**18


class _LongInteger:
    """Stands in a parsed value for an integer that Python does not convert."""

    def __init__(self, digits: int) -> None:
        self.digits = digits


def parse_json(raw: bytes, *, subject: str) -> Any:
    """The JSON value in `raw`; a byte order mark before it is passed over.

    Raises BadRequest, whose sentence begins with `subject`.
    """
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        _refuse_other_encoding(raw, subject)
        raise BadRequest(
            f"{subject} is not valid JSON: it is not UTF-8, the byte 0x{raw[error.start]:02x} at"
            f" position {error.start} begins no character: send UTF-8"
        ) from error
    if not text.strip():
        raise BadRequest(f"{subject} is empty: it must be JSON")
    try:
        try:
            # Python's parser, not pydantic's: a lone surrogate escape (half an emoji) is valid JSON
            # and a text to answer.
            return json.loads(text, parse_constant=_refuse_constant)
        except (json.JSONDecodeError, _NoJsonNumber):
            raise
        except ValueError:
            # Of an integer with too many digits. Only now is each one converted here: that takes
            # 2.5 times as long.
            value = json.loads(text, parse_int=_integer, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadRequest(f"{subject} is nested too deeply") from error
    except json.JSONDecodeError as error:
        _refuse_other_encoding(raw, subject)
        raise BadRequest(problem_of(error, text).sentence(text, subject=subject)) from error
    except _NoJsonNumber as error:
        raise BadRequest(constant_problem(text).sentence(text, subject=subject)) from error
    field, digits = next(_long_integers(value), ("", 0))
    if not digits:  # a key that stands twice: its other value is the one that counts
        return value
    raise BadRequest(
        f"{field or subject} is a number of {digits} digits: a number may have at most"
        f" {sys.get_int_max_str_digits()}",
        field=field or None,
    )


def whole_number(text: str) -> int | None:
    """The number that `text` writes in decimal digits, leading zeros included; None for other text.

    Numbers above 10**18 are all 10**18, more than any limit here: a header may hold more digits
    than Python converts.
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0")
    return int(digits or "0") if len(digits) <= 18 else _LARGEST_NUMBER


def shown(value: object) -> str:
    """The value as JSON, cut where it gets long."""
    if isinstance(value, str):
        value = value[: SHOWN_CHARACTERS + 1]
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def shown_flat(value: object) -> str:
    """The same, but a list or an object is only called so: it may hold a million numbers."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return shown(value)


def shown_key(key: str) -> str:
    """A key as it is where it is a plain word of readable length, else as JSON shows it."""
    is_word = key.replace(".", "_").replace("-", "_").isidentifier()
    return key if is_word and len(key) <= SHOWN_CHARACTERS else shown(key)


def _refuse_other_encoding(raw: bytes, subject: str) -> None:
    if encoding := other_encoding(raw):
        raise BadRequest(
            f"{subject} is not valid JSON: it is {encoding} from its first byte on: send UTF-8"
        )


class _NoJsonNumber(ValueError):  # noqa: N818 - read as a sentence
    """NaN, Infinity or -Infinity, which Python reads and JSON does not have."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NoJsonNumber(name)


def _integer(digits: str) -> int | _LongInteger:
    # Python converts no integer with more digits, since that takes quadratic time.
    count = len(digits.removeprefix("-"))
    return int(digits) if count <= sys.get_int_max_str_digits() else _LongInteger(count)


def _long_integers(value: object) -> Iterator[tuple[str, int]]:
    """The place of each integer with too many digits, as `inputs.0.data.3`, and their number."""
    values: list[tuple[str, object]] = [("", value)]
    while values:
        place, value = values.pop()
        if isinstance(value, _LongInteger):
            yield place, value.digits
        members: list[tuple[object, object]] = []
        if isinstance(value, dict):
            members = [(shown_key(key), member) for key, member in value.items()]
        elif isinstance(value, list):
            members = list(enumerate(value))
        for key, member in reversed(members):
            values.append((f"{place}.{key}" if place else str(key), member))
