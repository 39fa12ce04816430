"""Labelled texts from the default data set or from a user's file, cleaned and split in three parts.

How a file becomes a data set, in `read_file`:

1. `reading/` opens the file by its ending and reads two columns. For CSV and TSV see
   `reading/csv_tsv.py`.
2. Rows without a text or a label are left out.
3. Texts that the model reads alike count as one text, and the first of their rows stays. If their
   labels differ, all of their rows are left out.
4. The part of a row, test, validation or train, depends on a hash of its text. So the split needs
   no seed, and a row stays in its part when others are added.
5. A label without training rows moves to the training part with all of its rows.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evalmode.model import languages
from evalmode.model.data_set import (
    CONTRADICTORY,
    DUPLICATE,
    EMPTY_LABEL,
    EMPTY_TEXT,
    HEADER_AGAIN,
    DataError,
    DataSet,
    Reading,
    Texts,
)
from evalmode.model.reading.source import PIECE, Columns, shortened
from evalmode.model.reading.table import open_table

LANGUAGES = "languages"
# Texts without letters in the default data set. They are a fiftieth of the training rows, which is
# enough for a model that gives such texts even scores.
LETTERLESS_ROWS = 1_500

# Names of columns that need no flag, in the order of preference.
TEXT_COLUMNS = (
    *("text", "sentence", "content", "review", "title"),
    *("question", "document", "message", "utterance", "query"),
)
LABEL_COLUMNS = (
    *("label", "labels", "language", "lang", "class"),
    *("category", "target", "intent", "sentiment", "topic"),
)

# With this many usable rows, about three are for validation and three for the test.
MIN_ROWS = 30

# Opening and closing marks in which other dialects enclose values.
QUOTATION_MARKS = (
    ('"', '"'),
    ("'", "'"),
    ("`", "`"),
    ("\u201c", "\u201d"),
    ("\u2018", "\u2019"),
    ("\u201e", "\u201c"),
    ("\u00ab", "\u00bb"),
)

# Composing a run of combining marks takes quadratic time: 54 s for 240,000 of them, and 20 ms for
# this many. Longer texts that differ only in their composition are recognised by their ids.
_COMPOSED_POINTS = 4_096

# Columns that an error lists: JSON lines may have thousands of keys.
_LISTED_COLUMNS = 20

_SURROGATE = re.compile("[\ud800-\udfff]")


def composed_digest(text: str) -> bytes:
    """The sha256 of a text's composed form (NFC), which is the same for texts that look the same.

    Each front end reads texts with the same composed form alike.
    """
    form = unicodedata.normalize("NFC", text[:_COMPOSED_POINTS])
    digest = hashlib.sha256(form.encode("utf-8", "surrogatepass"))
    for start in range(_COMPOSED_POINTS, len(text), PIECE):
        digest.update(text[start : start + PIECE].encode("utf-8", "surrogatepass"))
    return digest.digest()


def open_data(
    source: str,
    *,
    text_column: str | None,
    label_column: str | None,
    cache: Path,
    separator: str | None = None,
    identity: Callable[[str], bytes] = composed_digest,
) -> DataSet:
    """The data set `languages`, stored in the folder `cache`, or that of the file `source`.

    Raises DataError with one sentence that says what to change. For a file see `read_file`.
    """
    if source != LANGUAGES:
        return read_file(
            Path(source),
            text_column=text_column,
            label_column=label_column,
            separator=separator,
            identity=identity,
        )

    options = {"text_column": text_column, "label_column": label_column, "separator": separator}
    for name, value in options.items():
        if value is not None:
            raise DataError(
                f"{name}={value!r} applies to files only, and the data is {LANGUAGES!r}: remove it"
            )
    parts = languages.load(cache)
    return DataSet(
        name=LANGUAGES,
        labels=tuple(sorted(set(parts["train"].labels))),
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        unlabelled=languages.letterless(LETTERLESS_ROWS, seed=0),
        reading=Reading(source=LANGUAGES, rows=sum(len(part.texts) for part in parts.values())),
    )


def read_file(
    path: Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    separator: str | None = None,
    identity: Callable[[str], bytes] = composed_digest,
) -> DataSet:
    """The texts of a CSV, TSV, JSONL or Parquet file, each text once, split 80/10/10.

    Texts with the same `identity` count as one text. The part of a row depends on the composed form
    of its text, so the split is the same for every front end. Which texts a tokenizer reads alike
    is known only after its training: see `distinct_texts`.

    Raises DataError, naming the file and the column, row or value, for a file that cannot be read
    or that cannot be trained on.
    """
    with open_table(path, separator=separator) as table:
        names = table.names
        text_name, label_name = text_column, label_column
        if text_name is None:
            text_name = _usual_column(path, names, TEXT_COLUMNS, "--text-column", label_name)
        _require_column(path, names, text_name, "--text-column")
        if label_name is None:
            label_name = _usual_column(path, names, LABEL_COLUMNS, "--label-column", text_name)
        _require_column(path, names, label_name, "--label-column")
        columns = table.read(text=text_name, label=label_name)

    texts, labels, empty_counts = _filled_rows(path, columns, label_name)
    distinct_rows, repeated_counts = _distinct_rows([identity(text) for text in texts], labels)

    notes = list(columns.notes)
    for name, values in ((text_name, texts), (label_name, labels)):
        # The format has a note on each column in `marked` already.
        if name not in columns.marked:
            notes += _quotation_notes(values, column=name)
    reading = Reading(
        source=str(path),
        rows=len(columns.texts) + columns.headers,
        text_column=text_name,
        label_column=label_name,
        notes=tuple(notes),
    )
    reading = reading.leaving_out({HEADER_AGAIN: columns.headers} | empty_counts | repeated_counts)

    parts: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in distinct_rows:
        # A number from 0 to 9, the same for this text in every file: 2 to 9 are training rows.
        tenth = int.from_bytes(composed_digest(texts[row])[:4], "big") % 10
        name = {0: "test", 1: "validation"}.get(tenth, "train")
        parts[name].append((texts[row], labels[row]))
    return _data_set(path.name, parts, reading)


def distinct_texts(data: DataSet, keys: Mapping[str, Sequence[Hashable]]) -> DataSet:
    """`data` without the texts that the model reads like another; `data` itself if there are none.

    keys: name of the part -> what the model reads of each of its texts, such as its ids.

    Of several texts with the same key the first stays, in the order train, validation, test. If
    their labels differ, none stays. For a tokenizer this is done after its training, when the ids
    are known. For example, texts have the same ids if they differ only after the last token that
    the model reads.
    """
    rows = []
    row_keys: list[Hashable] = []
    for name, part in data.parts.items():
        rows += [(name, *row) for row in zip(part.texts, part.labels, strict=True)]
        row_keys += keys[name]
    distinct_rows, repeated_counts = _distinct_rows(row_keys, [label for _, _, label in rows])
    if len(distinct_rows) == len(rows):
        return data

    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in data.parts}
    for row in distinct_rows:
        name, text, label = rows[row]
        parts[name].append((text, label))
    assert data.reading is not None, "a data set that comes from a source has a reading"
    return replace(
        _data_set(data.name, parts, data.reading.leaving_out(repeated_counts)),
        unlabelled=data.unlabelled,
        unlabelled_validation=data.unlabelled_validation,
    )


def _usual_column(
    path: Path, names: Sequence[str], usual: Sequence[str], flag: str, excluded: str | None
) -> str:
    """The first name of `usual` that the file has, in upper or lower case, except for `excluded`.

    Raises DataError, naming `flag`, if there is none.
    """
    by_usual_name: dict[str, str] = {}
    for name in names:
        if name != excluded:
            by_usual_name.setdefault(name.strip().lower(), name)
    for name in usual:
        if name in by_usual_name:
            return by_usual_name[name]
    raise DataError(
        f"{path} has none of the usual columns ({', '.join(usual)}): name one with {flag}:"
        f" {_column_list(names)}"
    )


def _require_column(path: Path, names: Sequence[str], name: str, flag: str) -> None:
    if name not in names:
        raise DataError(
            f"{path} has no column {name!r}: {flag} can be one of {_column_list(names)}"
        )
    if names.count(name) > 1:
        raise DataError(
            f"{path} has {names.count(name)} columns {name!r}: give each a different name"
        )


def _column_list(names: Sequence[str]) -> str:
    """The first of the columns' names, for a message."""
    text = ", ".join(shortened(name) for name in names[:_LISTED_COLUMNS])
    if len(names) > _LISTED_COLUMNS:
        text += f" and {len(names) - _LISTED_COLUMNS:,} more"
    return text


