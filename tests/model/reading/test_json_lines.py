"""JSON lines: values are what stands in the file, and what is no value of a class is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalmode.model.reading.source import Columns
from evalmode.model.reading.table import open_table
from evalmode.model.texts import DataError


def read(folder: Path, content: str) -> Columns:
    path = folder / "d.jsonl"
    path.write_text(content, newline="", encoding="utf-8")
    with open_table(path) as table:
        return table.read(text="text", label="label")


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("1.0", "1.0"),
        ("1", "1"),
        ("-0", "-0"),
        ("1e5", "1e5"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("9007199254740993", "9007199254740993"),
        ("0.1000000000000000055", "0.1000000000000000055"),
        ("9" * 5000, "9" * 5000),
        ('"2024-01-01"', "2024-01-01"),
        ('"2024-01-01T00:00:00Z"', "2024-01-01T00:00:00Z"),
        ('"007"', "007"),
        ('"NaN"', "NaN"),
        ('"null"', "null"),
        ("true", "true"),
        ("false", "false"),
        ("null", None),
        ("NaN", None),
    ],
)
def test_a_label_is_the_text_that_stands_there(tmp_path, written, label):
    assert read(tmp_path, f'{{"text": "a", "label": {written}}}\n').labels == [label]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ('"label": ["neg"]', "column 'label' holds a list"),
        ('"label": {"en": "neg"}', "column 'label' holds an object"),
        ('"label": []', "column 'label' holds a list"),
        ('"label": "a", "label": "b"', "the key 'label' stands 2 times"),
        ('"label": Infinity', "Infinity is not a number that JSON has"),
        ('"label": "a"', None),
    ],
)
def test_lists_objects_and_double_keys_are_refused_with_their_line(tmp_path, member, reason):
    good = '{"text": "a", "label": "x", "tags": ["any", {"thing": 1}]}\n'
    content = f'{good}\n{{"text": "b", {member}}}\n{good}'
    if reason is None:
        assert list(read(tmp_path, content).numbers) == [1, 3, 4]
        return
    with pytest.raises(DataError, match=rf"d\.jsonl, line 3.*{reason}") as refused:
        read(tmp_path, content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "character 2 is not JSON"),
        ('{"text": "a", "label": "b"} {"text": "c", "label": "d"}', "is not JSON"),
        ("{'text': 'a', 'label': 'b'}", "is not JSON"),
        ('[{"text": "a", "label": "b"}]', "is a list and not an object"),
        ('"text"', 'is "text" and not an object'),
        ("null", "is null and not an object: write each row as"),
        ("  3 ", "is 3 and not an object: write each row as"),
        ("-1.5e3", "is -1.5e3 and not an object"),
        ("true", "is true and not an object"),
        ("NaN", "is NaN and not an object"),
        ('"' + "x" * 5000 + '"', 'is "x{39}[.][.][.] and not an object'),
        ("[" * 100_000, "cannot be read: it holds lists or objects within more others"),
        ('{"a":' * 100_000, "cannot be read: it holds lists or objects within more others"),
        ("Infinity", "Infinity is not a number that JSON has: write null, or a string"),
    ],
)
def test_a_line_that_is_no_object_is_refused(tmp_path, line, reason):
    content = '{"text": "a", "label": "x"}\n' + line + "\n"
    with pytest.raises(DataError, match=rf"d\.jsonl, line 2.* {reason}"):
        read(tmp_path, content)


def test_line_separators_inside_of_strings_end_no_line(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\\nf"]
    content = "".join(
        json.dumps({"text": text, "label": "x"}, ensure_ascii=False) + "\r\n" for text in texts
    )
    assert read(tmp_path, "\ufeff" + content).texts == texts


def test_a_member_that_is_missing_is_no_value(tmp_path):
    columns = read(tmp_path, '{"text": "a"}\n{"label": "x", "text": "b"}\n')
    assert columns.labels == [None, "x"]


def test_a_file_without_objects_says_so(tmp_path):
    with pytest.raises(DataError, match="is empty: each line must hold one object"):
        read(tmp_path, "\n \n")


def test_the_mark_that_begins_a_file_may_stand_inside_of_a_joined_one(tmp_path):
    line = '{"text": "a", "label": "x"}\n'
    assert read(tmp_path, line + "\ufeff" + line).labels == ["x", "x"]


@pytest.mark.parametrize("text", ["word " * 30_000, "é\n" * 50_000, "😀 b" * 40_000, '"' * 90_000])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_long_text_is_read_as_it_stands(tmp_path, text, is_ascii):
    row = json.dumps({"text": f" {text}\t", "label": "x"}, ensure_ascii=is_ascii)
    assert read(tmp_path, row + "\n").texts == [text.strip()]
