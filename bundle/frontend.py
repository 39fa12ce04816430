"""Front ends: text to int64 ids. Training, export and the service share this implementation.

`ngrams` hashes the character n-grams that end at each character into the rows of one table. It
needs no vocabulary file, and its sequences are short. `bpe` is a Hugging Face `tokenizers` file.
The manifest declares the kind and its parameters, so a model is served what it was trained on.

Shapes: B rows, T positions, G ids per position, P code points.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evalmode.bundle.errors import BundleCorrupt

if TYPE_CHECKING:
    from tokenizers import Encoding

Ids: TypeAlias = npt.NDArray[np.int64]
TOKENIZER_FILE = "tokenizer.json"

# The padding ladders: the lengths to which rows are padded, in positions. More lengths mean less
# padding, and fewer rows that can share a batch. Each bundle carries its ladder, so a change here
# begins with the next training.
NGRAM_LADDER = (4, 8, 16, 32)
BPE_LADDER = (8, 16, 32, 64, 128)

# Unicode composition takes quadratic time in a run of combining marks: 240,000 of them take 54 s,
# and Python's lock is held meanwhile. So at most this many code points are composed for each symbol
# that the model reads. A larger figure would read more of a text with many marks, and take longer.
_POINTS_PER_SYMBOL = 8

# Bounds the length of a text that fits. Composition turns at most three code points into one of two
# bytes (U+0390). So there are at most 1.5 code points for each composed byte, rounded up to 2.
_POINTS_PER_BYTE = 2

# How much of a long text is tokenized first: 8 code points for each token that the model reads (an
# English token has four to five), and at least 1,024. WordPiece takes a word of more than 100
# letters for one unknown token.
_POINTS_PER_TOKEN, _MIN_POINTS = 8, 1_024

# In a word that is longer than this, the first tokens count as settled before its end is read.
_MAX_WORD_POINTS = 65_536

# tokenizers 0.23: `encode` holds Python's lock, for up to half a millisecond per thousand code
# points. `encode_batch` releases it, but starts a thread for each core.
_MAX_LOCKED_POINTS = 10_000


# The constants of the hash. The multiplier is 2^64 divided by the golden ratio; the shifts and the
# multipliers of the finaliser are those of splitmix64.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FINALISER = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT = np.uint64(31)

_DIGIT = re.compile(r"\d")


class _Spec(BaseModel):
    """The parameters that both kinds have.

    `lengths` is the ladder of padded lengths, in positions: a row is padded to the first length
    that holds it. The last one is the most that a row may have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: tuple[int, ...]

    @model_validator(mode="after")
    def _require_rising_lengths(self) -> _Spec:
        lengths = list(self.lengths)
        if not lengths or lengths[0] < 1 or lengths != sorted(set(lengths)):
            raise ValueError(f"lengths must be positive and rising, got lengths={self.lengths}")
        return self

    def padded_length(self, length: int) -> int:
        """The padded length of a row of `length` positions.

        It depends on that row alone. If it depended on other rows, the row's bits would too.

        >>> NgramSpec(lengths=(4, 8)).padded_length(5)
        8
        """
        return next(padded for padded in self.lengths if padded >= length)


class NgramSpec(_Spec):
    """Hashed n-grams of 1 to `orders` characters; `characters` of a text share one position."""

    kind: Literal["ngrams"] = "ngrams"
    lengths: tuple[int, ...] = NGRAM_LADDER
    orders: int = Field(default=4, ge=1, le=8)
    characters: int = Field(default=4, ge=1, le=16)
    vocabulary: int = Field(default=32_768, ge=2)
    # Lower-casing and composition use Python's Unicode tables. Those of another version may give
    # rare characters other ids.
    unicode: str = unicodedata.unidata_version

    @property
    def ids_per_position(self) -> int:
        """G: the ids of all n-grams that end at one of a position's characters."""
        return self.orders * self.characters


class BpeSpec(_Spec):
    """A tokenizer file. Id 0 is padding, and the id `start` begins every row."""

    kind: Literal["bpe"] = "bpe"
    lengths: tuple[int, ...] = BPE_LADDER
    vocabulary: int = Field(ge=2)
    start: int = Field(default=1, ge=1)

    @property
    def ids_per_position(self) -> int:
        """G is 1: ids are (B, T), and the model has an attention mask as well."""
        return 1


FrontEndSpec: TypeAlias = Annotated[NgramSpec | BpeSpec, Field(discriminator="kind")]


