"""Parquet: values that are text, or have one spelling as text; class names that the file brings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from pyarrow import types

from evalmode.model.reading.source import Columns, first_error, value_of
from evalmode.model.texts import DataError

_OF_TEXT = (types.is_string, types.is_large_string, types.is_string_view)
_OF_BYTES = (
    *_OF_TEXT,
    types.is_binary,
    types.is_large_binary,
    types.is_binary_view,
    types.is_fixed_size_binary,
)
# Rows that are made Python's bytes at once, where they are short: five times as fast as one by one.
_SLICE_ROWS, _SLICE_BYTES = 1_024, 1_048_576


class Parquet:
    """A Parquet file. Only the two columns that are asked for are read.

    Strings stay, bytes must be UTF-8, integers have all of their digits, true is "true", and a
    floating-point number is the shortest text that reads back as it. null and NaN are no value. A
    column that Hugging Face's datasets wrote as ClassLabel has its class names, and -1 is no value.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        # Arrow's own allocator keeps the pages of what was freed: 60 MB for a text of 20 MB.
        pool = pyarrow.default_memory_pool()
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        try:
            self._file: pyarrow.parquet.ParquetFile | None = pyarrow.parquet.ParquetFile(file)
            self._schema = self._file.schema_arrow
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(error) from error
        finally:
            pyarrow.set_memory_pool(pool)
        self.names = tuple(self._schema.names)
        if self._file.metadata.num_rows == 0:
            raise DataError(f"{path} holds columns and no rows")

    def read(self, *, text: str, label: str) -> Columns:
        """The two columns; raises DataError, naming the column, type and row, for other values.

        It can be called once.
        """
        file = self._file
        assert file is not None, "a Parquet file is read once"
        try:
            labels = self._strings(label, file.read(columns=[label]).column(label))
            column = file.read(columns=[text]).column(text)
            file = self._file = None  # it holds the pages that were read, beside their values
            texts = self._strings(text, column)
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise self._unreadable(error) from error
        return Columns(texts=texts, labels=labels, unit="row", numbers=range(1, len(texts) + 1))

    def _strings(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        kind = column.type
        if types.is_dictionary(kind):
            return self._of_dictionaries(name, column)
        if types.is_null(kind):
            return [None] * len(column)
        if any(is_of_kind(kind) for is_of_kind in _OF_BYTES):
            return self._decoded(name, column)
        if types.is_boolean(kind):
            return [None if value is None else str(value).lower() for value in column.to_pylist()]
        if types.is_integer(kind):
            return self._named(name, column.to_pylist())
        if types.is_floating(kind):
            if self._class_names(name) is not None:
                # pandas writes whole numbers as floats where a value is missing.
                return self._named(name, self._whole(name, column.to_pylist()))
            return self._spelled(name, column)
        raise DataError(
            f"{self.path}: column {name!r} is of the type {kind}, and strings, numbers, booleans or"
            " UTF-8 bytes are needed: name another column, or write this one as strings"
        )

    def _of_dictionaries(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        """Each value of a dictionary is one text, however many rows have it."""
        texts: list[str | None] = []
        for chunk in column.chunks:
            values = self._strings(name, pyarrow.chunked_array([chunk.dictionary]))
            numbers = chunk.indices.to_pylist()
            texts += [None if number is None else values[number] for number in numbers]
        return texts

    def _decoded(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        texts: list[str | None] = []
        for start in range(0, len(column), _SLICE_ROWS):
            part = column.slice(start, _SLICE_ROWS)
            values: Iterable[Any]
            if part.nbytes <= _SLICE_BYTES:
                binary = not any(is_text(column.type) for is_text in _OF_TEXT)
                values = (part if binary else part.cast(pyarrow.large_binary())).to_pylist()
            else:  # a long value is decoded where it stands, and not copied first
                values = (value.as_buffer() for value in part)
            for row, value in enumerate(values, start=start + 1):
                try:
                    texts.append(None if value is None else value_of(value))
                except UnicodeDecodeError:
                    position = first_error(bytes(value))
                    raise DataError(
                        f"{self.path}, row {row}: column {name!r} holds bytes that are not UTF-8"
                        f" (byte {position + 1} is 0x{value[position]:02x}): write it as UTF-8"
                        " strings"
                    ) from None
        return texts

    def _named(self, name: str, values: Sequence[int | None]) -> list[str | None]:
        class_names = self._class_names(name)
        if class_names is None:
            return [None if value is None else str(value) for value in values]
        words: list[str | None] = []
        for row, value in enumerate(values, start=1):
            if value is not None and not -1 <= value < len(class_names):
                raise DataError(
                    f"{self.path}, row {row}: column {name!r} holds {value}, and its ClassLabel"
                    f" names the classes 0 to {len(class_names) - 1}: mend the row or the names"
                )
            words.append(None if value is None or value == -1 else class_names[value])
        return words

    def _whole(self, name: str, values: Sequence[float | None]) -> list[int | None]:
        """The numbers of classes, written as floats; None for NaN."""
        numbers: list[int | None] = []
        for row, value in enumerate(values, start=1):
            if value is None or value != value:
                numbers.append(None)
            elif value.is_integer():
                numbers.append(int(value))
            else:
                raise DataError(
                    f"{self.path}, row {row}: column {name!r} holds {value}, and its ClassLabel"
                    " names whole numbers: mend the row or the names"
                )
        return numbers

    def _class_names(self, name: str) -> list[str] | None:
        """What the file's Hugging Face metadata calls the classes of a column; None: nothing."""
        try:
            described = json.loads((self._schema.metadata or {})[b"huggingface"])
            feature = described["info"]["features"][name]
            is_class_label = feature["_type"] == "ClassLabel"
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        if not is_class_label:
            return None
        names = feature.get("names")
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(class_name, str) and class_name.strip() for class_name in names)
            or len({class_name.strip() for class_name in names}) < len(names)
        ):
            raise DataError(
                f"{self.path}: column {name!r} is a ClassLabel, and its names are not a list of"
                " different strings: write the labels as strings"
            )
        return names

    def _spelled(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        numbers = column.to_numpy()  # keeps the width: float32 0.1 is "0.1"; null becomes NaN
        words: list[str | None] = []
        for row, number in enumerate(numbers, start=1):
            word = str(number)
            if word in ("inf", "-inf"):
                raise DataError(
                    f"{self.path}, row {row}: column {name!r} holds {word}: write it as strings"
                )
            words.append(None if word == "nan" else word)
        return words

    def _unreadable(self, error: Any) -> DataError:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return DataError(
            f"{self.path} cannot be read as Parquet ({reason}): is the file whole, and is it"
            " Parquet?"
        )
