"""Text -> int64 ids: the one implementation that training, export and service share. Knows neither
torch nor HTTP.

Two kinds. `ngrams` hashes the character n-grams that end at each character into rows of one table:
no vocabulary file, short sequences. `bpe` is a Hugging Face `tokenizers` file. Kind and parameters
stand in the manifest, so what a model was trained on is what it is served.

Shapes: B rows, T positions, G ids a position.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from evalmode.bundle.errors import BundleCorrupt

Ids: TypeAlias = npt.NDArray[np.int64]
TOKENIZER_FILE = "tokenizer.json"

# Composition takes a time quadratic in a run of combining marks (measured: 54 s for 240,000 of
# them, holding Python's lock), so no more than this many code points for each symbol that the model
# can read are composed.
_UNITS_A_SYMBOL = 8

# Composition makes at most three code points into one of two bytes (U+0390), so a text has at most
# 1.5 code points for each byte of its composed form.
_POINTS_A_BYTE = 2
# What is read of a long text first: for each token that the model reads (English has four to five
# code points a token), and at least. WordPiece looks at 100 letters before it gives a word up.
_POINTS_A_TOKEN, _LEAST_POINTS = 8, 1_024
# Where a single word is longer than this, its tokens are taken as settled before its end is seen.
_WORD_POINTS = 65_536
# `Tokenizer.encode` holds Python's lock, for half a millisecond a thousand code points at most;
# `encode_batch` does not, but starts a thread for each core.
_LOCKED_POINTS = 10_000


class _Spec(BaseModel):
    """What both kinds declare. `lengths` is the ladder: a row is padded to the first length that
    holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: tuple[int, ...]

    @model_validator(mode="after")
    def _ladder_rises(self) -> _Spec:
        if (
            not self.lengths
            or self.lengths[0] < 1
            or list(self.lengths) != sorted(set(self.lengths))
        ):
            raise ValueError(f"lengths must be positive and rising, got lengths={self.lengths}")
        return self

    def padded_length(self, length: int) -> int:
        """The padded length of a row of `length` positions: a function of that row alone, never of
        its neighbours.
        """
        return next(rung for rung in self.lengths if rung >= length)


class NgramSpec(_Spec):
    """Hashed character n-grams of 1..orders characters; `characters` of them share one position."""

    kind: Literal["ngrams"] = "ngrams"
    lengths: tuple[int, ...] = (4, 8, 16, 32)
    orders: int = Field(default=4, ge=1, le=8)
    characters: int = Field(default=4, ge=1, le=16)
    vocabulary: int = Field(default=32_768, ge=2)
    # Lower-casing and composition follow Python's Unicode tables; another version may read rare
    # characters otherwise.
    unicode: str = unicodedata.unidata_version

    @property
    def ids_per_position(self) -> int:
        """G: the ids of all n-grams that end at one of a position's characters."""
        return self.orders * self.characters


class BpeSpec(_Spec):
    """A tokenizer file whose id 0 is padding and whose `start` id opens every row."""

    kind: Literal["bpe"] = "bpe"
    lengths: tuple[int, ...] = (8, 16, 32, 64, 128)
    vocabulary: int = Field(ge=2)
    start: int = Field(default=1, ge=1)

    @property
    def ids_per_position(self) -> int:
        """G is 1: ids are (B, T) and come with an attention mask."""
        return 1


