"""Lines of newline-delimited JSON: how they are split, read and answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalmode.service.ndjson import Splitter, answer_lines, read_line


@given(st.binary(), st.lists(st.integers(0, 40)), st.integers(1, 12))
def test_lines_are_the_same_however_the_bytes_are_cut_into_chunks(
    body: bytes, cuts: list[int], limit: int
) -> None:
    positions = sorted(min(cut, len(body)) for cut in cuts)
    splitter = Splitter(max_line_bytes=limit)
    split: list[bytes | None] = []
    for begin, end in zip([0, *positions], [*positions, len(body)], strict=True):
        split += splitter.feed(body[begin:end])
    split += splitter.end()
    lines = body.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    assert split == [None if len(line) > limit else line.removesuffix(b"\r") for line in lines]


def test_a_splitter_buffers_no_more_than_the_limit_of_a_line() -> None:
    splitter = Splitter(max_line_bytes=1000)
    for _ in range(100):
        assert list(splitter.feed(b"x" * 1000)) == []
        assert sum(map(len, splitter._pieces)) <= 1000
    assert list(splitter.feed(b"\nabc\n")) == [None, b"abc"]


@pytest.mark.parametrize(
    ("raw", "text", "echoed"),
    [
        (b'"a"', "a", {}),
        (b'  {"text": "b"}  ', "b", {}),
        (b'{"text": "", "id": null}', "", {"id": None}),
        (b'\xef\xbb\xbf"behind a byte order mark"', "behind a byte order mark", {}),
        (b'{"id": "\\ud83d", "text": "\\ud83d"}', "\ud83d", {"id": "\ud83d"}),
        (b'{"id": 1.5, "text": "c"}', "c", {"id": 1.5}),
    ],
)
def test_a_line_is_a_string_or_an_object_with_a_text(
    raw: bytes, text: str, echoed: dict[str, object]
) -> None:
    line = read_line(raw)
    assert (line.text, line.problem, line.echoed) == (text, None, echoed)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[" * 100_000, "nested"),
        (b"17", "must be a string or an object with the key text, got 17"),
        (b"{}", "text is missing"),
        (b'{"text": 3}', "text must be a string, got 3"),
        (b'{"text": "a", "top_k": 1}', "top_k is not a field of a line, which has text and id"),
        (b'{"text": "a", "": 1}', '"" is not a field of a line'),
        (b'{"text": "a", "id": %s}' % (b"9" * 5000), "id is a number of 5000 digits"),
        (b'{"text": "a", "id": [1]}', "id must be a string"),
        (b'{"text": "a", "id": 1e999}', "id must be a string"),
    ],
)
def test_the_problem_with_a_line_is_one_sentence(raw: bytes, sentence: str) -> None:
    problem = read_line(raw).problem
    assert problem is not None
    assert sentence in problem
    assert len(problem) < 200


def test_answers_to_lines_are_numbered_from_the_first_index() -> None:
    async def predict(texts: Sequence[str]) -> list[Any]:
        return [
            SimpleNamespace(top=[SimpleNamespace(label=text, score=0.5)], truncated=False)
            for text in texts
        ]

    answers = asyncio.run(answer_lines([b'"a"', b"{"], first=40, predict=predict, inline_bytes=0))
    assert [json.loads(line)["index"] for line in answers] == [40, 41]
