"""Labelled texts, from the default data set or a user's file, cleaned and split.

A file is read through `datasets`; a row goes to test, validation or train by a hash of its text, so
the split needs no seed, and a row keeps its place when others are added. Knows nothing of ids,
tensors or training.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalmode.model import languages
from evalmode.model.texts import DataError, Texts

if TYPE_CHECKING:
    from datasets import Dataset

LANGUAGES = "languages"
LETTERLESS_ROWS = (
    1_500  # a fiftieth of the training rows: enough that a text without letters gets even scores
)
TEXT_COLUMNS = (
    "text",
    "sentence",
    "content",
    "review",
    "title",
    "question",
    "document",
    "message",
    "utterance",
    "query",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "language",
    "lang",
    "class",
    "category",
    "target",
    "intent",
    "sentiment",
    "topic",
)
ENDINGS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
FEWEST_ROWS = 30


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Labelled texts in three parts, and texts that have no label but are trained on all the same.

    `labels` is sorted; a label's place in it is its index. The parts share no text.
    """

    name: str
    labels: tuple[str, ...]
    train: Texts
    validation: Texts
    test: Texts
    unlabelled: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Of all the texts and labels, in their order."""
        digest = hashlib.sha256()
        for part in (
            self.train,
            self.validation,
            self.test,
            Texts(self.unlabelled, ("",) * len(self.unlabelled)),
        ):
            digest.update(json.dumps([part.texts, part.labels], ensure_ascii=True).encode())
        return digest.hexdigest()


def open_data(
    source: str, *, text_column: str | None, label_column: str | None, cache: Path
) -> DataSet:
    """`languages`, kept in `cache`, or the file of that name. Raises DataError with one sentence on
    what to mend.
    """
    if source != LANGUAGES:
        return read_file(Path(source), text_column=text_column, label_column=label_column)
    for flag, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None:
            raise DataError(
                f"{flag}={column!r} names a column of a file, and the data is {LANGUAGES!r}: leave"
                " it away"
            )
    parts = languages.load(cache)
    return DataSet(
        name=LANGUAGES,
        labels=tuple(sorted(set(parts["train"].labels))),
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        unlabelled=languages.letterless(LETTERLESS_ROWS, seed=0),
    )


def read_file(
    path: Path, *, text_column: str | None = None, label_column: str | None = None
) -> DataSet:
    """The texts of a CSV, TSV, JSONL or Parquet file, each text once, split 80/10/10.

    Raises DataError, naming the file and the column, row or value, when it cannot be read or
    trained on.
    """
    rows = _table(path)
    text = _column(path, rows, text_column, usual=TEXT_COLUMNS, flag="--text-column")
    label = _column(
        path, rows, label_column, usual=LABEL_COLUMNS, flag="--label-column", taken=text
    )
    texts, labels = (_filled(path, rows[name], name) for name in (text, label))
    pairs = _unambiguous(zip(texts, labels, strict=True))
    known = tuple(sorted({value for _, value in pairs}))
    if len(known) < 2:
        raise DataError(
            f"{path}: column {label!r} holds {len(known)} label(s) {list(known)}, and a classifier"
            " needs at least 2: name another column with --label-column"
        )
    parts = _split(pairs)
    if len(pairs) < FEWEST_ROWS or not all(part.texts for part in parts.values()):
        raise DataError(
            f"{path} has {len(pairs)} usable rows (each text once, those with two labels left out),"
            f" too few to train on and to test with: give at least {FEWEST_ROWS}, better some"
            " hundred"
        )
    return DataSet(
        name=path.name,
        labels=known,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
    )


def _table(path: Path) -> Dataset:
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"{path} has an ending that is not read: give {LANGUAGES!r} or a file in"
            f" {', '.join(ENDINGS)}"
        )
    if not path.is_file():
        raise DataError(
            f"{path} is not there: give {LANGUAGES!r} or the path of a file in {', '.join(ENDINGS)}"
        )
    import datasets  # seconds to import, and the default data set does not need it

    read = {
        "csv": _read_csv,
        "json": datasets.Dataset.from_json,
        "parquet": datasets.Dataset.from_parquet,
    }[kind]
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="evalmode-data-") as folder:
            return read(str(path), cache_dir=folder, keep_in_memory=True)
    except Exception as error:
        # datasets wraps the readers' errors in its own, and pandas raises what it likes.
        cause = str(error.__cause__ or error).strip().splitlines()
        raise DataError(
            f"{path} cannot be read as {path.suffix[1:]}: {cause[0] if cause else error!r}"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_csv(path: str, **options: Any) -> Dataset:
    """A CSV or TSV file with every column a string: its "NA" and "null" are words, and its "007" is
    a label.
    """
    import datasets

    separator = "\t" if path.lower().endswith(".tsv") else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return datasets.Dataset.from_csv(
        path, features=features, sep=separator, na_filter=False, encoding="utf-8-sig", **options
    )


def _column(
    path: Path,
    rows: Dataset,
    asked: str | None,
    *,
    usual: Sequence[str],
    flag: str,
    taken: str = "",
) -> str:
    """The column that was asked for, or the first usual one that is there, whatever its
    capitals.
    """
    there = ", ".join(map(repr, rows.column_names))
    if asked is not None:
        if asked not in rows.column_names:
            raise DataError(f"{path} has no column {asked!r}: {flag} can be one of {there}")
        return asked
    folded = {name.lower(): name for name in rows.column_names if name != taken}
    found = next((folded[name] for name in usual if name in folded), None)
    if found is None:
        raise DataError(
            f"{path} has none of the usual columns ({', '.join(usual)}): name one with {flag}:"
            f" {there}"
        )
    return found


def _filled(path: Path, values: Iterable[Any], column: str) -> list[str]:
    """The values as strings without blanks around them; refuses an empty one, naming its row."""
    texts = ["" if value is None else str(value).strip() for value in values]
    empty = [number for number, text in enumerate(texts, start=1) if not text]
    if empty:
        raise DataError(
            f"{path}: column {column!r} is empty in {len(empty)} row(s), the first is row"
            f" {empty[0]}: fill or drop them"
        )
    return texts


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each text once, in the order of the file; a text with two labels teaches nothing and is left
    out.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    for text, label in pairs:
        labels[text].add(label)
    return [(text, found.pop()) for text, found in labels.items() if len(found) == 1]


def _split(pairs: Sequence[tuple[str, str]]) -> dict[str, Texts]:
    """A tenth to test and a tenth to validation by the hash of the text; a label too rare to reach
    train goes there.
    """
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for text, label in pairs:
        tenth = (
            int.from_bytes(
                hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big"
            )
            % 10
        )
        parts["test" if tenth == 0 else "validation" if tenth == 1 else "train"].append(
            (text, label)
        )
    learned = {label for _, label in parts["train"]}
    for name in ("validation", "test"):
        parts["train"] += [pair for pair in parts[name] if pair[1] not in learned]
        parts[name] = [pair for pair in parts[name] if pair[1] in learned]
    return {
        name: Texts(tuple(text for text, _ in rows), tuple(label for _, label in rows))
        for name, rows in parts.items()
    }
