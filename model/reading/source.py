"""What every format shares: opening exactly the named file, its values, and the two columns."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from evalmode.model.texts import DataError
from evalmode.regular_files import NotRegular, open_regular

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

# What of a long value is looked at, copied or decoded at once: bytes or characters.
PIECE = 65_536
_BLANKS = re.compile(rb"\s*+")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The texts and labels of a file, row by row; None where a row holds no value.

    Blanks around a value are no part of it.

    unit        what `numbers` counts in this format: "line" or "row"
    numbers     where each row stands in the file, from 1
    marked      columns of which a note says that values keep the quotation marks around them
    headers     rows that name the columns again, as files do that were joined; not among the rows
    notes       what the user should know of how the file was read
    """

    texts: Sequence[str | None]
    labels: Sequence[str | None]
    unit: str
    numbers: Sequence[int]
    headers: int = 0
    marked: Sequence[str] = ()
    notes: tuple[str, ...] = ()


class Table(Protocol):
    """A file that is open, with the names of its columns."""

    names: tuple[str, ...]

    def read(self, *, text: str, label: str) -> Columns:
        """The columns named `text` and `label`. Raises DataError with the place of what is wrong.

        Other columns may hold anything.
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

    Raises DataError, naming the line and the byte, where the file is something else. No text is
    made of all of it: an emoji in a text of 20 MB makes 80 MB of it.
    """
    try:
        mark = os.pread(file.fileno(), len(codecs.BOM_UTF8), 0)
        if mark != codecs.BOM_UTF8:
            mark = b""
        file.seek(len(mark))
        data = file.read()  # without a copy, as nothing is buffered
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    position, reason = data.find(b"\0"), "a NUL byte, as binary files, UTF-16 and UTF-32 have"
    if position < 0:
        try:
            _check_utf_8(data)
            return data
        except UnicodeDecodeError:
            position = first_error(data)
            reason = f"0x{data[position]:02x}, which is not UTF-8"
    line = data.count(b"\n", 0, position) + 1
    # A signature counts only in a file that is no text: a column may be called PAR1.
    kind = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)
    if kind is not None:
        raise DataError(
            f"{path} holds {kind} data and not UTF-8 text (line {line}, byte {position + 1} is"
            f" 0x{data[position]:02x}): unpack or convert it first, or give it the ending of its"
            " format"
        )
    raise DataError(
        f"{path}, line {line}: byte {len(mark) + position + 1} of the file is {reason}: convert the"
        " file to UTF-8 text first, for example with iconv"
    )


def value_of(data: bytes | memoryview) -> str:
    """The UTF-8 text of one value, without the blanks around it. Raises UnicodeDecodeError.

    A long value is not copied: its blanks are left out before the text is made.
    """
    if len(data) <= PIECE:
        return str(data, "utf-8").strip()
    view = memoryview(data)
    blanks = _BLANKS.match(view)
    assert blanks is not None, "the pattern matches no blanks as well"
    start, stop = blanks.end(), len(view)
    while stop > start:
        tail = bytes(view[max(start, stop - PIECE) : stop])
        stop -= len(tail) - len(tail.rstrip())
        if not tail.isspace():
            break
    return str(view[start:stop], "utf-8").strip()


def _check_utf_8(data: bytes) -> None:
    """Raise UnicodeDecodeError for other bytes, without making a text of all of them."""
    if data.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        decoder.decode(view[start : start + PIECE])
    decoder.decode(b"", final=True)


def shown(name: str) -> str:
    """A name or value as a sentence quotes it: swapped columns may bring one of megabytes."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


def first_error(data: bytes) -> int:
    """Where the first byte stands that is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    raise AssertionError("the bytes are UTF-8")
