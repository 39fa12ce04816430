"""Labelled texts, from the default data set or a user's file, cleaned and split.

A row goes to test, validation or train by a hash of its text, so the split needs no seed, and a row
keeps its place when others are added. Texts that the model reads alike count as one. Knows nothing
of tensors or training.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from evalmode.model import languages
from evalmode.model.reading.source import PIECE, Columns, shown
from evalmode.model.reading.table import open_table
from evalmode.model.texts import DataError, Texts

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
FEWEST_ROWS = 30
# What other dialects enclose values in.
QUOTATION_MARKS = (
    ('"', '"'),
    ("'", "'"),
    ("`", "`"),
    ("\u201c", "\u201d"),
    ("\u2018", "\u2019"),
    ("\u201e", "\u201c"),
    ("\u00ab", "\u00bb"),
)

# Why rows are left out, in the order in which they are shown.
HEADER_AGAIN, EMPTY_TEXT, EMPTY_LABEL = "header again", "empty text", "empty label"
DUPLICATE, CONTRADICTORY = "duplicate", "contradictory"

# Composition takes a time quadratic in a run of combining marks: 54 s for 240,000 of them, and
# 20 ms for these. Longer texts that differ in their composition only are found by their ids.
_COMPOSED_POINTS = 4_096

# A sentence names no more columns: JSON lines may have thousands of keys.
_NAMED_COLUMNS = 20
# Control and format characters, such as the zero-width space, and variation selectors.
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f\xad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ufe00-\ufe0f\ufeff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of a source, and what was not used. For the user; no part of the data.

    rows        rows read; used and left out together
    left_out    reason -> rows
    notes       what the user should know of how the file was read
    """

    source: str
    rows: int
    text_column: str | None = None
    label_column: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def leaving_out(self, counts: Mapping[str, int]) -> Reading:
        """The same with more rows left out."""
        total = {
            reason: self.left_out.get(reason, 0) + counts.get(reason, 0)
            for reason in (HEADER_AGAIN, EMPTY_TEXT, EMPTY_LABEL, DUPLICATE, CONTRADICTORY)
        }
        return replace(self, left_out={reason: rows for reason, rows in total.items() if rows})

    def __str__(self) -> str:
        """Such as "40 of 161 rows are used (120 contradictory, 1 empty text left out)"."""
        used = self.rows - sum(self.left_out.values())
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in self.left_out.items())
        counts = f"{used:,} of {self.rows:,} rows are used"
        return f"{counts} ({reasons} left out)" if reasons else counts


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Labelled texts in three parts, and texts without a label for training and validation.

    `labels` is sorted; a label's place in it is its index. The parts share no text. `reading` is
    None where the texts were not read from anywhere.
    """

    name: str
    labels: tuple[str, ...]
    train: Texts
    validation: Texts
    test: Texts
    unlabelled: tuple[str, ...] = ()
    unlabelled_validation: tuple[str, ...] = ()
    reading: Reading | None = None

    @cached_property
    def similar_labels(self) -> list[tuple[str, ...]]:
        """Groups of labels that differ only in capitals, blanks, composition, or characters that
        nobody sees. They are classes of their own, and may be meant as one.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for label in self.labels:
            groups[_appearance(label)].append(label)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    @cached_property
    def sha256(self) -> str:
        """Of all the texts and labels, in their order."""
        parts = [self.train, self.validation, self.test, _without_labels(self.unlabelled)]
        if self.unlabelled_validation:
            parts.append(_without_labels(self.unlabelled_validation))
        digest = hashlib.sha256()
        for part in parts:
            # As json.dumps([part.texts, part.labels]), without a copy of all the texts. Characters
            # are escaped one by one, so a long text can be written in pieces.
            for opening, strings in ((b"[[", part.texts), (b"], [", part.labels)):
                digest.update(opening)
                for number, string in enumerate(strings):
                    digest.update(b', "' if number else b'"')
                    for start in range(0, len(string), PIECE):
                        digest.update(json.dumps(string[start : start + PIECE])[1:-1].encode())
                    digest.update(b'"')
            digest.update(b"]]")
        return digest.hexdigest()


def _without_labels(texts: tuple[str, ...]) -> Texts:
    return Texts(texts, ("",) * len(texts))