def _filled_rows(
    path: Path, columns: Columns, label_column: str
) -> tuple[list[str], list[str], dict[str, int]]:
    """The texts and labels of the rows that have both, and the number of other rows by reason.

    JSON can hold half of a surrogate pair, which is no character. In a text it becomes U+FFFD, as
    the front end reads it. In a label it is refused, because no file could hold the label's name.
    """
    texts, labels = [], []
    empty_counts = {EMPTY_TEXT: 0, EMPTY_LABEL: 0}
    for text, label, number in zip(columns.texts, columns.labels, columns.numbers, strict=True):
        if not text:
            empty_counts[EMPTY_TEXT] += 1
            continue
        if not label:
            empty_counts[EMPTY_LABEL] += 1
            continue
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}, {columns.unit} {number}: column {label_column!r} holds half of a"
                f" surrogate pair ({shortened(label)}), which is no character: correct the label"
            ) from error
        if _SURROGATE.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        texts.append(text)
        labels.append(label)
    return texts, labels, empty_counts


def _distinct_rows(
    keys: Sequence[Hashable], labels: Sequence[str]
) -> tuple[list[int], dict[str, int]]:
    """The index of the first row of each key with one label, and the other rows' number by reason.

    A text with two labels teaches nothing: all of its rows are contradictory.
    """
    first_row: dict[Hashable, int] = {}
    labels_of_key: dict[Hashable, set[str]] = defaultdict(set)
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        first_row.setdefault(key, row)
        labels_of_key[key].add(label)
    distinct_rows = [row for key, row in first_row.items() if len(labels_of_key[key]) == 1]
    contradictory = sum(len(labels_of_key[key]) > 1 for key in keys)
    duplicates = len(keys) - len(distinct_rows) - contradictory
    return distinct_rows, {DUPLICATE: duplicates, CONTRADICTORY: contradictory}


