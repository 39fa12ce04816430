"""JSON lines: one object a line. Every value is exactly the text in the file, without a type."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalmode.model.data_set import DataError
from evalmode.model.reading.source import PIECE, Columns, value_of

# Bytes of a line from which on its long strings are decoded one by one: see
# `_decode_string_by_string`.
_LONG_LINE = 1_048_576

# Characters of a line that an error message quotes.
_QUOTED_CHARACTERS = 40

_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
# The character DEL, as it is and as an escape. It begins the stand-in for a long string.
_STAND_IN = re.compile(rb"\x7f|\\u007[fF]")
# Escapes, and control characters, which are an error. All other bytes of a string are its text.
_ESCAPE = re.compile(rb"[\\\0-\x1f]")
# Where a string with escapes can be cut. No escape continues in front of a blank or of a letter
# beyond ASCII. None continues behind 13 bytes without a backslash either: the longest escape, a
# pair of surrogates, has 12.
_CUT = re.compile(rb"[^\\](?=[ \xc2-\xf4])|[^\\]{13}")
# Characters beyond ASCII. With one of them a Python string takes 2 or 4 bytes for each character.
_WIDE = re.compile(rb"[\x80-\xff]|\\u[dD][89abAB]")


class _Members(list[tuple[str, Any]]):
    """The (key, value) pairs of a JSON object in their order; a key may occur twice."""


class JsonLinesTable:
    """A file of one JSON object a line. `names` are the keys of all objects, in their order.

    A number is its text in the file, so 1.0 is "1.0" and 12345678901234567890 has all of its
    digits. true is "true". null, NaN and a missing key are no value.

    Raises DataError, naming the line, for a line that is not one JSON object.
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
                    value = _decode_string_by_string(line, decoder)
                else:
                    text = _text_of(line)
                    if not text:  # an empty line is no row
                        continue
                    value = decoder.decode(text)
            except json.JSONDecodeError as error:
                # The decoder counts from the first character that is no blank.
                character = str(line, "utf-8").index(error.doc) + error.colno
                raise DataError(
                    f"{path}, line {number}, character {character} is not JSON ({error.msg}):"
                    " each line must hold one whole object"
                ) from error
            except RecursionError as error:
                raise DataError(
                    f"{path}, line {number} cannot be read: its lists or objects are nested too"
                    " deeply: remove the member that holds them"
                ) from error
            except ValueError as error:
                raise DataError(f"{path}, line {number} cannot be read: {error}") from error

            if not isinstance(value, _Members):
                if isinstance(value, list):
                    kind = "a list"
                else:
                    kind = _text_of(line)
                    if len(kind) > _QUOTED_CHARACTERS:
                        kind = kind[:_QUOTED_CHARACTERS] + "..."
                raise DataError(
                    f"{path}, line {number} is {kind} and not an object: write each row as"
                    ' {"text": "...", "label": "..."} in its own line'
                )
            row = dict(value)
            if len(row) < len(value):
                keys = [key for key, _ in value]
                repeated = next(key for key in row if keys.count(key) > 1)
                raise DataError(
                    f"{path}, line {number}: the key {repeated!r} occurs {keys.count(repeated)}"
                    " times in one object: keep one of them"
                )
            names.update(dict.fromkeys(row))
            self._rows.append(row)
            self._lines.append(number)
        if not self._rows:
            raise DataError(f"{path} is empty: each line must hold one object")
        self.names = tuple(names)

    def read(self, *, text: str, label: str) -> Columns:
        """The two columns. Raises DataError, naming the line, for a list or an object in them."""
        texts, labels = self._column(text), self._column(label)
        return Columns(texts=texts, labels=labels, unit="line", numbers=self._lines)

    def _column(self, name: str) -> list[str | None]:
        values: list[str | None] = []
        for row, number in zip(self._rows, self._lines, strict=True):
            value = row.get(name)
            if value is None:
                values.append(None)
            elif isinstance(value, bool):
                values.append("true" if value else "false")
            elif isinstance(value, str):
                values.append(value.strip())
            else:
                kind = "an object" if isinstance(value, _Members) else "a list"
                raise DataError(
                    f"{self.path}, line {number}: column {name!r} holds {kind}, and a string, a"
                    " number, true, false or null is needed: name another column, or write one"
                    " value"
                )
        return values


def _lines(data: bytes) -> Iterator[memoryview]:
    """The lines as views. Only a line feed ends one: strings may hold other line separators."""
    view, start = memoryview(data), 0
    while start <= len(data):
        stop = data.find(b"\n", start)
        if stop < 0:
            stop = len(data)
        yield view[start:stop]
        start = stop + 1


def _text_of(line: memoryview) -> str:
    """The text of a line without a byte order mark, which joined files have in the middle."""
    return value_of(line).removeprefix("\ufeff")


def _constant(name: str) -> None:
    """The value of NaN, None. Raises ValueError for the other constants that `json` knows."""
    if name != "NaN":
        raise ValueError(f"{name} is not a number in JSON: write null, or a string")


def _decode_string_by_string(line: memoryview, decoder: json.JSONDecoder) -> Any:
    """The value of a long line, whose long strings are decoded one by one to save memory.

    The string of the whole line and that of its long value take 160 MB for 20 MB with an emoji. So
    each long string is decoded from the bytes, and a short stand-in takes its place in the line.

    An unusual line is decoded as a whole. This also finds the position of an error.
    """
    strings: list[str] = []

    def stand_in(match: re.Match[bytes]) -> bytes:
        start, stop = match.span(1)
        if stop - start <= PIECE:
            return match[0]
        strings.append(_decoded_string(line[start:stop]))
        return b'"\x7f%d"' % (len(strings) - 1)

    if _STAND_IN.search(line) is None:
        try:
            value = decoder.decode(_text_of(memoryview(_STRING.sub(stand_in, line))))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, _Members) and not any(key.startswith("\x7f") for key, _ in value):
            members = _Members()
            for key, member in value:
                if isinstance(member, str) and member.startswith("\x7f"):
                    member = strings[int(member[1:])]
                members.append((key, member))
            return members
    return decoder.decode(_text_of(line))


def _decoded_string(body: memoryview) -> str:
    """The text of a JSON string without its quotation marks. Raises ValueError."""
    if _ESCAPE.search(body) is None:
        return value_of(body)
    # Collected as UTF-8: a list of pieces takes four times as much if each has an emoji.
    text, start = bytearray(), 0
    while start < len(body):
        match = _CUT.search(body, start + PIECE)
        stop = match.end() if match else len(body)
        while stop < len(body) and body[stop] & 0xC0 == 0x80:  # inside of a UTF-8 character
            stop += 1
        piece = json.loads(b'"%b"' % bytes(body[start:stop]))
        text += piece.encode("utf-8", "surrogatepass")
        start = stop
    return str(text, "utf-8", "surrogatepass")