def _appearance(label: str) -> str:
    """What a person sees of a label: without capitals, with single blanks and composed."""
    if len(label) > _COMPOSED_POINTS:  # no name of a class
        return label
    visible = _INVISIBLE.sub("", label)
    # Folding may undo a composition, and composition may bring a capital.
    folded = unicodedata.normalize("NFC", visible).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def composed(text: str) -> bytes:
    """What texts have in common that any front end reads alike: the sha256 of their composed form
    (NFC).
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
    identity: Callable[[str], bytes] = composed,
) -> DataSet:
    """`languages`, kept in `cache`, or the file of that name. Raises DataError with one sentence on
    what to mend.
    """
    if source != LANGUAGES:
        return read_file(
            Path(source),
            text_column=text_column,
            label_column=label_column,
            separator=separator,
            identity=identity,
        )
    for flag, value in (
        ("text_column", text_column),
        ("label_column", label_column),
        ("separator", separator),
    ):
        if value is not None:
            raise DataError(
                f"{flag}={value!r} is about a file, and the data is {LANGUAGES!r}: leave it away"
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
    identity: Callable[[str], bytes] = composed,
) -> DataSet:
    """The texts of a CSV, TSV, JSONL or Parquet file, each text once, split 80/10/10.

    Rows without a text or a label are left out. Texts with one `identity` are one text: the first
    is used, and none where their labels differ. Its composed form decides the part, so the split is
    the same for every front end. See `tell_apart` for what only a tokenizer shows.

    Raises DataError, naming the file and the column, row or value, when it cannot be read or
    trained on.
    """
    with open_table(path, separator=separator) as table:
        text = _column(
            path,
            table.names,
            text_column,
            usual=TEXT_COLUMNS,
            flag="--text-column",
            taken=label_column,
        )
        label = _column(
            path, table.names, label_column, usual=LABEL_COLUMNS, flag="--label-column", taken=text
        )
        columns = table.read(text=text, label=label)
    texts, labels, empty = _filled(path, columns, label)
    keys = [identity(value) for value in texts]
    numbers, repeated = _distinct(keys, labels)
    notes = list(columns.notes)
    for column, values in ((text, texts), (label, labels)):
        if column not in columns.marked:
            notes += _notes_on_marks(values, column=column)
    reading = Reading(
        source=str(path),
        rows=len(columns.texts) + columns.headers,
        text_column=text,
        label_column=label,
        notes=tuple(notes),
    ).leaving_out({HEADER_AGAIN: columns.headers} | empty | repeated)
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for number in numbers:
        tenth = int.from_bytes(composed(texts[number])[:4], "big") % 10
        part = "test" if tenth == 0 else "validation" if tenth == 1 else "train"
        parts[part].append((texts[number], labels[number]))
    return _data_set(path.name, parts, reading)


def tell_apart(data: DataSet, keys: Mapping[str, Sequence[Hashable]]) -> DataSet:
    """`data` without the rows that the model reads as it reads others; `data` itself without such.

    keys: part -> what the model reads of each text. Before a tokenizer is trained on the training
    rows, only equal forms of a text are known to be alike. Afterwards two texts may turn out to
    have the same ids, as when they differ only after what the model reads. Then the first of them
    in the order train, validation, test stays, and none where their labels differ.
    """
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    places = [(name, number) for name, part in parts.items() for number in range(len(part.texts))]
    labels = [label for part in parts.values() for label in part.labels]
    numbers, repeated = _distinct([key for name in parts for key in keys[name]], labels)
    if len(numbers) == len(places):
        return data
    rows: dict[str, list[tuple[str, str]]] = {name: [] for name in parts}
    for name, number in (places[number] for number in numbers):
        rows[name].append((parts[name].texts[number], parts[name].labels[number]))
    assert data.reading is not None, "a data set that was read says so"
    reading = data.reading.leaving_out(repeated)
    return replace(
        _data_set(data.name, rows, reading),
        unlabelled=data.unlabelled,
        unlabelled_validation=data.unlabelled_validation,
    )


def _data_set(
    name: str, parts: Mapping[str, Sequence[tuple[str, str]]], reading: Reading
) -> DataSet:
    """The rows as a data set; a label too rare to reach train goes there with all of its rows.

    Raises DataError where nothing can be trained or tested with the rows.
    """
    learned = {label for _, label in parts["train"]}
    rows = {part: [pair for pair in pairs if pair[1] in learned] for part, pairs in parts.items()}
    for part in ("validation", "test"):
        rows["train"] += [pair for pair in parts[part] if pair[1] not in learned]
    counts = Counter(label for pairs in rows.values() for _, label in pairs)
    source, column, total = reading.source, reading.label_column, sum(counts.values())
    if not total:
        raise DataError(
            f"{source}: no row is left to train on: {reading}: a row needs a text, a label, and no"
            " other label for the same text"
        )
    if len(counts) < 2:
        raise DataError(
            f"{source}: column {column!r} holds one class, {shown(next(iter(counts)))}, and a"
            f" classifier needs at least 2 ({reading}): name another column with --label-column"
        )
    if max(counts.values()) == 1:
        raise DataError(
            f"{source}: column {column!r} holds {total:,} classes in {total:,} rows, each of a"
            " class of its own: name another column with --label-column"
        )
    if total < FEWEST_ROWS:
        raise DataError(
            f"{source} has {total} usable rows, too few to train on and to test with ({reading}):"
            f" give at least {FEWEST_ROWS}, better some hundred"
        )
    if not rows["validation"] or not rows["test"]:
        largest, most = counts.most_common(1)[0]
        raise DataError(
            f"{source}: {total:,} usable rows of {len(counts):,} classes leave none to test with,"
            f" as the largest class, {shown(largest)}, has {most:,}: give more rows a class, or"
            " name another column with --label-column"
        )
    train, validation, test = (
        Texts(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))
        for pairs in (rows["train"], rows["validation"], rows["test"])
    )
    return DataSet(
        name=name,
        labels=tuple(sorted(counts)),
        train=train,
        validation=validation,
        test=test,
        reading=reading,
    )


def _column(
    path: Path,
    names: Sequence[str],
    chosen: str | None,
    *,
    usual: Sequence[str],
    flag: str,
    taken: str | None,
) -> str:
    """The column that the flag names, or the first usual one, whatever its capitals."""
    known = ", ".join(map(shown, names[:_NAMED_COLUMNS]))
    if len(names) > _NAMED_COLUMNS:
        known += f" and {len(names) - _NAMED_COLUMNS:,} more"
    if chosen is None:
        folded: dict[str, str] = {}
        for name in names:
            if name != taken:
                folded.setdefault(name.strip().lower(), name)
        chosen = next((folded[name] for name in usual if name in folded), None)
        if chosen is None:
            raise DataError(
                f"{path} has none of the usual columns ({', '.join(usual)}): name one with {flag}:"
                f" {known}"
            )
    if chosen not in names:
        raise DataError(f"{path} has no column {chosen!r}: {flag} can be one of {known}")
    if names.count(chosen) > 1:
        raise DataError(
            f"{path} has {names.count(chosen)} columns {chosen!r}: give each a name of its own"
        )
    return chosen


def _filled(
    path: Path, columns: Columns, label_column: str
) -> tuple[list[str], list[str], dict[str, int]]:
    """The texts and labels of the rows that have both; and how many rows have not.

    Half of a surrogate pair, which JSON can hold, is no character: in a text it is read as the
    front end reads it, and a label with one is refused, as nothing could write it.
    """
    texts, labels = [], []
    empty = {EMPTY_TEXT: 0, EMPTY_LABEL: 0}
    for text, label, number in zip(columns.texts, columns.labels, columns.numbers, strict=True):
        if not text or not label:
            empty[EMPTY_LABEL if text else EMPTY_TEXT] += 1
            continue
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}, {columns.unit} {number}: column {label_column!r} holds half of a"
                f" surrogate pair ({shown(label)}), which is no character: mend the label"
            ) from error
        if _SURROGATE.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        texts.append(text)
        labels.append(label)
    return texts, labels, empty


def _notes_on_marks(values: Sequence[str], *, column: str) -> tuple[str, ...]:
    """A warning where every value of a column is enclosed in the same quotation marks."""
    for opening, closing in QUOTATION_MARKS:
        if values and all(
            len(value) > 1 and value[0] == opening and value[-1] == closing for value in values
        ):
            return (
                f"all {len(values):,} values of column {column!r} are enclosed in {opening} and"
                f" {closing}, which are part of the values: remove them if they only enclose",
            )
    return ()


def _distinct(keys: Sequence[Hashable], labels: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """The numbers of the first row of each key that has one label, and how many rows are left out.

    A text with two labels teaches nothing, and its rows are contradictory.
    """
    first: dict[Hashable, int] = {}
    labels_of: dict[Hashable, set[str]] = defaultdict(set)
    for number, (key, label) in enumerate(zip(keys, labels, strict=True)):
        first.setdefault(key, number)
        labels_of[key].add(label)
    numbers = [number for key, number in first.items() if len(labels_of[key]) == 1]
    contradictory = sum(len(labels_of[key]) > 1 for key in keys)
    duplicates = len(keys) - len(numbers) - contradictory
    return numbers, {DUPLICATE: duplicates, CONTRADICTORY: contradictory}
