"""CSV and TSV: every value is the text that stands there, and a row that does not fit is refused.

Fields are slices of the file's text. Python's own reader holds each field and its source in four
bytes a character: a text of 20 MB takes 200 MB there. Arrow's reader accepts text after a closing
quotation mark, and does not say in which line a row begins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalmode.model.reading.source import Columns
from evalmode.model.texts import DataError

TAB_NAMES = ("\t", "\\t", "tab")
LIKELY_SEPARATORS = (",", "\t", ";", "|")

_END_OF_LINE = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Row:
    """The fields of one row, and the first and the last line that it stands in."""

    fields: list[str]
    first: int
    last: int

    @property
    def place(self) -> str:
        """The lines, as an error names them."""
        if self.first == self.last:
            return f"line {self.first}"
        return f"lines {self.first} to {self.last}"


class Delimited:
    """A file of rows whose fields a separator divides; the first row names the columns.

    CSV follows RFC 4180: a field in quotation marks may hold separators, line breaks and doubled
    quotation marks. In TSV a quotation mark is a character like any other. Empty lines are no rows.
    """

    def __init__(self, path: Path, text: str, *, separator: str | None) -> None:
        self.path = path
        self.quoting = path.suffix.lower() == ".csv"
        if separator is not None:
            self.separator = "\t" if separator in TAB_NAMES else separator
        else:
            self.separator = "," if self.quoting else "\t"
        self._rows = rows_of(path, text, separator=self.separator, quoting=self.quoting)
        header = next(self._rows, None)
        if header is None:
            raise DataError(f"{path} is empty: its first line must name the columns")
        if header.last > header.first:
            raise DataError(
                f"{path}: the header goes over {header.place}: is there a stray quotation mark in"
                f" line {header.first}? The name of a column must be in one line"
            )
        self.names = tuple(name.strip() for name in header.fields)
        if len(self.names) == 1:
            self._refuse_one_column(self.names[0])

    def read(self, *, text: str, label: str) -> Columns:
        """The two columns; raises DataError, naming the line, where a row does not fit the header.

        A field that has swallowed rows, because a quotation mark in a text opened it, is refused.
        """
        text_at, label_at = self.names.index(text), self.names.index(label)
        texts, labels, numbers = [], [], []
        broken_rows: list[Row] = []  # rows with a line break in one of their fields
        quoted_texts = 0
        for row in self._rows:
            if len(row.fields) != len(self.names):
                raise DataError(
                    f"{self.path}, {row.place}: {len(row.fields)} fields, and the header names"
                    f" {len(self.names)} columns: put quotation marks around a value that holds the"
                    f" separator, or mend the {'line' if row.first == row.last else 'lines'}"
                )
            value = row.fields[text_at]
            texts.append(value)
            labels.append(row.fields[label_at])
            numbers.append(row.first)
            if row.last > row.first:
                broken_rows.append(row)
            quoted_texts += len(value) > 1 and value[0] == value[-1] == '"'
        if not texts:
            raise DataError(f"{self.path} holds a header and no rows")
        self._refuse_swallowed_rows(broken_rows, labels, label_at=label_at)
        notes: tuple[str, ...] = ()
        if quoted_texts and not self.quoting:
            notes = (
                f"{quoted_texts:,} texts stand in quotation marks, which a TSV file keeps: if they"
                " only enclose the texts, call the file .csv and give --separator tab",
            )
        return Columns(texts=texts, labels=labels, unit="line", numbers=numbers, notes=notes)

    def _refuse_one_column(self, name: str) -> None:
        for separator in LIKELY_SEPARATORS:
            if separator in name:
                raise DataError(
                    f"{self.path}: the header holds one column, {name!r}, when"
                    f" {_spelled(self.separator)} separates columns: give --separator"
                    f" {_spelled(separator)}"
                )
        raise DataError(
            f"{self.path}: the header holds one column, {name!r}, and a column of texts and one of"
            " labels are needed: name the columns in the first line, or give --separator"
        )

    def _refuse_swallowed_rows(
        self, rows: Sequence[Row], labels: Sequence[str], *, label_at: int
    ) -> None:
        """Raise DataError where the lines in a quoted field are rows of their own.

        A text that begins with a quotation mark opens a field, and one that ends with a quotation
        mark may close it many rows later. Then the lines between have the fields of a row, and a
        label that other rows or lines have as well. In a text of several lines that is the
        exception. So a field is refused when at least half of its lines are like that.
        """
        known = set(labels)
        for row in rows:
            if _broken(row.fields[label_at]):
                raise DataError(
                    f"{self.path}, {row.place}: a label that goes over several lines: is there a"
                    f" stray quotation mark in line {row.first}?"
                )
            for column, field in enumerate(row.fields):
                if not _broken(field):
                    continue
                line_labels: list[str | None] = []
                lines = _END_OF_LINE.split(field)
                for number, line in enumerate(lines):
                    # The first line is what is left of a row, and the last one begins a row.
                    start = column if number == 0 else 0
                    stop = column + 1 if number == len(lines) - 1 else len(self.names)
                    if line.strip() and start <= label_at < stop:
                        values = line.split(self.separator)
                        fits = len(values) == stop - start
                        line_labels.append((values[label_at - start] or None) if fits else None)
                counts = Counter(line_labels)
                like_rows = sum(
                    label is not None and (label in known or counts[label] > 1)
                    for label in line_labels
                )
                if like_rows and 2 * like_rows >= len(line_labels):
                    raise DataError(
                        f"{self.path}, {row.place}: one field in quotation marks holds {like_rows}"
                        " lines that look like rows: double the quotation marks inside of fields,"
                        " call the file .tsv and give --separator"
                        f" {_spelled(self.separator)} if they are plain characters, or write the"
                        " file as JSONL if the field is right"
                    )


def rows_of(path: Path, text: str, *, separator: str, quoting: bool) -> Iterator[Row]:
    """The rows of a file's text, without empty lines.

    With `quoting` they are those of RFC 4180, as Python's `csv` reads them in its strict mode.
    Raises DataError, naming the line, for a quotation mark that opens a field and does not end it.
    """
    plain = re.compile(rf"[^{re.escape(separator)}\r\n]*")
    position, line = 0, 1
    while position < len(text):
        first = line
        match = _END_OF_LINE.search(text, position)
        end = match.start() if match else len(text)
        if not quoting or text.find('"', position, end) < 0:
            fields = text[position:end].split(separator)
        else:
            fields = []
            while True:
                start = position
                if text.startswith('"', start):
                    position = _end_of_quoted(path, text, start, separator=separator, line=line)
                    value = text[start + 1 : position - 1].replace('""', '"')
                    line += _breaks(value)
                else:
                    position = plain.match(text, start).end()  # type: ignore[union-attr]
                    value = text[start:position]
                fields.append(value)
                if not text.startswith(separator, position):
                    break
                position += 1
            match = _END_OF_LINE.match(text, position)
        if len(fields) > 1 or fields[0].strip():
            yield Row(fields, first, line)
        position = match.end() if match else len(text)
        line += 1


def _end_of_quoted(path: Path, text: str, start: int, *, separator: str, line: int) -> int:
    """Where the field ends that the quotation mark at `start` opens, its last mark included."""
    end = text.find('"', start + 1)
    while end > 0 and text.startswith('"', end + 1):
        end = text.find('"', end + 2)
    if end > 0 and (end + 1 == len(text) or text.startswith((separator, "\r", "\n"), end + 1)):
        return end + 1
    last = line + _breaks(text[start : end if end > 0 else len(text)].rstrip("\r\n"))
    raise DataError(
        f"{path}, line {line}: a quotation mark opens a field, and up to line {last} none closes it"
        " in front of a separator: double the quotation marks inside of fields, or call the file"
        f" .tsv and give --separator {_spelled(separator)} if its quotation marks are plain"
        " characters"
    )


def _broken(value: str) -> bool:
    return "\n" in value or "\r" in value


def _breaks(value: str) -> int:
    """How many line breaks a value holds."""
    return value.count("\n") + value.count("\r") - value.count("\r\n")


def _spelled(separator: str) -> str:
    """A separator as a shell takes it."""
    return "tab" if separator == "\t" else f"'{separator}'"
