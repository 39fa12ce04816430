"""Texts to ids with numpy and tokenizers alone, as the manifest of a bundle describes it.

A server that is written by hand needs this part of a model too. It gives the ids that the model was
trained on; cuts for texts of megabytes and half emoji are left out.

Shapes: T positions, G ids a position.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer


class Ngrams:
    """Hashed n-grams of 1 to `orders` characters; `characters` of a text share one position."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.orders: int = spec["orders"]
        self.characters: int = spec["characters"]
        self.vocabulary: int = spec["vocabulary"]
        self.max_symbols = spec["lengths"][-1] * self.characters - 1  # one more is the boundary

    def encode(self, text: str) -> np.ndarray:
        """The ids (T, G) of a text."""
        composed = unicodedata.normalize("NFC", " ".join(text.split())).lower()
        symbols = re.sub(r"\d", "0", composed)[: self.max_symbols]
        # The last of the zeros is the boundary, which begins every text.
        points = np.array([0] * self.orders + [ord(symbol) for symbol in symbols], np.uint64)

        # The hash of the n-gram of order n that ends at a point, modulo 2^64: (P, orders).
        hashes = np.empty((len(points), self.orders), np.uint64)
        polynomial = np.ones(len(points), np.uint64)
        for order in range(self.orders):
            polynomial = polynomial * np.uint64(0x9E3779B97F4A7C15)
            polynomial[order:] += points[: len(points) - order]
            hashes[:, order] = polynomial
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
        hashes ^= hashes >> np.uint64(31)
        grams = (hashes % np.uint64(self.vocabulary - 1)).astype(np.int64) + 1

        grams = grams[self.orders - 1 :]  # (symbols and the boundary, orders)
        positions = -(-len(grams) // self.characters)  # rounded up
        ids = np.zeros((positions * self.characters, self.orders), np.int64)
        ids[: len(grams)] = grams
        return ids.reshape(positions, self.characters * self.orders)


class Bpe:
    """A tokenizer file, whose rows begin with the `start` id."""

    def __init__(self, spec: dict[str, Any], tokenizer: Path) -> None:
        self.start: int = spec["start"]
        self.max_tokens = spec["lengths"][-1] - 1  # one more is `start`
        self.tokenizer = Tokenizer.from_file(str(tokenizer))

    def encode(self, text: str) -> np.ndarray:
        """The ids (T,) of a text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array([self.start, *ids[: self.max_tokens]], np.int64)


def open_front_end(folder: Path) -> Ngrams | Bpe | None:
    """The front end of the bundle in `folder`; None for a model of tensors."""
    spec = json.loads((folder / "manifest.json").read_text())["frontend"]
    if spec is None:
        return None
    return Ngrams(spec) if spec["kind"] == "ngrams" else Bpe(spec, folder / "tokenizer.json")
