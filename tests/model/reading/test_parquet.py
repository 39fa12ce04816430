"""Parquet files with columns of every type that is read, and of the types that are refused."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evalmode.model.data_set import DataError
from evalmode.model.reading.source import Columns
from evalmode.model.reading.table import open_table


def read(path: Path) -> Columns:
    with open_table(path) as table:
        return table.read(text="text", label="label")


def write_file(
    folder: Path, labels: pyarrow.Array, features: object = None, **others: object
) -> Path:
    path = folder / "d.parquet"
    texts = [f"text {n}" for n in range(len(labels))]
    table = pyarrow.table({"text": texts, "label": labels, **others})
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pyarrow.array(["a", None, "b"]), ["a", None, "b"]),
        (pyarrow.array(["a", None], pyarrow.large_string()), ["a", None]),
        (pyarrow.array(["a", None], pyarrow.string_view()), ["a", None]),
        (pyarrow.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (pyarrow.array([b"a", None, b"b"]).dictionary_encode(), ["a", None, "b"]),
        (pyarrow.array(["a", "b"] * 3_000).dictionary_encode(), ["a", "b"] * 3_000),
        (pyarrow.array([" a ", "\u00a0b"]), ["a", "b"]),
        (pyarrow.array([7, 8, 7]).dictionary_encode(), ["7", "8", "7"]),
        (pyarrow.array([1, None, 2**63 - 1]), ["1", None, "9223372036854775807"]),
        (pyarrow.array([2**64 - 1], pyarrow.uint64()), ["18446744073709551615"]),
        (pyarrow.array([True, None, False]), ["true", None, "false"]),
        (pyarrow.array([1.0, None, float("nan"), 0.1]), ["1.0", None, None, "0.1"]),
        (pyarrow.array([0.1, None], pyarrow.float32()), ["0.1", None]),
        (pyarrow.array(["é".encode(), None]), ["é", None]),
        (pyarrow.array([b"ab"], pyarrow.binary(2)), ["ab"]),
        (pyarrow.array([b"ab"], pyarrow.large_binary()), ["ab"]),
        (pyarrow.array([None, None], pyarrow.null()), [None, None]),
    ],
)
def test_a_value_is_read_as_its_text(tmp_path, labels, expected):
    columns = read(write_file(tmp_path, labels))
    assert columns.labels == expected
    assert columns.texts == [f"text {n}" for n in range(len(expected))]


@pytest.mark.parametrize(
    "labels",
    [
        pyarrow.array([["neg"], ["pos", "new"]]),
        pyarrow.array([{"en": "neg"}]),
        pyarrow.array([datetime.date(2024, 1, 1)]),
        pyarrow.array([datetime.datetime(2024, 1, 1)]),
        pyarrow.array([decimal.Decimal("1.10")]),
        pyarrow.array([datetime.timedelta(1)]),
    ],
)
def test_other_types_are_refused_with_column_and_type(tmp_path, labels):
    with pytest.raises(DataError) as refusal:
        read(write_file(tmp_path, labels))
    kind = str(labels.type).partition("<")[0]
    assert f"column 'label' is of the type {kind}" in str(refusal.value)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (pyarrow.array([b"a", b"\xe9"]), "row 2: column 'label' holds bytes that are not UTF-8"),
        (pyarrow.array([1.0, float("inf")]), "row 2: column 'label' holds inf"),
    ],
)
def test_a_value_without_a_text_is_refused_with_its_row(tmp_path, labels, reason):
    with pytest.raises(DataError, match=reason):
        read(write_file(tmp_path, labels))


CLASS_LABEL = {"_type": "ClassLabel", "names": ["neg", "pos"]}


def test_numbers_become_the_class_names_in_the_file(tmp_path):
    labels = pyarrow.array([0, 1, -1, None, 1], pyarrow.int64())
    path = write_file(tmp_path, labels, {"label": CLASS_LABEL})
    assert read(path).labels == ["neg", "pos", None, None, "pos"]


def test_class_numbers_that_pandas_wrote_as_floats_become_class_names(tmp_path):
    labels = pyarrow.array([0.0, float("nan"), 1.0, None])
    path = write_file(tmp_path, labels, {"label": CLASS_LABEL})
    assert read(path).labels == ["neg", None, "pos", None]
    with pytest.raises(DataError, match=r"row 2: column 'label' holds 0\.5, and its ClassLabel"):
        read(write_file(tmp_path, pyarrow.array([0.0, 0.5]), {"label": CLASS_LABEL}))


def test_class_names_of_another_column_change_nothing(tmp_path):
    path = write_file(
        tmp_path, pyarrow.array([0, 1]), {"other": CLASS_LABEL, "label": {"_type": "Value"}}
    )
    assert read(path).labels == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "feature", "reason"),
    [
        (
            [0, 2],
            CLASS_LABEL,
            "row 2: column 'label' holds 2, and its ClassLabel names the classes 0 to 1",
        ),
        ([0, -2], CLASS_LABEL, "row 2: column 'label' holds -2"),
        ([0, 1], CLASS_LABEL | {"names": ["neg", "neg"]}, "not a list of different strings"),
        ([0, 1], CLASS_LABEL | {"names": None}, "not a list of different strings"),
    ],
)
def test_numbers_without_a_class_name_are_refused(tmp_path, labels, feature, reason):
    with pytest.raises(DataError, match=reason):
        read(write_file(tmp_path, pyarrow.array(labels), {"label": feature}))


def test_the_values_of_other_columns_are_ignored(tmp_path):
    path = write_file(tmp_path, pyarrow.array(["a"]), image=[{"bytes": b"\xff", "path": None}])
    assert read(path).labels == ["a"]


@pytest.mark.parametrize("content", [b"", b"no", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "d.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.parquet cannot be read as Parquet") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused_in_one_sentence(tmp_path):
    path = write_file(tmp_path, pyarrow.array(["a", "b"] * 500))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path)


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds columns and no rows"):
        read(write_file(tmp_path, pyarrow.array([], pyarrow.string())))


KINDS = [
    *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()),
    *(pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()),
]


@pytest.mark.parametrize(
    ("kind", "is_dictionary"),
    # pyarrow writes no dictionaries of views.
    [*((kind, False) for kind in KINDS), (KINDS[0], True), (KINDS[3], True), (KINDS[4], True)],
    ids=str,
)
def test_a_long_text_among_short_ones_is_read_unchanged(tmp_path, kind, is_dictionary):
    texts = [f"text {number}" for number in range(3_000)]
    texts[1_500], texts[2_999] = "some é 😀 words " * 100_000, ""
    values = pyarrow.array([*texts, None], pyarrow.string()).cast(kind)
    if is_dictionary:
        values = values.dictionary_encode()
    columns = read(write_file(tmp_path, values))
    assert columns.labels == [*(text.strip() for text in texts), None]


def test_invalid_utf_8_in_a_long_value_is_refused_with_its_row_and_byte(tmp_path):
    values = [b"a"] * 1_500 + [b" " * 100_000 + b"b" * 2_000_000 + b"\xff" + b"c"]
    with pytest.raises(DataError, match=r"row 1501: .* not UTF-8 \(byte 2100001 is 0xff\)"):
        read(write_file(tmp_path, pyarrow.array(values)))


def test_the_default_memory_pool_of_pyarrow_is_unchanged(tmp_path):
    backend = pyarrow.default_memory_pool().backend_name
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    read(write_file(tmp_path, pyarrow.array(["a"])))
    with pytest.raises(DataError):
        read(broken)
    assert pyarrow.default_memory_pool().backend_name == backend
