"""Opening a file of rows by its ending."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evalmode.model.reading.delimited import Delimited
from evalmode.model.reading.json_lines import JsonLines
from evalmode.model.reading.source import Table, content_of, open_file
from evalmode.model.texts import DataError

DELIMITED, JSON_LINES, PARQUET = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet",)
ENDINGS = DELIMITED + JSON_LINES + PARQUET
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".br")


@contextmanager
def open_table(path: Path, *, separator: str | None = None) -> Iterator[Table]:
    """The file of exactly this name, as its ending says; `separator` is for CSV and TSV alone.

    Raises DataError with one sentence that names the file, the place, and the way out.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        ending = f"the ending {path.suffix!r}, which is not read" if ending else "no ending"
        advice = "unpack it, and give" if path.suffix.lower() in PACKED else "give 'languages' or"
        raise DataError(f"{path} has {ending}: {advice} a file that ends in {', '.join(ENDINGS)}")
    if separator is not None and ending not in DELIMITED:
        raise DataError(
            f"separator={separator!r} is for CSV and TSV files, and {path} is neither: leave"
            " --separator away"
        )
    with open_file(path) as file:
        if ending in PARQUET:
            # half a second to import, and the other formats do not need it
            from evalmode.model.reading.parquet import Parquet

            yield Parquet(path, file)
        elif ending in JSON_LINES:
            yield JsonLines(path, content_of(path, file))
        else:
            yield Delimited(path, content_of(path, file), separator=separator)
