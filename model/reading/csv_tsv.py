"""CSV and TSV: every value is exactly the text in the file, and a row that does not fit is refused.

How a file is read:

1. The separator is the one that the user gives, else that of a line such as `sep=;` in front of the
   header, else a comma in a .csv file and a tab in any other.
2. In a .csv file a field in quotation marks may hold separators, line breaks and doubled quotation
   marks (RFC 4180). In a .tsv file a quotation mark is a character like any other.
3. The first row names the columns. A later row that names them again is left out and counted.
4. Empty lines are no rows. A row with more or fewer fields than the header is refused.
5. A field that swallowed rows, because a stray quotation mark opened it, is refused.

Fields are slices of the file's bytes, and only the two columns that are read become strings. The
`csv` module of Python holds each field and its source in four bytes a character, so a text of 20 MB
takes 200 MB. Arrow's reader accepts text behind a closing quotation mark, and does not say in which
line a row begins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evalmode.model.data_set import DataError
from evalmode.model.reading.source import PIECE, Columns, shortened, value_of

TAB_NAMES = ("\t", "\\t", "tab")
LIKELY_SEPARATORS = (",", "\t", ";", "|")

# Lines of one field that are compared with rows. A text of 20 MB can have millions of lines.
_EXAMINED_LINES = 1_000

_END_OF_LINE = re.compile(rb"\r\n|\r|\n")
# Possessive, so that a match keeps no positions to go back to.
_QUOTED = re.compile(rb'"(?:[^"]++|"")*+"')
# Excel writes and reads this line in front of the header.
_SEPARATOR_LINE = re.compile(rb'\s*+"?sep=([^"\r\n]{1,4})"?[ \t]*(?:\r\n|\r|\n)', re.IGNORECASE)


class MultilineField(NamedTuple):
    """A field of several lines: its column, and its first and last line in the file."""

    column: int
    first_line: int
    last_line: int


class Row(NamedTuple):
    """The fields of one row as bytes, and its first and last line in the file.

    quoted      columns with a field in quotation marks; the field is without them
    multiline   the fields of several lines
    """

    fields: Sequence[bytes | memoryview]
    first_line: int
    last_line: int
    quoted: Sequence[int] = ()
    multiline: Sequence[MultilineField] = ()

    @property
    def lines(self) -> str:
        """The lines as an error message names them, such as "lines 3 to 5"."""
        return _line_range(self.first_line, self.last_line)


@dataclass(frozen=True)
class _FieldLikeRows:
    """A field of which at least half of the lines have as many separators as a row.

    labels      for each line, what would be its label if it were a row; None for other lines
    """

    lines: str
    line_count: int
    labels: Sequence[str | None]


class CsvTable:
    """A CSV or TSV file; the docstring of the module says how it is read.

    Raises DataError, naming the line, for a file without a usable header.
    """

    def __init__(self, path: Path, data: bytes, *, separator: str | None) -> None:
        self.path = path
        self.has_quoting = path.suffix.lower() == ".csv"

        separator_line = _SEPARATOR_LINE.match(data)
        start, named_separator = 0, ""
        if separator_line is not None:
            start, named_separator = (
                separator_line.end(),
                separator_line[1].decode(errors="replace"),
            )
        if separator is not None:
            self.separator = "\t" if separator in TAB_NAMES else separator
        elif len(named_separator) == 1:
            self.separator = named_separator
        else:
            self.separator = "," if self.has_quoting else "\t"

        self._rows = rows_of(
            path, data, separator=self.separator, has_quoting=self.has_quoting, start=start
        )
        header = next(self._rows, None)
        if header is None:
            raise DataError(f"{path} is empty: its first line must name the columns")
        if header.last_line > header.first_line:
            raise DataError(
                f"{path}: the header goes over {header.lines}: is there a stray quotation mark in"
                f" line {header.first_line}? The name of a column must be in one line"
            )
        self.names = tuple(value_of(name) for name in header.fields)
        if len(self.names) == 1:
            self._refuse_one_column()

    def read(self, *, text: str, label: str) -> Columns:
        """The columns named `text` and `label`.

        Raises DataError, naming the line, for a row that does not fit the header and for a field
        that swallowed rows.
        """
        text_column, label_column = self.names.index(text), self.names.index(label)
        folded_names = [_folded(name) for name in self.names]
        texts, labels, numbers = [], [], []
        headers = 0
        suspects: list[_FieldLikeRows] = []
        marked_lines: dict[int, list[int]] = {text_column: [], label_column: []}
        for row in self._rows:
            if len(row.fields) != len(self.names):
                raise self._wrong_field_count(row)
            label_value = value_of(row.fields[label_column])

            # A header again. The label alone is compared first, because most rows end here.
            if _folded(label_value) in folded_names:
                values = [_folded(value_of(field)) for field in row.fields]
                if values == folded_names:
                    headers += 1
                    continue
                if len(values) > 1 and sorted(values) == sorted(folded_names):
                    raise DataError(
                        f"{self.path}, {row.lines}: the columns are named again, in another order"
                        " than in the header: join only files whose columns are in one order, or"
                        " remove the row"
                    )

            for field in row.multiline:
                if field.column == label_column:
                    raise DataError(
                        f"{self.path}, {row.lines}: a label that goes over several lines: is there"
                        f" a stray quotation mark in line {row.first_line}?"
                    )
                suspect = self._field_like_rows(row, field, label_column=label_column)
                if suspect is not None:
                    suspects.append(suspect)

            text_value = value_of(row.fields[text_column])
            texts.append(text_value)
            labels.append(label_value)
            numbers.append(row.first_line)
            for column, value in ((text_column, text_value), (label_column, label_value)):
                is_enclosed = value[:1] == value[-1:] == '"' and len(value) > 1
                if is_enclosed and column not in row.quoted:
                    marked_lines[column].append(row.first_line)
        if not texts:
            raise DataError(f"{self.path} holds a header and no rows")
        self._refuse_swallowed_rows(suspects, labels=set(labels))

        marked, notes = [], []
        for column, lines in marked_lines.items():
            if lines:
                marked.append(self.names[column])
                notes.append(self._note_on_marks(self.names[column], lines))
        if suspects:
            fields = "one field holds" if len(suspects) == 1 else f"{len(suspects):,} fields hold"
            notes.append(
                f"{fields} several lines that have as many separators as rows (first:"
                f" {suspects[0].lines}, {suspects[0].line_count:,} lines in one field): if they are"
                " rows, a stray quotation mark opens the field: remove it, or double it in a field"
                " that is enclosed in quotation marks"
            )
        return Columns(
            texts=texts,
            labels=labels,
            unit="line",
            numbers=numbers,
            headers=headers,
            marked=marked,
            notes=tuple(notes),
        )

    def _refuse_one_column(self) -> None:
        (name,) = self.names
        for separator in LIKELY_SEPARATORS:
            if separator in name:
                raise DataError(
                    f"{self.path}: the header holds one column, {shortened(name)}, when"
                    f" {_shell_quoted(self.separator)} separates columns: give --separator"
                    f" {_shell_quoted(separator)}"
                )
        raise DataError(
            f"{self.path}: the header holds one column, {shortened(name)}, and a column of texts"
            " and one of labels are needed: name the columns in the first line, or give --separator"
        )

    def _wrong_field_count(self, row: Row) -> DataError:
        lines = "line" if row.first_line == row.last_line else "lines"
        advice = (
            f"put quotation marks around a value that holds the separator, or correct the {lines}"
        )
        if self.has_quoting:
            for column, field in enumerate(row.fields):
                beginning = bytes(field[:PIECE]).lstrip()
                if column not in row.quoted and beginning.startswith(b'"'):
                    advice = (
                        "remove the blank in front of a quotation mark, because the mark encloses"
                        " no value there"
                    )
        return DataError(
            f"{self.path}, {row.lines}: {len(row.fields)} fields, and the header names"
            f" {len(self.names)} columns: {advice}"
        )

    def _note_on_marks(self, name: str, lines: Sequence[int]) -> str:
        values = f"{len(lines):,} values of column {name!r} keep the quotation marks around them"
        if self.has_quoting:
            return (
                f"{values}, as a blank stands in front (first: line {lines[0]}): remove the blanks"
                " between separators and quotation marks"
            )
        return (
            f"{values}, as a TSV file has no quoting (first: line {lines[0]}): if they only enclose"
            f" the values, call the file .csv and give --separator {_shell_quoted(self.separator)}"
        )

    def _field_like_rows(
        self, row: Row, field: MultilineField, *, label_column: int
    ) -> _FieldLikeRows | None:
        """The field, if at least half of its lines have as many separators as a row; else None.

        If the field swallowed rows, its first line is the end of a row: it has only the columns
        from `field.column` on. Its last line is the beginning of a row.
        """
        data, separator = row.fields[field.column], self.separator.encode()
        labels: list[str | None] = []
        row_count, position = 0, 0
        for line_number in range(field.first_line, field.first_line + _EXAMINED_LINES):
            end_of_line = _END_OF_LINE.search(data, position)
            is_last = end_of_line is None
            line = bytes(data[position : len(data) if end_of_line is None else end_of_line.start()])
            start = field.column if line_number == field.first_line else 0
            stop = field.column + 1 if is_last else len(self.names)
            if line.strip() and start <= label_column < stop:
                label = None
                if line.count(separator) == stop - start - 1:
                    label = value_of(line.split(separator)[label_column - start]) or None
                labels.append(label)
                row_count += label is not None
            if end_of_line is None:
                break
            position = end_of_line.end()
        if row_count == 0 or 2 * row_count < len(labels):
            return None
        line_count = field.last_line - field.first_line + 1
        return _FieldLikeRows(_line_range(field.first_line, field.last_line), line_count, labels)

    def _refuse_swallowed_rows(
        self, suspects: Sequence[_FieldLikeRows], *, labels: Collection[str]
    ) -> None:
        """Raise DataError if the lines in a quoted field are rows.

        A text that begins with a quotation mark opens a field. A text that ends with a quotation
        mark may close it many rows later. The lines between have the fields of a row, and a label
        that other rows or lines have as well. In a text of several lines that is the exception, so
        a field is refused if at least half of its lines are like that.
        """
        for suspect in suspects:
            counts = Counter(suspect.labels)
            row_count = 0
            for label in suspect.labels:
                if label is not None and (label in labels or counts[label] > 1):
                    row_count += 1
            if row_count > 0 and 2 * row_count >= len(suspect.labels):
                raise DataError(
                    f"{self.path}, {suspect.lines}: one field in quotation marks holds {row_count}"
                    " lines that look like rows: double the quotation marks inside of fields,"
                    " call the file .tsv and give --separator"
                    f" {_shell_quoted(self.separator)} if they are plain characters, or write the"
                    " file as JSONL if the field is right"
                )


def rows_of(
    path: Path, data: bytes, *, separator: str, has_quoting: bool, start: int = 0
) -> Iterator[Row]:
    """The rows of a file's UTF-8 bytes from the byte `start` on, without empty lines.

    With quoting they are those of RFC 4180, as Python's `csv` reads them in its strict mode. Raises
    DataError, naming the line, for a quotation mark that opens a field that never ends.
    """
    separator_bytes = separator.encode()
    position, line = start, 1 + _line_breaks(data, 0, start)
    quoted: list[int]
    multiline: list[MultilineField]
    fields: list[bytes | memoryview]
    while position < len(data):
        first_line, quoted, multiline = line, [], []
        end_of_line = _END_OF_LINE.search(data, position)
        end = len(data) if end_of_line is None else end_of_line.start()

        if has_quoting and data.find(b'"', position, end) >= 0:
            # Slow and exact: field by field, each with or without quotation marks.
            fields = []
            while True:
                if data.startswith(b'"', position):
                    stop = _end_of_quoted(path, data, position, separator=separator, line=line)
                    field = _slice(data, position + 1, stop - 1)
                    if data.find(b'""', position + 1, stop - 1) >= 0:
                        field = data[position + 1 : stop - 1].replace(b'""', b'"')
                    quoted.append(len(fields))
                    breaks = _line_breaks(data, position, stop)
                    if breaks:
                        multiline.append(MultilineField(len(fields), line, line + breaks))
                        line += breaks
                    if stop > end:
                        # The field goes beyond the end of line above: the row ends at a later one.
                        end_of_line = _END_OF_LINE.search(data, stop)
                        end = len(data) if end_of_line is None else end_of_line.start()
                else:
                    stop = data.find(separator_bytes, position, end)
                    if stop < 0:
                        stop = end
                    field = _slice(data, position, stop)
                fields.append(field)
                position = stop + len(separator_bytes)
                if stop == end:
                    break
        elif end - position <= PIECE:
            # Nearly every row of a usual file.
            fields = [*data[position:end].split(separator_bytes)]
        else:
            # A long row is sliced instead of split: a split copies it.
            fields = []
            while (stop := data.find(separator_bytes, position, end)) >= 0:
                fields.append(_slice(data, position, stop))
                position = stop + len(separator_bytes)
            fields.append(_slice(data, position, end))

        if len(fields) > 1 or value_of(fields[0]):
            yield Row(fields, first_line, line, quoted, multiline)
        position = len(data) if end_of_line is None else end_of_line.end()
        line += 1


def _end_of_quoted(path: Path, data: bytes, start: int, *, separator: str, line: int) -> int:
    """The index behind the closing mark of the field that the quotation mark at `start` opens.

    Raises DataError if nothing closes it, or if the closing mark stands in front of other text.
    """
    match = _QUOTED.match(data, start)
    ends = (separator.encode(), b"\r", b"\n")
    if match and (match.end() == len(data) or data.startswith(ends, match.end())):
        return match.end()
    stop = len(data) if match is None else match.end() - 1
    while stop > start and data[stop - 1] in b"\r\n":
        stop -= 1
    last_line = line + _line_breaks(data, start, stop)
    raise DataError(
        f"{path}, line {line}: a quotation mark opens a field, and up to line {last_line} none"
        " closes it directly in front of a separator: double the quotation marks inside of fields,"
        f" or call the file .tsv and give --separator {_shell_quoted(separator)} if its quotation"
        " marks are plain characters"
    )


def _slice(data: bytes, start: int, stop: int) -> bytes | memoryview:
    """A copy of short bytes, which takes less memory than a view; a view of long ones."""
    if stop - start <= PIECE:
        return data[start:stop]
    return memoryview(data)[start:stop]


def _line_breaks(data: bytes, start: int, stop: int) -> int:
    """The number of line breaks in data[start:stop]; CR LF is one."""
    line_feeds = data.count(b"\n", start, stop)
    carriage_returns = data.count(b"\r", start, stop)
    return line_feeds + carriage_returns - data.count(b"\r\n", start, stop)


def _folded(name: str) -> str:
    """The name of a column without capitals, and without a byte order mark of a joined file."""
    return name.lstrip("\ufeff").strip().casefold()


def _line_range(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _shell_quoted(separator: str) -> str:
    """The separator as a shell accepts it behind --separator."""
    return "tab" if separator == "\t" else f"'{separator}'"
