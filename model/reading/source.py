"""Shared by all file formats: opening a file, decoding its values, and the two columns it gives."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from evalmode.model.data_set import DataError
from evalmode.regular_files import NotRegular, open_regular

# First bytes -> format, to name a file that is no text.
_SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip (so are Excel's files)",
    b"\xd0\xcf\x11\xe0": "Excel",
    b"%PDF": "PDF",
    b"SQLite format 3": "SQLite",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

# Bytes or characters of a long value that are examined, copied or decoded at once. One value may be
# a text of 20 MB, and a copy of it as a string with an emoji takes 80 MB.
PIECE = 65_536

# Characters of a name or value that an error message quotes.
_QUOTED_CHARACTERS = 100

# Possessive, so that a match keeps no positions to go back to.
_BLANKS = re.compile(rb"\s*+")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The texts and labels of a file, row by row; None where a row has no value.

    The blanks around a value are removed.

    unit        the unit of `numbers`: "line" or "row"
    numbers     the line or row of the file where each row starts, from 1
    marked      columns with a note that values keep the quotation marks around them
    headers     number of rows that repeat the header, as in joined files; `texts` is without them
    notes       warnings about the way in which the file was read
    """

    texts: Sequence[str | None]
    labels: Sequence[str | None]
    unit: str
    numbers: Sequence[int]
    headers: int = 0
    marked: Sequence[str] = ()
    notes: tuple[str, ...] = ()


class Table(Protocol):
    """An open file with named columns."""

    names: tuple[str, ...]

    def read(self, *, text: str, label: str) -> Columns:
        """The columns named `text` and `label`; other columns may hold anything.

        Raises DataError, naming the line or row, for a value that is no text.
        """


def open_file(path: Path) -> BinaryIO:
    """Open the file of exactly this name. Raises DataError for folders, pipes and devices."""
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the path of a data file") from error
    except NotRegular as error:
        raise DataError(f"{path} is {error}: give the path of one regular file") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened ({error.strerror}): give a regular file that you may read"
        ) from error


def content_of(path: Path, file: BinaryIO) -> bytes:
    """The bytes of a UTF-8 file without its byte order mark.

    They stay bytes, because a string of a text of 20 MB with one emoji takes 80 MB. Raises
    DataError, naming the line and the byte, for a file that is not UTF-8 text.
    """
    try:
        mark = os.pread(file.fileno(), len(codecs.BOM_UTF8), 0)
        if mark != codecs.BOM_UTF8:
            mark = b""
        file.seek(len(mark))
        data = file.read()  # the file is unbuffered, so this makes no second copy
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error

    position, reason = data.find(b"\0"), "a NUL byte, as binary files, UTF-16 and UTF-32 have"
    if position < 0:
        try:
            _require_utf8(data)
            return data
        except UnicodeDecodeError:
            position = first_error(data)
            reason = f"0x{data[position]:02x}, which is not UTF-8"
    line = data.count(b"\n", 0, position) + 1

    # Only a file that is no text is matched against the signatures: a column may be called PAR1.
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            raise DataError(
                f"{path} holds {kind} data and not UTF-8 text (line {line}, byte {position + 1} is"
                f" 0x{data[position]:02x}): unpack or convert it first, or give it the ending of"
                " its format"
            )
    raise DataError(
        f"{path}, line {line}: byte {len(mark) + position + 1} of the file is {reason}: convert the"
        " file to UTF-8 text first, for example with iconv"
    )


def value_of(data: bytes | memoryview) -> str:
    """The UTF-8 text of one value, without the blanks around it. Raises UnicodeDecodeError.

    The blanks of a long value are skipped before it is decoded: this saves a copy.
    """
    if len(data) <= PIECE:
        return str(data, "utf-8").strip()
    view = memoryview(data)
    blanks = _BLANKS.match(view)
    assert blanks is not None, "the pattern also matches no blanks"
    start, stop = blanks.end(), len(view)
    while stop > start:
        tail = bytes(view[max(start, stop - PIECE) : stop])
        stop -= len(tail) - len(tail.rstrip())
        if not tail.isspace():
            break
    # `strip` once more: it also removes blanks beyond ASCII, such as U+00A0.
    return str(view[start:stop], "utf-8").strip()


def shortened(name: str) -> str:
    """A name or value in quotes for an error message: a value may have megabytes."""
    if len(name) > _QUOTED_CHARACTERS:
        name = name[:_QUOTED_CHARACTERS] + "..."
    return repr(name)


def first_error(data: bytes) -> int:
    """The index of the first byte that is not UTF-8, in bytes that hold such a byte."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    raise AssertionError("the bytes are UTF-8")


def _require_utf8(data: bytes) -> None:
    """Raise UnicodeDecodeError for other bytes. Decodes piece by piece to save memory."""
    if data.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        decoder.decode(view[start : start + PIECE])
    decoder.decode(b"", final=True)
