"""A text a line in, an answer a line out: what `application/x-ndjson` bodies and `evalmode predict
--input` share, the server and its client alike.
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
DIGEST_HEADER = "x-evalmode-digest"  # of the model that answers a stream

# What a stream has read and not yet sent. `evalmode predict --url` sends no more than this in a
# request: a client that writes all before it reads, as most do, could otherwise wait for a server
# that waits for it.
WINDOW_ROWS = 256
WINDOW_BYTES = 1 << 20


class ScoredLabel(Protocol):
    """A label with its probability."""

    @property
    def label(self) -> str:
        """The label."""

    @property
    def score(self) -> float:
        """Its probability."""


class Predicted(Protocol):
    """What a model says of one text."""

    @property
    def top(self) -> Sequence[ScoredLabel]:
        """The best labels, best first."""

    @property
    def truncated(self) -> bool:
        """Whether the text was cut."""


Predict = Callable[[Sequence[str]], Awaitable[Sequence[Predicted]]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that was read: its text, or the problem with it. Its answer repeats `echoed`, the
    id.
    """

    text: str = ""
    problem: str | None = None
    echoed: Mapping[str, object] = field(default_factory=dict)


class Splitter:
    """Cuts chunks of bytes into lines, and never holds more than one chunk and one line within the
    limit.
    """

    def __init__(self, *, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._begun: list[bytes] = []
        self._begun_bytes = 0
        self._too_long = False

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        """The lines that this chunk completes, without their ends; None for one that is too
        long.
        """
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(piece)
            yield self._taken()
        self._add(rest)

    def end(self) -> Iterator[bytes | None]:
        """The last line, where no line end follows it."""
        if self._begun_bytes:
            yield self._taken()

    def _add(self, piece: bytes) -> None:
        self._begun_bytes += len(piece)
        if self._begun_bytes > self._max_line_bytes:
            self._too_long = True
            self._begun.clear()
        elif piece:
            self._begun.append(piece)

    def _taken(self) -> bytes | None:
        line = None if self._too_long else b"".join(self._begun).removesuffix(b"\r")
        self._begun, self._begun_bytes, self._too_long = [], 0, False
        return line


def read_line(raw: bytes) -> Line:
    """What a line asks: a JSON string, or an object with `text` and perhaps `id`.

    Any other key is a problem: `top_k` in a line would otherwise be ignored without a word.
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
        name = value["id"]
        if isinstance(name, dict | list) or (isinstance(name, float) and not math.isfinite(name)):
            return Line(
                problem=f"id must be a string, a number, true, false or null, got {shown(name)}"
            )
        echoed["id"] = name
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


def line_too_long(max_line_bytes: int) -> str:
    """The problem with a line that is longer than the limit."""
    return f"the line is longer than the {max_line_bytes} bytes that are read here: shorten it"


async def answer_lines(
    raw: Sequence[bytes | None],
    *,
    first: int,
    predict: Predict,
    inline_bytes: int,
    too_long: str = "the line is too long",
) -> list[bytes]:
    """An answer a line, each with its line end, numbered from `first`. The answer of a line with a
    problem is that problem; `too_long` is the one of a line that is None.

    More than `inline_bytes` are read in a thread. Raises NotReady where nothing will be answered
    any more.
    """

    def read() -> list[Line]:
        return [Line(problem=too_long) if line is None else read_line(line) for line in raw]

    if sum(map(len, filter(None, raw))) <= inline_bytes:
        lines = read()
    else:
        lines = await asyncio.to_thread(read)
    outcomes = iter(
        await _predictions([line.text for line in lines if line.problem is None], predict)
    )
    answers = []
    for index, line in enumerate(lines, first):
        outcome = line.problem if line.problem is not None else next(outcomes)
        answers.append(_spelled(index, line, outcome))
    return answers


async def _predictions(texts: Sequence[str], predict: Predict) -> Sequence[Predicted | str]:
    """The predictions of `texts`; a text that cannot be answered has the sentence that says why."""
    if not texts:
        return []
    try:
        return await predict(texts)
    except NotReady:
        raise
    except RequestError as error:
        if len(texts) == 1:
            return [f"text {error.problem}" if isinstance(error, TextTooLong) else str(error)]
    # One of them is at fault: each is asked by itself, so that the others are answered.
    each = await asyncio.gather(*(_predictions([text], predict) for text in texts))
    return [outcome for (outcome,) in each]


def _spelled(index: int, line: Line, outcome: Predicted | str) -> bytes:
    answer: dict[str, object] = {"index": index, **line.echoed}
    if isinstance(outcome, str):
        answer["error"] = outcome
    else:
        top = [{"label": scored.label, "score": scored.score} for scored in outcome.top]
        answer |= {**top[0], "truncated": outcome.truncated, "top": top}
    return spell(answer)


def spell(answer: Mapping[str, object]) -> bytes:
    """One line of JSON with its end; numbers have as many digits as it takes to read the same bits
    back.
    """
    # Half a surrogate pair, which an id may hold, becomes the escape that JSON reads.
    return (
        json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "backslashreplace"
        )
        + b"\n"
    )