FrontEndSpec: TypeAlias = Annotated[NgramSpec | BpeSpec, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One encoded text: ids (T,) or (T, G), without padding, and whether the text was longer than
    the model reads.
    """

    ids: Ids
    truncated: bool


class FrontEnd(Protocol):
    """The seam: what turns texts into rows."""

    @property
    def spec(self) -> FrontEndSpec:
        """What the manifest declares of it."""

    def encode(self, text: str) -> Row:
        """The row of one text; never empty, whatever the text."""


class NgramFrontEnd:
    """Lower-cases, writes every digit as 0, folds blanks, and hashes the n-grams that end at each
    character.

    Every text is opened by a boundary symbol: the first n-grams then say that they are first, and
    the empty text has one position instead of none.
    """

    def __init__(self, spec: NgramSpec) -> None:
        self.spec = spec
        self._symbols = spec.lengths[-1] * spec.characters - 1  # what is left beside the boundary

    def encode(self, text: str) -> Row:
        """Ids (T, G) of a text; G holds `characters` groups of `orders` ids, 0 where the text has
        ended.
        """
        symbols, read = _normalise(text, limit=_UNITS_A_SYMBOL * self._symbols)
        points = np.frombuffer(
            symbols[: self._symbols].encode("utf-32-le"), dtype=np.uint32
        ).astype(np.uint64)
        # zeros: the boundary, and before it
        points = np.concatenate([np.zeros(self.spec.orders, np.uint64), points])
        # (characters of the text and one boundary, orders)
        grams = self._hash(points)[self.spec.orders - 1 :]
        ids = np.zeros(
            (-(-len(grams) // self.spec.characters), self.spec.ids_per_position), np.int64
        )
        ids.reshape(-1, self.spec.orders)[: len(grams)] = grams
        return Row(ids=ids, truncated=not read or len(symbols) > self._symbols)

    def _hash(self, points: npt.NDArray[np.uint64]) -> Ids:
        """The ids, 1..vocabulary-1, of the n-grams of 1..orders characters that end at each point,
        (points, orders).
        """
        # A polynomial over the points, each order one step on from the one before, then the
        # finaliser of splitmix64 (Steele et al. 2014); uint64 wraps by design.
        mixed = np.empty((self.spec.orders, len(points)), np.uint64)
        step = np.full(len(points), 1, np.uint64)
        for back in range(self.spec.orders):
            step = step * np.uint64(0x9E3779B97F4A7C15)
            step[back:] += points[: len(points) - back]
            mixed[back] = step
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
        return (mixed % np.uint64(self.spec.vocabulary - 1) + np.uint64(1)).astype(np.int64).T


class BpeFrontEnd:
    """A Hugging Face tokenizer, opened by its `start` token; knows nothing of how it was
    trained.

    A long text is cut before it is tokenized, so that a text of megabytes costs no more than the
    longest that the model reads. Texts that fit always have the ids of the whole text. So have
    texts that do not fit, unless one word of theirs (a run of letters, of signs or of blanks) is
    longer than all that was read: its last tokens may then be others.
    """

    def __init__(self, spec: BpeSpec, tokenizer: str) -> None:
        self.spec = spec
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # the Rust side raises Exception itself
            raise BundleCorrupt(
                f"{TOKENIZER_FILE} is not a tokenizer that can be read: {error}"
            ) from error
        self._room = spec.lengths[-1] - 1  # tokens beside `start`
        description = json.loads(self._tokenizer.to_str())
        longest = _longest_token(description)
        # More code points than this cannot fit; None: nothing is known.
        self._bound = None if longest is None else _POINTS_A_BYTE * self._room * longest + 1
        self._can_cut = not _has_pattern_that_removes(description)

    def encode(self, text: str) -> Row:
        """Ids (T,) of a text, `start` first."""
        most = len(text) if self._bound is None else min(len(text), self._bound)
        first = max(_LEAST_POINTS, _POINTS_A_TOKEN * self.spec.lengths[-1])
        points = min(most, first) if self._can_cut else most
        while True:
            part = _readable(text[:points])
            if len(part) <= _LOCKED_POINTS:
                encoding = self._tokenizer.encode(part, add_special_tokens=False)
            else:
                encoding = self._tokenizer.encode_batch([part], add_special_tokens=False)[0]
            if points == most or self._is_settled(encoding, points=len(part)):
                break
            points = min(most, 4 * points)
        ids = encoding.ids
        return Row(
            ids=np.array([self.spec.start, *ids[: self._room]], np.int64),
            truncated=len(ids) > self._room,
        )

    def _is_settled(self, encoding: Encoding, *, points: int) -> bool:
        """Whether the tokens of a text's first code points are more than the model reads, and
        those that it reads are the same whatever follows.
        """
        if len(encoding.ids) <= self._room:
            return False
        # What follows may change the last word, and the one before it: a mark that is composed with
        # a letter leaves the word of the marks.
        word = encoding.token_to_word(self._room)
        last = encoding.token_to_word(len(encoding.ids) - 1)
        if word is not None and last is not None and word + 2 <= last:
            return True
        if self._bound is not None and points < _WORD_POINTS:
            return False
        # A word of that length, or a file that no bound is known for (it may take the whole text
        # for one word): what follows would have to change tokens across as many characters again.
        span = encoding.token_to_chars(self._room)
        return span is not None and bool(0 < span[1] <= points // 2)


def open_frontend(spec: FrontEndSpec, tokenizer: str | None) -> FrontEnd:
    """The front end a manifest declares; `tokenizer` is the text of its tokenizer file where it has
    one.
    """
    if isinstance(spec, NgramSpec):
        return NgramFrontEnd(spec)
    assert tokenizer is not None, "a bpe front end comes with its tokenizer file"
    return BpeFrontEnd(spec, tokenizer)


def collate(rows: Sequence[Ids], *, length: int) -> dict[str, Ids]:
    """The model's inputs for rows padded to `length`: input_ids (B, T) or (B, T, G), and for (B, T)
    attention_mask.

    Padding is id 0. Rows with several ids a position need no mask: a real position always holds an
    id above 0.
    """
    input_ids = np.zeros((len(rows), length, *rows[0].shape[1:]), np.int64)
    for padded, row in zip(input_ids, rows, strict=True):
        padded[: len(row)] = row
    if input_ids.ndim == 3:
        return {"input_ids": input_ids}
    attention_mask = np.zeros((len(rows), length), np.int64)
    for mask, row in zip(attention_mask, rows, strict=True):
        mask[: len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _readable(text: str) -> str:
    """The text without lone surrogates (a broken emoji half), which no encoder accepts."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _longest_token(description: dict[str, Any]) -> int | None:
    """The bytes of the longest token of a tokenizer file that writes every byte of a text into
    some token; None for any other file.

    A text of such a file has at most as many bytes as its tokens have together. Unknown tokens,
    added tokens and pieces that are removed could stand for any number of bytes.
    """
    model, splitter = description["model"], description["pre_tokenizer"]
    normalizer = description["normalizer"]
    vocabulary = model.get("vocab")
    is_lossless = (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and (normalizer is None or normalizer["type"] == "NFC")
        and splitter is not None
        and splitter["type"] == "ByteLevel"
        and not description["added_tokens"]
        and not description["truncation"]
        and not description["padding"]
        and all(letter in vocabulary for letter in ByteLevel.alphabet())
    )
    return max(map(len, vocabulary)) if is_lossless else None


def _has_pattern_that_removes(part: Any) -> bool:
    """Whether a part of a tokenizer file removes or rewrites what a regular expression finds: the
    end of a text may then decide what becomes of its beginning.
    """
    if isinstance(part, list):
        return any(map(_has_pattern_that_removes, part))
    if not isinstance(part, dict):
        return False
    has_pattern = isinstance(part.get("pattern"), dict) and "Regex" in part["pattern"]
    removes = part.get("type") == "Replace" or part.get("behavior") == "Removed"
    return (has_pattern and removes) or any(
        _has_pattern_that_removes(value) for key, value in part.items() if key != "model"
    )


def _normalise(text: str, *, limit: int) -> tuple[str, bool]:
    """The text's symbols, made from its first `limit` code points after blanks are folded, and
    whether that was all.
    """
    # `limit` words have more than `limit` code points with the blanks between them, and two halves
    # of an emoji are one code point: nothing behind these can be read.
    folded = " ".join(text.split(None, limit))
    readable = _readable(folded[: 2 * limit + 2])
    composed = unicodedata.normalize("NFC", readable[:limit]).lower()
    return re.sub(r"\d", "0", " ".join(composed.split())), len(readable) <= limit
