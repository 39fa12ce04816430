"""Parquet: values that are text or can be written as text, and the class names in the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from pyarrow import types

from evalmode.model.data_set import DataError
from evalmode.model.reading.source import Columns, first_error, value_of

_IS_TEXT = (types.is_string, types.is_large_string, types.is_string_view)
_IS_BYTES = (
    *_IS_TEXT,
    types.is_binary,
    types.is_large_binary,
    types.is_binary_view,
    types.is_fixed_size_binary,
)
# Rows that become Python's bytes in one call if they are short: five times as fast as one by one.
_SLICE_ROWS, _SLICE_BYTES = 1_024, 1_048_576


class ParquetTable:
    """A Parquet file. Only the two columns that `read` names are read.

    Strings stay, bytes must be UTF-8, and integers have all of their digits. true is "true". A
    floating-point number is the shortest text that gives the same number. null and NaN are no
    value. A ClassLabel column of Hugging Face's datasets has its class names, and -1 is no value.

    Raises DataError for a file that is not Parquet or has no rows.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        # Arrow's default allocator does not return freed pages: 60 MB for a text of 20 MB.
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
        """The two columns; the file can be read once.

        Raises DataError, naming the column and its type, or the row, for values that are no text.
        """
        file = self._file
        assert file is not None, "a Parquet file is read once"
        try:
            labels = self._strings(label, file.read(columns=[label]).column(label))
            column = file.read(columns=[text]).column(text)
            # The file holds the pages that it read. Without it, only their values are in memory.
            file = self._file = None
            texts = self._strings(text, column)
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise self._unreadable(error) from error
        return Columns(texts=texts, labels=labels, unit="row", numbers=range(1, len(texts) + 1))

    def _strings(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        """The values of a column as texts, by the type of the column."""
        kind = column.type
        if types.is_dictionary(kind):
            # Each value of a dictionary becomes one string, however many rows have it.
            texts: list[str | None] = []
            for chunk in column.chunks:
                values = self._strings(name, pyarrow.chunked_array([chunk.dictionary]))
                indices = chunk.indices.to_pylist()
                texts += [None if index is None else values[index] for index in indices]
            return texts
        if types.is_null(kind):
            return [None] * len(column)
        if any(is_kind(kind) for is_kind in _IS_BYTES):
            return self._decoded(name, column)
        if types.is_boolean(kind):
            return [None if value is None else str(value).lower() for value in column.to_pylist()]
        if types.is_integer(kind):
            return self._class_or_number(name, column.to_pylist())
        if types.is_floating(kind):
            if self._class_names(name) is None:
                return self._shortest_decimals(name, column)
            # pandas writes whole numbers as floats where a value is missing.
            return self._class_or_number(name, self._whole_numbers(name, column.to_pylist()))
        raise DataError(
            f"{self.path}: column {name!r} is of the type {kind}, and strings, numbers, booleans or"
            " UTF-8 bytes are needed: name another column, or write this one as strings"
        )

    def _decoded(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        """The values of a column of strings or bytes, decoded in slices of rows."""
        is_text = any(is_kind(column.type) for is_kind in _IS_TEXT)
        texts: list[str | None] = []
        for start in range(0, len(column), _SLICE_ROWS):
            part = column.slice(start, _SLICE_ROWS)
            values: Iterable[Any]
            if part.nbytes > _SLICE_BYTES:
                # A long value is decoded where it is in memory, without a copy.
                values = (value.as_buffer() for value in part)
            elif is_text:
                values = part.cast(pyarrow.large_binary()).to_pylist()
            else:
                values = part.to_pylist()
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

    def _class_or_number(self, name: str, values: Sequence[int | None]) -> list[str | None]:
        """The class name of each number, or its digits if the column has no class names."""
        class_names = self._class_names(name)
        if class_names is None:
            return [None if value is None else str(value) for value in values]
        texts: list[str | None] = []
        for row, value in enumerate(values, start=1):
            if value is None or value == -1:
                texts.append(None)
            elif 0 <= value < len(class_names):
                texts.append(class_names[value])
            else:
                raise DataError(
                    f"{self.path}, row {row}: column {name!r} holds {value}, and its ClassLabel"
                    f" names the classes 0 to {len(class_names) - 1}: correct the row or the names"
                )
        return texts

    def _whole_numbers(self, name: str, values: Sequence[float | None]) -> list[int | None]:
        """Class numbers that were written as floats; None for NaN."""
        numbers: list[int | None] = []
        for row, value in enumerate(values, start=1):
            if value is None or value != value:
                numbers.append(None)
            elif value.is_integer():
                numbers.append(int(value))
            else:
                raise DataError(
                    f"{self.path}, row {row}: column {name!r} holds {value}, and its ClassLabel"
                    " names whole numbers: correct the row or the names"
                )
        return numbers

    def _class_names(self, name: str) -> list[str] | None:
        """The class names of a ClassLabel column in the file's Hugging Face metadata, else None."""
        try:
            metadata = json.loads((self._schema.metadata or {})[b"huggingface"])
            feature = metadata["info"]["features"][name]
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

    def _shortest_decimals(self, name: str, column: pyarrow.ChunkedArray) -> list[str | None]:
        # NumPy keeps the width, so a float32 0.1 is "0.1", and makes NaN of null.
        texts: list[str | None] = []
        for row, number in enumerate(column.to_numpy(), start=1):
            text = str(number)
            if text in ("inf", "-inf"):
                raise DataError(
                    f"{self.path}, row {row}: column {name!r} holds {text}: write it as strings"
                )
            texts.append(None if text == "nan" else text)
        return texts

    def _unreadable(self, error: Any) -> DataError:
        # Only the first line: Arrow's messages may have several.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return DataError(
            f"{self.path} cannot be read as Parquet ({reason}): is the file whole, and is it"
            " Parquet?"
        )
