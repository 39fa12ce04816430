"""JSON lines: values are read unchanged, and a value that cannot be a label is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalmode.model.data_set import DataError
from evalmode.model.reading.source import Columns
from evalmode.model.reading.table import open_table


def write_file(folder: Path, content: str) -> Path:
    path = folder / "d.jsonl"
    path.write_text(content, newline="", encoding="utf-8")
    return path


def read(folder: Path, content: str) -> Columns:
    with open_table(write_file(folder, content)) as table:
        return table.read(text="text", label="label")


@pytest.mark.parametrize(
    ("value", "label"),
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
def test_a_label_is_the_text_of_the_value_in_the_file(tmp_path, value, label):
    assert read(tmp_path, f'{{"text": "a", "label": {value}}}\n').labels == [label]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ('"label": ["neg"]', "column 'label' holds a list"),
        ('"label": {"en": "neg"}', "column 'label' holds an object"),
        ('"label": []', "column 'label' holds a list"),
        ('"label": "a", "label": "b"', "the key 'label' occurs 2 times"),
        ('"label": Infinity', "Infinity is not a number in JSON"),
        ('"label": "a"', None),
    ],
)
def test_lists_objects_and_double_keys_are_refused_with_their_line(tmp_path, member, reason):
    good = '{"text": "a", "label": "x", "tags": ["any", {"thing": 1}]}\n'
    content = f'{good}\n{{"text": "b", {member}}}\n{good}'
    if reason is None:
        assert list(read(tmp_path, content).numbers) == [1, 3, 4]
        return
    with pytest.raises(DataError, match=rf"d\.jsonl, line 3.*{reason}") as refusal:
        read(tmp_path, content)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "character 2 is not JSON"),
        (" \u00a0{ \t", "character 4 is not JSON"),
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
        ("[" * 100_000, "cannot be read: its lists or objects are nested too deeply"),
        ('{"a":' * 100_000, "cannot be read: its lists or objects are nested too deeply"),
        ("Infinity", "Infinity is not a number in JSON: write null, or a string"),
    ],
)
def test_a_line_that_is_not_an_object_is_refused(tmp_path, line, reason):
    content = '{"text": "a", "label": "x"}\n' + line + "\n"
    with pytest.raises(DataError, match=rf"d\.jsonl, line 2.* {reason}"):
        read(tmp_path, content)


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\\nf"]
    content = "".join(
        json.dumps({"text": text, "label": "x"}, ensure_ascii=False) + "\r\n" for text in texts
    )
    assert read(tmp_path, "\ufeff" + content).texts == texts


def test_a_missing_member_is_a_missing_value(tmp_path):
    columns = read(tmp_path, '{"text": "a"}\n{"label": "x", "text": "b"}\n')
    assert columns.labels == [None, "x"]


def test_a_file_without_objects_is_refused(tmp_path):
    with pytest.raises(DataError, match="is empty: each line must hold one object"):
        read(tmp_path, "\n \n")


def test_a_byte_order_mark_inside_a_joined_file_is_ignored(tmp_path):
    line = '{"text": "a", "label": "x"}\n'
    assert read(tmp_path, line + "\ufeff" + line).labels == ["x", "x"]


LONG_TEXTS = {
    "words": "word " * 300_000,
    "lines": "\u00e9\n" * 500_000,
    "emoji": "\U0001f600 b" * 400_000,
    "an emoji": "x" * 1_500_000 + "\U0001f600",
    "marks": '"' * 900_000,
    "escapes": "\\u0041" * 400_000,
    "halves": "\ud83d" + "\ud83d\U0001f600" * 200_000,
    "marks and emoji": '\U0001f600 "hi" ' * 200_000,
    "shifted": "a" + "\U0001f600" * 400_000,
    "the placeholder": "\x7f0" + "word " * 300_000,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS.keys())
@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_long_text_is_read_unchanged(tmp_path, text, is_ascii):
    # UTF-8 cannot encode half of a surrogate pair.
    is_ascii = is_ascii or "\ud83d" in text
    row = {"id": 1.50, "text": f" {text}\t", "tags": ["\x7f0", text], "label": "x"}
    columns = read(tmp_path, json.dumps(row, ensure_ascii=is_ascii) + "\n")
    assert columns.texts == [text.strip()]
    assert columns.labels == ["x"]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ('"', "character 2000012 is not JSON .Expecting ',' delimiter"),
        ('\\x", "label": "y"}', "character 2000011 is not JSON .Invalid .escape"),
        ('\x01", "label": "y"}', "character 2000011 is not JSON .Invalid control character"),
        ("", "character 10 is not JSON .Unterminated string"),
        ('", "label": "y", "label": "z"}', "the key 'label' occurs 2 times"),
        ('", "label": Infinity}', "Infinity is not a number in JSON"),
    ],
)
def test_an_error_in_a_long_line_has_its_position(tmp_path, end, reason):
    with pytest.raises(DataError, match=f"line 1.* {reason}"):
        read(tmp_path, '{"text": "' + "x" * 2_000_000 + end + "\n")


def test_a_long_key_is_a_key(tmp_path):
    row = {"text": "a", "label": "b", "k" * 2_000_000: "c"}
    with open_table(write_file(tmp_path, json.dumps(row))) as table:
        assert table.names == tuple(row)
