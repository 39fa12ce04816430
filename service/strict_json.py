"""JSON of requests, read strictly, and values in the form in which error messages show them.

`json_problems.py` writes the messages: none of Python's own parser reaches a client.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from pydantic_core import from_json

from evalmode.service.errors import BadRequest
from evalmode.service.json_problems import constant_problem, other_encoding, problem_of

# Messages cut values of the client after so many characters.
SHOWN_CHARACTERS = 60

_LARGEST_NUMBER = 10**18


class _LongInteger:
    """Takes the place of an integer that Python does not convert, in a parsed value."""

    def __init__(self, digit_count: int) -> None:
        self.digit_count = digit_count


class _NotJsonNumber(ValueError):  # noqa: N818 - read as a sentence
    """NaN, Infinity or -Infinity. Python's parser reads these, and JSON does not have them."""


def parse_json(raw: bytes, *, subject: str) -> Any:
    """The JSON value in `raw`, which may begin with a byte order mark.

    Raises BadRequest with a message that begins with `subject`. For an integer with too many
    digits, the error names its field.

    >>> parse_json(b'{"inputs": ["a"]}', subject="the body")
    {'inputs': ['a']}
    """
    try:
        # Takes a third of the time of Python's parser, and a sixth for numbers with a point.
        return from_json(raw, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        # Not JSON, or JSON that only Python's parser reads: half a surrogate pair (half an emoji),
        # a byte order mark, and a value that is nested deeply.
        return _parse_json_slowly(raw, subject=subject)


def _parse_json_slowly(raw: bytes, *, subject: str) -> Any:
    """The same with Python's parser, for the values that need it and for the errors."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        _refuse_other_encoding(raw, subject)
        raise BadRequest(
            f"{subject} is not valid JSON: it is not UTF-8, the byte 0x{raw[error.start]:02x} at"
            f" position {error.start} does not begin a character: send UTF-8"
        ) from error
    if not text.strip():
        raise BadRequest(f"{subject} is empty: it must be JSON")

    try:
        try:
            return _decode(text)
        except (json.JSONDecodeError, _NotJsonNumber):
            raise
        except ValueError:
            # An integer has too many digits. Only now is each integer converted by `_integer`,
            # which takes 2.5 times as long.
            value = json.loads(text, parse_int=_integer, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadRequest(f"{subject} is nested too deeply") from error
    except json.JSONDecodeError as error:
        _refuse_other_encoding(raw, subject)
        raise BadRequest(problem_of(error, text).sentence(text, subject=subject)) from error
    except _NotJsonNumber as error:
        raise BadRequest(constant_problem(text).sentence(text, subject=subject)) from error

    long_integer = next(_long_integers(value), None)
    if long_integer is None:
        # It was the value of a key that occurs twice, and the other value counts.
        return value
    field, digit_count = long_integer
    raise BadRequest(
        f"{field or subject} is a number of {digit_count} digits: a number may have at most"
        f" {sys.get_int_max_str_digits()}",
        field=field or None,
    )


def whole_number(text: str) -> int | None:
    """The number that `text` writes in ASCII digits, leading zeros included. None for other text.

    Every number above 10**18 becomes 10**18, which is above all limits here. A header may hold more
    digits than Python converts.

    >>> whole_number("007"), whole_number("-1")
    (7, None)
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0")
    if len(digits) > 18:
        return _LARGEST_NUMBER
    return int(digits or "0")


def shown(value: object) -> str:
    """The value as JSON, cut after `SHOWN_CHARACTERS`."""
    if isinstance(value, str):
        value = value[: SHOWN_CHARACTERS + 1]
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return text[:SHOWN_CHARACTERS] + "..."


def shown_flat(value: object) -> str:
    """The value as JSON, but without the members of a list or an object: there may be a million."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return shown(value)


def shown_key(key: str) -> str:
    """The key itself if it is a word of readable length, else the key as JSON."""
    is_word = key.replace(".", "_").replace("-", "_").isidentifier()
    if is_word and len(key) <= SHOWN_CHARACTERS:
        return key
    return shown(key)


def _refuse_other_encoding(raw: bytes, subject: str) -> None:
    if encoding := other_encoding(raw):
        raise BadRequest(
            f"{subject} is not valid JSON: it is {encoding} from its first byte on: send UTF-8"
        )


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJsonNumber(name)


# Made once: `json.loads` makes one for each text that is read with options.
_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _integer(digits: str) -> int | _LongInteger:
    # Python converts no integer with more digits, because that takes quadratic time.
    digit_count = len(digits.removeprefix("-"))
    if digit_count > sys.get_int_max_str_digits():
        return _LongInteger(digit_count)
    return int(digits)


def _long_integers(value: object) -> Iterator[tuple[str, int]]:
    """The field of each integer with too many digits, as `inputs.0.data.3`, and its digit count."""
    # A stack, because the value may be nested more deeply than Python calls may be.
    stack: list[tuple[str, object]] = [("", value)]
    while stack:
        field, value = stack.pop()
        if isinstance(value, _LongInteger):
            yield field, value.digit_count
        members: list[tuple[str, object]] = []
        if isinstance(value, dict):
            members = [(shown_key(key), member) for key, member in value.items()]
        elif isinstance(value, list):
            members = [(str(index), member) for index, member in enumerate(value)]
        # The first member is popped first.
        for name, member in reversed(members):
            stack.append((f"{field}.{name}" if field else name, member))
