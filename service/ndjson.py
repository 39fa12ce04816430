"""Lines of JSON: each line holds a text, and each answer is a line.

The routes of `application/x-ndjson` and `evalmode predict --input` share this module.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from evalmode.service.errors import BadRequest, NotReady, RequestError, TextTooLong
from evalmode.service.strict_json import parse_json, shown, shown_key

MEDIA_TYPE = "application/x-ndjson"
# The header with the digest of the model that answers a stream.
DIGEST_HEADER = "x-evalmode-digest"

# How much of a stream the server has read and not yet answered, at most. `evalmode predict --url`
# sends no more than this in a request. Most clients write everything before they read: with more, a
# client and a server could wait for each other.
WINDOW_ROWS = 256
WINDOW_BYTES = 1 << 20


class ScoredLabel(Protocol):
    """A label with its score."""

    @property
    def label(self) -> str:
        """The label."""

    @property
    def score(self) -> float:
        """Its probability."""


class Predicted(Protocol):
    """A prediction for one text: `evalmode.service.models.text.Prediction`.

    A protocol, because the package `models` may import this module, but not the reverse.
    """

    @property
    def top(self) -> Sequence[ScoredLabel]:
        """The best labels, best first."""

    @property
    def truncated(self) -> bool:
        """Whether the text was cut."""


Predict = Callable[[Sequence[str]], Awaitable[Sequence[Predicted]]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that was read: its text, or the problem with it.

    `echoed` holds the fields that the answer repeats: `id`, if the line has one.
    """

    text: str = ""
    problem: str | None = None
    echoed: Mapping[str, object] = field(default_factory=dict)


class Splitter:
    r"""Cuts chunks of bytes into lines.

    It holds at most one chunk, and one line of at most `max_line_bytes`.

    >>> splitter = Splitter(max_line_bytes=3)
    >>> list(splitter.feed(b"ab")), list(splitter.feed(b"c\nlong\nd")), list(splitter.end())
    ([], [b'abc', None], [b'd'])
    """

    def __init__(self, *, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._pieces: list[bytes] = []
        self._length_bytes = 0
        self._is_too_long = False

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        """The lines that end in this chunk, without their line ends. None for one too long."""
        *ends, rest = chunk.split(b"\n")
        for piece in ends:
            self._add(piece)
            yield self._pop_line()
        self._add(rest)

    def end(self) -> Iterator[bytes | None]:
        """The last line, if no line end follows it."""
        if self._length_bytes:
            yield self._pop_line()

    def _add(self, piece: bytes) -> None:
        self._length_bytes += len(piece)
        if self._length_bytes > self._max_line_bytes:
            self._is_too_long = True
            self._pieces.clear()
        elif piece:
            self._pieces.append(piece)

    def _pop_line(self) -> bytes | None:
        line = None if self._is_too_long else b"".join(self._pieces).removesuffix(b"\r")
        self._pieces, self._length_bytes, self._is_too_long = [], 0, False
        return line


def read_line(raw: bytes) -> Line:
    """A line of input: a JSON string, or an object with `text` and optionally `id`.

    Any other key is a problem. Otherwise a `top_k` in a line would have no effect, silently.

    >>> read_line(b'{"text": "good", "id": 7}')
    Line(text='good', problem=None, echoed={'id': 7})
    """
    try:
        value = parse_json(raw, subject="the line")
    except BadRequest as error:
        return Line(problem=str(error))
    if isinstance(value, str):
        return Line(text=value)
    if not isinstance(value, dict):
        return Line(
            problem=f"the line must be a string or an object with the key text, got {shown(value)}"
        )

    echoed: dict[str, object] = {}
    if "id" in value:
        line_id = value["id"]
        # Python reads 1e999 as infinity, which JSON cannot repeat.
        is_infinite = isinstance(line_id, float) and not math.isfinite(line_id)
        if isinstance(line_id, dict | list) or is_infinite:
            return Line(
                problem=f"id must be a string, a number, true, false or null, got {shown(line_id)}"
            )
        echoed["id"] = line_id

    for key in value:
        if key not in ("text", "id"):
            return Line(
                problem=(
                    f"{shown_key(key)} is not a field of a line, which has text and id: top_k,"
                    " truncate, model and version are for all lines, in the query"
                ),
                echoed=echoed,
            )
    if "text" not in value:
        return Line(problem="text is missing", echoed=echoed)
    if not isinstance(value["text"], str):
        return Line(problem=f"text must be a string, got {shown(value['text'])}", echoed=echoed)
    return Line(text=value["text"], echoed=echoed)


def prediction_record(prediction: Predicted) -> dict[str, object]:
    """The fields of a prediction in every answer: its best label, and its best labels in order."""
    top = [{"label": scored.label, "score": scored.score} for scored in prediction.top]
    return {**top[0], "truncated": prediction.truncated, "top": top}


def line_too_long(max_line_bytes: int) -> str:
    """The problem with a line that is longer than the limit."""
    return f"the line is longer than the {max_line_bytes} bytes allowed: shorten it"


async def answer_lines(
    raw: Sequence[bytes | None],
    *,
    first: int,
    predict: Predict,
    inline_bytes: int,
    too_long: str = "the line is too long",
) -> list[bytes]:
    """The answer to each line, as a line of JSON, numbered from `first`.

    A line with a problem has the problem as its answer; `too_long` is that of a line that is None.
    More than `inline_bytes` are read in a thread. Raises NotReady if nothing can be answered.
    """

    def read() -> list[Line]:
        return [Line(problem=too_long) if line is None else read_line(line) for line in raw]

    if sum(len(line) for line in raw if line is not None) <= inline_bytes:
        lines = read()
    else:
        lines = await asyncio.to_thread(read)

    texts = [line.text for line in lines if line.problem is None]
    outcomes = iter(await _predict_each(texts, predict))
    answers = []
    for index, line in enumerate(lines, first):
        answer: dict[str, object] = {"index": index, **line.echoed}
        outcome = line.problem if line.problem is not None else next(outcomes)
        if isinstance(outcome, str):
            answer["error"] = outcome
        else:
            answer |= prediction_record(outcome)
        answers.append(encode_line(answer))
    return answers


async def _predict_each(texts: Sequence[str], predict: Predict) -> Sequence[Predicted | str]:
    """The prediction for each text, or the sentence why it cannot be answered."""
    if not texts:
        return []
    try:
        return await predict(texts)
    except NotReady:
        raise
    except RequestError as error:
        if len(texts) == 1:
            # Here the text is not called `inputs.0`.
            return [f"text {error.problem}" if isinstance(error, TextTooLong) else str(error)]
    # One text is at fault. Each is predicted by itself, so that the others are answered.
    outcomes = await asyncio.gather(*(_predict_each([text], predict) for text in texts))
    return [outcome for (outcome,) in outcomes]


def encode_line(answer: Mapping[str, object]) -> bytes:
    r"""The answer as one line of JSON, with its line end.

    Numbers have as many digits as are needed to read the same bits back.

    >>> encode_line({"index": 0, "error": "text is missing"})
    b'{"index":0,"error":"text is missing"}\n'
    """
    # An id may hold half a surrogate pair, which UTF-8 cannot encode. It becomes an escape, which
    # JSON reads.
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"