def _quotation_notes(values: Sequence[str], *, column: str) -> list[str]:
    """A warning if all values of a column are enclosed in the same quotation marks, else none."""
    for opening, closing in QUOTATION_MARKS:
        if values and all(
            len(value) > 1 and value[0] == opening and value[-1] == closing for value in values
        ):
            return [
                f"all {len(values):,} values of column {column!r} are enclosed in {opening} and"
                f" {closing}, which are part of the values: remove them if they only enclose"
            ]
    return []


def _data_set(
    name: str, parts: Mapping[str, Sequence[tuple[str, str]]], reading: Reading
) -> DataSet:
    """The data set of (text, label) rows. Raises DataError if nothing can be trained or tested.

    A label may be too rare to have training rows. Then all of its rows move there, because a class
    that the model was not trained on can be neither validated nor tested.
    """
    train_labels = {label for _, label in parts["train"]}
    rows = {"train": list(parts["train"])}
    for part in ("validation", "test"):
        rows[part] = [row for row in parts[part] if row[1] in train_labels]
        rows["train"] += [row for row in parts[part] if row[1] not in train_labels]

    counts = Counter(label for part_rows in rows.values() for _, label in part_rows)
    source, column, total = reading.source, reading.label_column, sum(counts.values())
    if not total:
        raise DataError(
            f"{source}: no row is left to train on: {reading}: a row needs a text, a label, and no"
            " other label for the same text"
        )
    if len(counts) < 2:
        raise DataError(
            f"{source}: column {column!r} holds one class, {shortened(next(iter(counts)))}, and a"
            f" classifier needs at least 2 ({reading}): name another column with --label-column"
        )
    if max(counts.values()) == 1:
        raise DataError(
            f"{source}: column {column!r} holds {total:,} classes in {total:,} rows, so each class"
            " has one row: name another column with --label-column"
        )
    if total < MIN_ROWS:
        raise DataError(
            f"{source} has {total} usable rows, too few to train on and to test with ({reading}):"
            f" give at least {MIN_ROWS}, better some hundred"
        )
    if not rows["validation"] or not rows["test"]:
        largest, most = counts.most_common(1)[0]
        raise DataError(
            f"{source}: {total:,} usable rows of {len(counts):,} classes leave none to test with,"
            f" as the largest class, {shortened(largest)}, has {most:,}: give more rows a class, or"
            " name another column with --label-column"
        )

    texts = {}
    for part, part_rows in rows.items():
        texts[part] = Texts(
            tuple(text for text, _ in part_rows), tuple(label for _, label in part_rows)
        )
    return DataSet(
        name=name,
        labels=tuple(sorted(counts)),
        train=texts["train"],
        validation=texts["validation"],
        test=texts["test"],
        reading=reading,
    )
