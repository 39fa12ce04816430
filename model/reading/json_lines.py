"""JSON lines: one object a line, whose values are the texts that stand there, of no type."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalmode.model.reading.source import PIECE, Columns, value_of
from evalmode.model.texts import DataError

# Bytes of a line whose long strings are decoded by themselves.
_LONG_LINE = 1_048_576
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
# The character that begins what stands for a long string, as it is and as an escape.
_STAND_IN = re.compile(rb"\x7f|\\u007[fF]")
# What a string holds that is not itself: escapes, and control characters, which are an error.
_ESCAPE = re.compile(rb"[\\\0-\x1f]")
# Where a string can be cut: no escape goes on in front of a blank or of a letter beyond ASCII, or
# after 13 other bytes, as the longest, a pair of halves, has 12.
_CUT = re.compile(rb"[^\\](?=[ \xc2-\xf4])|[^\\]{13}")
# Characters that make Python hold more than a byte for each character of a line and of its texts.
_WIDE = re.compile(rb"[\x80-\xff]|\\u[dD][89abAB]")


class _Members(list[tuple[str, Any]]):
    """The members of a JSON object, in order and with those that stand there twice."""


class JsonLines:
    """A file of one JSON object a line. `names` are those of all objects, in their order.

    A number is the text that stands there, so 1.0 is "1.0" and 12345678901234567890 has all of its
    digits. true is "true". null, NaN and a member that is not there are no value.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        decoder = json.JSONDecoder(
            object_pairs_hook=_Members, parse_int=str, parse_float=str, parse_constant=_constant
        )
        self._rows: list[dict[str, Any]] = []
        self._lines: list[int] = []
        names: dict[str, None] = {}
        for number, line in enumerate(_lines(data), start=1):
            try:
                if len(line) > _LONG_LINE and _WIDE.search(line):
                    value = _decoded_by_strings(line, decoder)
                elif text := _text_of(line):
                    value = decoder.decode(text)
                else:
                    continue
            except json.JSONDecodeError as error:
                character = str(line, "utf-8").index(error.doc) + error.colno
                raise DataError(
                    f"{path}, line {number}, character {character} is not JSON ({error.msg}):"
                    " each line must hold one whole object"
                ) from error
            except RecursionError as error:
                raise DataError(
                    f"{path}, line {number} cannot be read: it holds lists or objects within more"
                    " others than can be read: remove the member that holds them"
                ) from error
            except ValueError as error:
                raise DataError(f"{path}, line {number} cannot be read: {error}") from error
            if not isinstance(value, _Members):
                kind = _kind(value) if isinstance(value, list) else _shown(_text_of(line))
                raise DataError(
                    f"{path}, line {number} is {kind} and not an object: write each row as"
                    ' {"text": "...", "label": "..."} in a line of its own'
                )
            row = dict(value)
            if len(row) < len(value):
                keys = [key for key, _ in value]
                twice = next(key for key in row if keys.count(key) > 1)
                raise DataError(
                    f"{path}, line {number}: the key {twice!r} stands {keys.count(twice)} times in"
                    " one object: keep one of them"
                )
            names.update(dict.fromkeys(row))
            self._rows.append(row)
            self._lines.append(number)
        if not self._rows:
            raise DataError(f"{path} is empty: each line must hold one object")
        self.names = tuple(names)

    def read(self, *, text: str, label: str) -> Columns:
        """The two columns; raises DataError, naming the line, where a value is a list or object."""
        return Columns(
            texts=self._column(text),
            labels=self._column(label),
            unit="line",
            numbers=self._lines,
        )

    def _column(self, name: str) -> list[str | None]:
        values: list[str | None] = []
        for row, number in zip(self._rows, self._lines, strict=True):
            value = row.get(name)
            if isinstance(value, bool):
                value = "true" if value else "false"
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{self.path}, line {number}: column {name!r} holds {_kind(value)}, and a"
                    " string, a number, true, false or null is needed: name another column, or"
                    " write one value"
                )
            values.append(None if value is None else value.strip())
        return values


def _lines(data: bytes) -> Iterator[memoryview]:
    view, start = memoryview(data), 0
    while start <= len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        yield view[start:stop]
        start = stop + 1


def _text_of(line: memoryview) -> str:
    """The line without the mark that begins a file: files that were joined have it inside."""
    return value_of(line).removeprefix("\ufeff")


def _decoded_by_strings(line: memoryview, decoder: json.JSONDecoder) -> Any:
    """The value of a long line, whose long strings are decoded by themselves.

    The text of the whole line beside that of a string takes 160 MB for 20 MB with an emoji. Where
    anything is unusual the line is decoded as a whole, which also finds the place of an error.
    """
    strings: list[str] = []

    def stand_in(match: re.Match[bytes]) -> bytes:
        start, stop = match.span(1)
        if stop - start <= PIECE:
            return match[0]
        strings.append(_string(line[start:stop]))
        return b'"\x7f%d"' % (len(strings) - 1)

    if _STAND_IN.search(line) is None:
        try:
            value = decoder.decode(_text_of(memoryview(_STRING.sub(stand_in, line))))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, _Members) and not any(key.startswith("\x7f") for key, _ in value):
            return _Members(
                (key, strings[int(member[1:])])
                if isinstance(member, str) and member.startswith("\x7f")
                else (key, member)
                for key, member in value
            )
    return decoder.decode(_text_of(line))


def _string(body: memoryview) -> str:
    """The text between the quotation marks of a JSON string. Raises ValueError."""
    if _ESCAPE.search(body) is None:
        return value_of(body)
    # As UTF-8, which takes a quarter of the text where an emoji is in each piece.
    text, start = bytearray(), 0
    while start < len(body):
        match = _CUT.search(body, start + PIECE)
        stop = match.end() if match else len(body)
        while stop < len(body) and body[stop] & 0xC0 == 0x80:  # a character goes on
            stop += 1
        piece = json.loads(b'"%b"' % bytes(body[start:stop]))
        text += piece.encode("utf-8", "surrogatepass")
        start = stop
    return str(text, "utf-8", "surrogatepass")


def _shown(line: str) -> str:
    return line if len(line) <= 40 else line[:40] + "..."


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not a number that JSON has: write null, or a string")


def _kind(value: object) -> str:
    if isinstance(value, _Members):
        return "an object"
    return "a list" if isinstance(value, list) else "a single value"
