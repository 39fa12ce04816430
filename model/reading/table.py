"""Opening a file of rows in the format of its ending."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evalmode.model.data_set import DataError
from evalmode.model.reading.csv_tsv import CsvTable
from evalmode.model.reading.json_lines import JsonLinesTable
from evalmode.model.reading.source import Table, content_of, open_file

CSV_OR_TSV = (".csv", ".tsv")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
ENDINGS = CSV_OR_TSV + JSON_LINES + PARQUET
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".br")


@contextmanager
def open_table(path: Path, *, separator: str | None = None) -> Iterator[Table]:
    """Open the file of exactly this name as a table; `separator` is for CSV and TSV only.

    Raises DataError with one sentence that names the file and says what to change.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        problem = f"the ending {path.suffix!r}, which is not read" if ending else "no ending"
        advice = "unpack it, and give" if ending in COMPRESSED else "give 'languages' or"
        raise DataError(f"{path} has {problem}: {advice} a file that ends in {', '.join(ENDINGS)}")
    if separator is not None and ending not in CSV_OR_TSV:
        raise DataError(
            f"separator={separator!r} is for CSV and TSV files, and {path} is neither: remove"
            " --separator"
        )
    with open_file(path) as file:
        if ending in PARQUET:
            # pyarrow takes half a second to import, and the other formats do not need it.
            from evalmode.model.reading.parquet import ParquetTable

            yield ParquetTable(path, file)
        elif ending in JSON_LINES:
            yield JsonLinesTable(path, content_of(path, file))
        else:
            yield CsvTable(path, content_of(path, file), separator=separator)