@dataclass(slots=True, kw_only=True)
class Row:
    """One encoded text: its ids, (T,) or (T, G), without padding.

    `truncated` says that the text was longer than the model reads.
    """

    ids: Ids
    truncated: bool


class FrontEnd(Protocol):
    """Turns texts into rows."""

    @property
    def spec(self) -> FrontEndSpec:
        """The parameters, as the manifest declares them."""

    def encode(self, text: str) -> Row:
        """The row of a text. It is never empty, and any text has one."""


class NgramFrontEnd:
    """Hashes the n-grams that end at each character of a text.

    Before that the text is composed (NFC) and lower-cased, runs of blanks become one space, and
    every digit becomes 0. A boundary symbol begins the text. So the first n-grams differ from the
    same characters inside a text, and an empty text has one position.
    """

    def __init__(self, spec: NgramSpec) -> None:
        self.spec = spec
        self._max_symbols = spec.lengths[-1] * spec.characters - 1  # one more is the boundary
        self._highest_id = np.uint64(spec.vocabulary - 1)

    def encode(self, text: str) -> Row:
        """The ids (T, G) of a text.

        G holds `characters` groups of `orders` ids. In the last position the groups after the end
        of the text are 0.
        """
        # The symbols, made from the first `max_points` code points after blanks are folded.
        max_points = _POINTS_PER_SYMBOL * self._max_symbols
        # `max_points` words, with the blanks between them, have more than `max_points` code points.
        # Two surrogates are one code point. So the model cannot read anything behind these cuts.
        folded = " ".join(text.split(None, max_points))
        readable = _without_surrogates(folded[: 2 * max_points + 2])
        composed = unicodedata.normalize("NFC", readable[:max_points]).lower()
        # The cut may have left a blank at the end, which is no symbol.
        symbols = _DIGIT.sub("0", " ".join(composed.split()))
        is_complete = len(readable) <= max_points

        # The last of these zeros is the boundary. The others fill the n-grams that end there.
        boundary = "\0" * self.spec.orders
        points = np.frombuffer(
            (boundary + symbols[: self._max_symbols]).encode("utf-32-le"), dtype=np.uint32
        ).astype(np.uint64)

        # The n-grams that end at the boundary or at a character of the text.
        grams = self._hash(points)[self.spec.orders - 1 :]  # (symbols, orders)
        positions = -(-len(grams) // self.spec.characters)  # rounded up
        ids = np.zeros((positions, self.spec.ids_per_position), np.int64)
        ids.reshape(-1, self.spec.orders)[: len(grams)] = grams
        return Row(ids=ids, truncated=not is_complete or len(symbols) > self._max_symbols)

    def _hash(self, points: npt.NDArray[np.uint64]) -> Ids:
        """The ids, 1 to vocabulary - 1, of the n-grams that end at each point: (P, orders)."""
        # A polynomial over the points, whose order grows by one in each step. uint64 wraps around,
        # as is intended. In place, because a row is short and each new array costs time.
        mixed = np.empty((self.spec.orders, len(points)), np.uint64)
        np.add(points, _MULTIPLIER, out=mixed[0])
        for back in range(1, self.spec.orders):
            np.multiply(mixed[back - 1], _MULTIPLIER, out=mixed[back])
            mixed[back, back:] += points[:-back]
        # The finaliser of splitmix64 (Steele, Lea and Flood, Fast splittable pseudorandom number
        # generators, 2014) spreads the polynomial over all bits.
        for shift, multiplier in _FINALISER:
            mixed ^= mixed >> shift
            mixed *= multiplier
        mixed ^= mixed >> _LAST_SHIFT
        mixed %= self._highest_id
        mixed += np.uint64(1)
        return mixed.view(np.int64).T  # below 2^63


class BpeFrontEnd:
    """A Hugging Face tokenizer, whose rows begin with the `start` id.

    A long text is cut before it is tokenized, so that a text of megabytes costs no more than the
    longest that the model reads. The cut does not change the ids, with one exception: if a word (a
    run of letters, of signs or of blanks) is longer than all that was read, the last ids of a text
    that does not fit may differ.
    """

    def __init__(self, spec: BpeSpec, tokenizer: str) -> None:
        # Imported here, because a model of n-grams does not need it.
        from tokenizers import Tokenizer

        self.spec = spec
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # tokenizers raises Exception itself
            raise BundleCorrupt(
                f"{TOKENIZER_FILE} cannot be read as a tokenizer: {error}"
            ) from error
        self._max_tokens = spec.lengths[-1] - 1  # one more is `start`
        description = json.loads(self._tokenizer.to_str())
        # A text with more code points cannot fit. None: there is no such bound for this file.
        self._max_points: int | None = None
        token_bytes = _max_token_bytes(description)
        if token_bytes is not None:
            self._max_points = _POINTS_PER_BYTE * self._max_tokens * token_bytes + 1
        self._can_cut = not _removes_matches(description)

    def encode(self, text: str) -> Row:
        """The ids (T,) of a text, beginning with `start`."""
        max_points = len(text)
        if self._max_points is not None:
            max_points = min(max_points, self._max_points)
        points = max_points
        if self._can_cut:
            first = max(_MIN_POINTS, _POINTS_PER_TOKEN * self.spec.lengths[-1])
            points = min(max_points, first)

        # Tokenize ever longer beginnings of the text, until more of it changes nothing.
        while True:
            part = _without_surrogates(text[:points])
            if len(part) <= _MAX_LOCKED_POINTS:
                encoding = self._tokenizer.encode(part, add_special_tokens=False)
            else:
                encoding = self._tokenizer.encode_batch([part], add_special_tokens=False)[0]
            if points == max_points or self._is_settled(encoding, points=len(part)):
                break
            points = min(max_points, 4 * points)
        ids = encoding.ids
        return Row(
            ids=np.array([self.spec.start, *ids[: self._max_tokens]], np.int64),
            truncated=len(ids) > self._max_tokens,
        )

    def _is_settled(self, encoding: Encoding, *, points: int) -> bool:
        """Whether the tokens that the model reads stay the same whatever text follows.

        `encoding` holds the tokens of the first `points` code points of the text.
        """
        if len(encoding.ids) <= self._max_tokens:
            return False
        # The text that follows may change the last word. It may also change the word before: a mark
        # that is composed with a letter is no longer part of a word of marks.
        word = encoding.token_to_word(self._max_tokens)
        last = encoding.token_to_word(len(encoding.ids) - 1)
        if word is not None and last is not None and word + 2 <= last:
            return True
        if self._max_points is not None and points < _MAX_WORD_POINTS:
            return False
        # The word is very long, or the file has no bound (the whole text may be one word). The text
        # that follows would have to change tokens across half of all that was read.
        span = encoding.token_to_chars(self._max_tokens)
        return span is not None and bool(0 < span[1] <= points // 2)


def open_frontend(spec: FrontEndSpec, tokenizer: str | None) -> FrontEnd:
    """The front end that a manifest declares.

    `tokenizer` is the text of the tokenizer file, which `bpe` needs. Raises BundleCorrupt where it
    cannot be read.

    >>> open_frontend(NgramSpec(), None).encode("Dit is een zin.").ids.shape
    (4, 16)
    """
    if isinstance(spec, NgramSpec):
        return NgramFrontEnd(spec)
    assert tokenizer is not None, "a bpe front end comes with its tokenizer file"
    return BpeFrontEnd(spec, tokenizer)


def collate(rows: Sequence[Ids], *, length: int) -> dict[str, Ids]:
    """The model's inputs for rows that are padded to `length` with id 0.

    `input_ids` are (B, T) or (B, T, G). For (B, T) there is an `attention_mask` (B, T) as well.
    With several ids per position none is needed: a real position always has an id above 0.
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


def _without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate (half of an emoji), which no encoder accepts."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _max_token_bytes(description: dict[str, Any]) -> int | None:
    """The bytes of the longest token, for a tokenizer file whose tokens hold every byte of a text.

    A text then has at most as many bytes as its tokens together. None for any other file: unknown
    tokens, added tokens and removed pieces could stand for any number of bytes.
    """
    from tokenizers.pre_tokenizers import ByteLevel

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


def _removes_matches(part: Any) -> bool:
    """Whether a part of a tokenizer file removes or replaces the matches of a regular expression.

    The end of a text may then change the tokens of its beginning, so the text cannot be cut.
    """
    if isinstance(part, list):
        return any(map(_removes_matches, part))
    if not isinstance(part, dict):
        return False
    has_regex = isinstance(part.get("pattern"), dict) and "Regex" in part["pattern"]
    removes = part.get("type") == "Replace" or part.get("behavior") == "Removed"
    if has_regex and removes:
        return True
    return any(_removes_matches(value) for key, value in part.items() if key != "model")
