"""CSV and TSV: every value is the text that stands there, and a row that does not fit is refused.

Fields are slices of the file's bytes, and only the two columns that are read become text. Python's
own reader holds each field and its source in four bytes a character: a text of 20 MB takes 200 MB
there. Arrow's reader accepts text after a closing quotation mark, and does not say in which line a
row begins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evalmode.model.reading.source import PIECE, Columns, shown, value_of
from evalmode.model.texts import DataError

TAB_NAMES = ("\t", "\\t", "tab")
LIKELY_SEPARATORS = (",", "\t", ";", "|")

# Of a field of several lines so many are looked at: a text of 20 MB can have millions of lines.
_JUDGED_LINES = 1_000

_END_OF_LINE = re.compile(rb"\r\n|\r|\n")
# Possessive: it neither goes back nor keeps what it could go back to.
_QUOTED = re.compile(rb'"(?:[^"]++|"")*+"')
# What Excel writes and reads in front of the header.
_SEPARATOR_LINE = re.compile(rb'\s*+"?sep=([^"\r\n]{1,4})"?[ \t]*(?:\r\n|\r|\n)', re.IGNORECASE)


class Break(NamedTuple):
    """A field that goes over several lines: its column, and its first and last line."""

    column: int
    first: int
    last: int


class Row(NamedTuple):
    """The fields of one row as bytes, and the first and the last line that it stands in.

    quoted      the columns whose fields are enclosed in quotation marks, which are left out
    breaks      the fields that go over several lines
    """

    fields: Sequence[bytes | memoryview]
    first: int
    last: int
    quoted: Sequence[int] = ()
    breaks: Sequence[Break] = ()

    @property
    def place(self) -> str:
        """The lines, as an error names them."""
        return _place(self.first, self.last)


@dataclass(frozen=True)
class _LinesLikeRows:
    """A field of which at least half of the lines have the values of a row.

    `labels` are what would be the labels of these lines, None for other lines.
    """

    place: str
    lines: int
    labels: Sequence[str | None]


class Delimited:
    """A file of rows whose fields a separator divides; the first row names the columns.

    CSV follows RFC 4180: a field in quotation marks may hold separators, line breaks and doubled
    quotation marks. In TSV a quotation mark is a character like any other. Empty lines are no rows,
    nor is a line `sep=;` in front of the header, which names the separator.
    """

    def __init__(self, path: Path, data: bytes, *, separator: str | None) -> None:
        self.path = path
        self.quoting = path.suffix.lower() == ".csv"
        named = _SEPARATOR_LINE.match(data)
        name = named[1].decode(errors="replace") if named else ""
        if separator is not None:
            self.separator = "\t" if separator in TAB_NAMES else separator
        elif len(name) == 1:
            self.separator = name
        else:
            self.separator = "," if self.quoting else "\t"
        self._rows = rows_of(
            path,
            data,
            separator=self.separator,
            quoting=self.quoting,
            start=named.end() if named else 0,
        )
        header = next(self._rows, None)
        if header is None:
            raise DataError(f"{path} is empty: its first line must name the columns")
        if header.last > header.first:
            raise DataError(
                f"{path}: the header goes over {header.place}: is there a stray quotation mark in"
                f" line {header.first}? The name of a column must be in one line"
            )
        self.names = tuple(value_of(name) for name in header.fields)
        if len(self.names) == 1:
            self._refuse_one_column(self.names[0])

    def read(self, *, text: str, label: str) -> Columns:
        """The two columns; raises DataError, naming the line, where a row does not fit the header.

        A field that has swallowed rows, because a quotation mark in a text opened it, is refused.
        """
        text_at, label_at = self.names.index(text), self.names.index(label)
        texts, labels, numbers = [], [], []
        headers = 0
        suspects: list[_LinesLikeRows] = []
        marked: dict[int, list[int]] = {text_at: [], label_at: []}  # column -> lines
        folded_names = [_folded(name) for name in self.names]
        for row in self._rows:
            if len(row.fields) != len(self.names):
                raise self._misfit(row)
            value = value_of(row.fields[label_at])
            if _folded(value) in folded_names:
                values = [_folded(value_of(field)) for field in row.fields]
                if values == folded_names:
                    headers += 1
                    continue
                if len(values) > 1 and sorted(values) == sorted(folded_names):
                    raise DataError(
                        f"{self.path}, {row.place}: the columns are named again, in another order"
                        " than in the header: join only files whose columns are in one order, or"
                        " remove the row"
                    )
            for broken in row.breaks:
                if broken.column == label_at:
                    raise DataError(
                        f"{self.path}, {row.place}: a label that goes over several lines: is there"
                        f" a stray quotation mark in line {row.first}?"
                    )
                suspects += self._lines_like_rows(row, broken, label_at=label_at)
            labels.append(value)
            texts.append(value_of(row.fields[text_at]))
            numbers.append(row.first)
            for column, value in ((text_at, texts[-1]), (label_at, labels[-1])):
                if value[:1] == value[-1:] == '"' and len(value) > 1 and column not in row.quoted:
                    marked[column].append(row.first)
        if not texts:
            raise DataError(f"{self.path} holds a header and no rows")
        self._refuse_swallowed_rows(suspects, known=set(labels))
        notes = [
            self._note_on_marks(self.names[column], lines)
            for column, lines in marked.items()
            if lines
        ]
        if suspects:
            fields = "one field holds" if len(suspects) == 1 else f"{len(suspects):,} fields hold"
            notes.append(
                f"{fields} several lines that have as many separators as rows (first:"
                f" {suspects[0].place}, {suspects[0].lines:,} lines in one field): if they are"
                " rows, a stray quotation mark opens the field: remove it, or double it in a field"
                " that is enclosed in quotation marks"
            )
        return Columns(
            texts=texts,
            labels=labels,
            unit="line",
            numbers=numbers,
            headers=headers,
            marked=[self.names[column] for column, lines in marked.items() if lines],
            notes=tuple(notes),
        )

    def _refuse_one_column(self, name: str) -> None:
        for separator in LIKELY_SEPARATORS:
            if separator in name:
                raise DataError(
                    f"{self.path}: the header holds one column, {shown(name)}, when"
                    f" {_spelled(self.separator)} separates columns: give --separator"
                    f" {_spelled(separator)}"
                )
        raise DataError(
            f"{self.path}: the header holds one column, {shown(name)}, and a column of texts and"
            " one of labels are needed: name the columns in the first line, or give --separator"
        )

    def _misfit(self, row: Row) -> DataError:
        advice = (
            "put quotation marks around a value that holds the separator, or mend the"
            f" {'line' if row.first == row.last else 'lines'}"
        )
        if self.quoting and any(
            column not in row.quoted and bytes(field[:PIECE]).lstrip().startswith(b'"')
            for column, field in enumerate(row.fields)
        ):
            advice = "remove the blank in front of a quotation mark, which encloses no value there"
        return DataError(
            f"{self.path}, {row.place}: {len(row.fields)} fields, and the header names"
            f" {len(self.names)} columns: {advice}"
        )

    def _note_on_marks(self, name: str, lines: Sequence[int]) -> str:
        values = f"{len(lines):,} values of column {name!r} keep the quotation marks around them"
        if self.quoting:
            return (
                f"{values}, as a blank stands in front (first: line {lines[0]}): remove the blanks"
                " between separators and quotation marks"
            )
        return (
            f"{values}, as a TSV file has no quoting (first: line {lines[0]}): if they only enclose"
            f" the values, call the file .csv and give --separator {_spelled(self.separator)}"
        )

    def _lines_like_rows(
        self, row: Row, broken: Break, *, label_at: int
    ) -> Iterator[_LinesLikeRows]:
        """The field, if at least half of its lines have the values of a row.

        The first line is what is left of a row, and the last one begins a row.
        """
        field, separator = row.fields[broken.column], self.separator.encode()
        labels: list[str | None] = []
        like_rows, number, position = 0, broken.first, 0
        while number < broken.first + _JUDGED_LINES and position <= len(field):
            match = _END_OF_LINE.search(field, position)
            line = bytes(field[position : match.start() if match else len(field)])
            start = broken.column if number == broken.first else 0
            stop = len(self.names) if match else broken.column + 1
            if line.strip() and start <= label_at < stop:
                fits = line.count(separator) == stop - start - 1
                label = value_of(line.split(separator)[label_at - start]) if fits else None
                labels.append(label or None)
                like_rows += bool(label)
            if match is None:
                break
            number, position = number + 1, match.end()
        if like_rows and 2 * like_rows >= len(labels):
            lines = broken.last - broken.first + 1
            yield _LinesLikeRows(_place(broken.first, broken.last), lines, labels)

    def _refuse_swallowed_rows(
        self, suspects: Sequence[_LinesLikeRows], *, known: Collection[str]
    ) -> None:
        """Raise DataError where the lines in a quoted field are rows of their own.

        A text that begins with a quotation mark opens a field, and one that ends with a quotation
        mark may close it many rows later. Then the lines between have the fields of a row, and a
        label that other rows or lines have as well. In a text of several lines that is the
        exception. So a field is refused when at least half of its lines are like that.
        """
        for suspect in suspects:
            counts = Counter(suspect.labels)
            like_rows = sum(
                label is not None and (label in known or counts[label] > 1)
                for label in suspect.labels
            )
            if like_rows and 2 * like_rows >= len(suspect.labels):
                raise DataError(
                    f"{self.path}, {suspect.place}: one field in quotation marks holds {like_rows}"
                    " lines that look like rows: double the quotation marks inside of fields,"
                    " call the file .tsv and give --separator"
                    f" {_spelled(self.separator)} if they are plain characters, or write the"
                    " file as JSONL if the field is right"
                )


def rows_of(
    path: Path, data: bytes, *, separator: str, quoting: bool, start: int = 0
) -> Iterator[Row]:
    """The rows of a file's UTF-8 bytes from `start` on, without empty lines.

    With `quoting` they are those of RFC 4180, as Python's `csv` reads them in its strict mode.
    Raises DataError, naming the line, for a quotation mark that opens a field and does not end it.
    """
    divider = separator.encode()
    position, line = start, 1 + _breaks(data, 0, start)
    quoted: list[int]
    breaks: list[Break]
    fields: list[bytes | memoryview]
    while position < len(data):
        first, quoted, breaks = line, [], []
        match = _END_OF_LINE.search(data, position)
        end = match.start() if match else len(data)
        if quoting and data.find(b'"', position, end) >= 0:
            fields = []
            while True:
                if data.startswith(b'"', position):
                    stop = _end_of_quoted(path, data, position, separator=separator, line=line)
                    field = _slice(data, position + 1, stop - 1)
                    if data.find(b'""', position + 1, stop - 1) >= 0:
                        field = data[position + 1 : stop - 1].replace(b'""', b'"')
                    quoted.append(len(fields))
                    if count := _breaks(data, position, stop):
                        breaks.append(Break(len(fields), line, line + count))
                        line += count
                    if stop > end:  # the end of line that was found is in the field
                        match = _END_OF_LINE.search(data, stop)
                        end = match.start() if match else len(data)
                else:
                    stop = data.find(divider, position, end)
                    stop = end if stop < 0 else stop
                    field = _slice(data, position, stop)
                fields.append(field)
                position = stop + len(divider)
                if stop == end:
                    break
        elif end - position <= PIECE:
            fields = [*data[position:end].split(divider)]
        else:
            fields = []
            while (stop := data.find(divider, position, end)) >= 0:
                fields.append(_slice(data, position, stop))
                position = stop + len(divider)
            fields.append(_slice(data, position, end))
        if len(fields) > 1 or value_of(fields[0]):
            yield Row(fields, first, line, quoted, breaks)
        position = match.end() if match else len(data)
        line += 1


def _end_of_quoted(path: Path, data: bytes, start: int, *, separator: str, line: int) -> int:
    """Where the field ends that the quotation mark at `start` opens, its last mark included."""
    match = _QUOTED.match(data, start)
    ends = (separator.encode(), b"\r", b"\n")
    if match and (match.end() == len(data) or data.startswith(ends, match.end())):
        return match.end()
    stop = match.end() - 1 if match else len(data)
    while stop > start and data[stop - 1] in b"\r\n":
        stop -= 1
    last = line + _breaks(data, start, stop)
    raise DataError(
        f"{path}, line {line}: a quotation mark opens a field, and up to line {last} none closes it"
        " directly in front of a separator: double the quotation marks inside of fields, or call"
        f" the file .tsv and give --separator {_spelled(separator)} if its quotation marks are"
        " plain characters"
    )


def _slice(data: bytes, start: int, stop: int) -> bytes | memoryview:
    """The bytes between two places: a copy of short ones, which takes less than a view."""
    return data[start:stop] if stop - start <= PIECE else memoryview(data)[start:stop]


def _breaks(data: bytes, start: int, stop: int) -> int:
    """How many line breaks stand between two places."""
    return (
        data.count(b"\n", start, stop)
        + data.count(b"\r", start, stop)
        - data.count(b"\r\n", start, stop)
    )


def _folded(name: str) -> str:
    """The name of a column whatever its capitals, and without the mark that may begin a file."""
    return name.lstrip("\ufeff").strip().casefold()


def _place(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _spelled(separator: str) -> str:
    """A separator as a shell takes it."""
    return "tab" if separator == "\t" else f"'{separator}'"
