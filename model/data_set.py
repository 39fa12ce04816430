"""Labelled texts as records: `Texts`, the `DataSet` of three parts, and how it was read."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from evalmode.errors import EvalmodeError

# Why rows are left out, in the order in which the command line prints the reasons.
HEADER_AGAIN = "header again"
EMPTY_TEXT = "empty text"
EMPTY_LABEL = "empty label"
DUPLICATE = "duplicate"
CONTRADICTORY = "contradictory"
REASONS = (HEADER_AGAIN, EMPTY_TEXT, EMPTY_LABEL, DUPLICATE, CONTRADICTORY)

# Code points of a text that are encoded at once: a copy of a text of 20 MB would cost 80 MB.
_PIECE = 65_536
# Composing a run of combining marks takes quadratic time: 54 s for 240,000 code points. No name of
# a class is as long as this.
_LABEL_POINTS = 4_096
# Control and format characters, such as the zero-width space, and variation selectors.
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f\xad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ufe00-\ufe0f\ufeff]"
)


class DataError(EvalmodeError):
    """A data set that cannot be used; the message names the file, the column or the row."""


@dataclass(frozen=True)
class Texts:
    """N texts and the label of each: both of length N."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = f"{len(self.texts)} texts, {len(self.labels)} labels"
        assert len(self.texts) == len(self.labels), counts


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How many rows of a source are used, and why others are left out.

    The command line prints it. It is no part of the data: the digest does not depend on it.

    rows        rows of the source, with those that are left out
    left_out    reason -> number of rows
    notes       warnings about the way in which the file was read
    """

    source: str
    rows: int
    text_column: str | None = None
    label_column: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def leaving_out(self, counts: Mapping[str, int]) -> Reading:
        """The same reading with more rows left out. `counts`: reason -> number of rows."""
        left_out = {}
        for reason in REASONS:
            rows = self.left_out.get(reason, 0) + counts.get(reason, 0)
            if rows:
                left_out[reason] = rows
        return replace(self, left_out=left_out)

    def __str__(self) -> str:
        """Such as "40 of 161 rows are used (120 contradictory, 1 empty text left out)"."""
        used = self.rows - sum(self.left_out.values())
        counts = f"{used:,} of {self.rows:,} rows are used"
        if not self.left_out:
            return counts
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in self.left_out.items())
        return f"{counts} ({reasons} left out)"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Labelled texts in three parts, and texts without a label for training and validation.

    The parts share no text. `labels` is sorted; the position of a label is its index in the model.
    `reading` is None for texts that come from no file.
    """

    name: str
    labels: tuple[str, ...]
    train: Texts
    validation: Texts
    test: Texts
    unlabelled: tuple[str, ...] = ()
    unlabelled_validation: tuple[str, ...] = ()
    reading: Reading | None = None

    @property
    def parts(self) -> dict[str, Texts]:
        """The labelled texts by the name of their part: train, validation, test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def similar_labels(self) -> list[tuple[str, ...]]:
        """Groups of labels that look alike to a person.

        They differ only in capitals, blanks, composition or invisible characters. They stay
        different classes, but may be meant as one.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for label in self.labels:
            groups[_appearance(label)].append(label)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    @cached_property
    def sha256(self) -> str:
        """The sha256 of all texts and labels, in their order."""
        unlabelled = [self.unlabelled]
        if self.unlabelled_validation:
            unlabelled.append(self.unlabelled_validation)
        parts = [*self.parts.values()]
        parts += [Texts(texts, ("",) * len(texts)) for texts in unlabelled]

        # The digest of json.dumps([part.texts, part.labels]), without a copy of all the texts. JSON
        # escapes each character by itself, so a long text can be written piece by piece.
        digest = hashlib.sha256()
        for part in parts:
            for opening, strings in ((b"[[", part.texts), (b"], [", part.labels)):
                digest.update(opening)
                for index, string in enumerate(strings):
                    digest.update(b', "' if index else b'"')
                    for start in range(0, len(string), _PIECE):
                        digest.update(json.dumps(string[start : start + _PIECE])[1:-1].encode())
                    digest.update(b'"')
            digest.update(b"]]")
        return digest.hexdigest()


def _appearance(label: str) -> str:
    """The label without capitals and invisible characters, with single blanks, and composed."""
    if len(label) > _LABEL_POINTS:
        return label
    visible = _INVISIBLE.sub("", label)
    # Twice: casefolding may undo a composition, and composition may bring back a capital.
    folded = unicodedata.normalize("NFC", visible).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())
