"""Labelled texts as records, and the error of a data set that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from evalmode.errors import EvalmodeError


class DataError(EvalmodeError):
    """A data set that cannot be used as asked; the message names the file, column or row."""


@dataclass(frozen=True)
class Texts:
    """N texts and the label of each: both of length N."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.labels), (
            f"{len(self.texts)} texts, {len(self.labels)} labels"
        )
