from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.binary import array_from_bytes, array_to_bytes
from evalmode.service.protocol.datatypes import (
    BYTES,
    DTYPES,
    array_from_values,
    array_to_json,
    datatype_of,
)


def refusal(values: list[object], datatype: str) -> str:
    with pytest.raises(BadRequest) as error:
        array_from_values(values, datatype, field="inputs.0.data")
    assert error.value.field is not None
    assert error.value.field.startswith("inputs.0.data.")
    return str(error.value)


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_goes_through_json_without_losing_a_bit(datatype: str):
    dtype = DTYPES[datatype]
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        array = np.array(
            [0.0, -0.0, 0.1, limits.max, limits.min, limits.tiny, limits.smallest_subnormal], dtype
        )
    elif dtype.kind == "b":
        array = np.array([True, False])
    else:
        array = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, 0, 1], dtype)
    written = json.loads(array_to_json(array, field="output x"))
    assert array_from_values(written, datatype, field="x").tobytes() == array.tobytes()
    assert datatype_of(array) == datatype


@given(st.binary(min_size=4, max_size=400))
def test_any_finite_float_goes_through_json_without_losing_a_bit(raw: bytes):
    for datatype in ("FP16", "FP32"):
        array = np.frombuffer(raw[: len(raw) // 4 * 4], DTYPES[datatype])
        array = array[np.isfinite(array)]
        written = json.loads(array_to_json(array, field="x"))
        assert array_from_values(written, datatype, field="x").tobytes() == array.tobytes()


@pytest.mark.parametrize("datatype", DTYPES)
@given(st.binary(max_size=400))
def test_numbers_are_written_as_python_writes_them(datatype: str, raw: bytes):
    dtype = DTYPES[datatype]
    array = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    array = array[np.isfinite(array)] if dtype.kind == "f" else array.astype(dtype)
    expected = json.dumps(array.tolist(), separators=(",", ":")).encode()
    assert array_to_json(array, field="x") == expected


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
@example([1e-4, 0.00099, 9.999e-5, 1e-5, 1e15, 1e16, 1e17, 123456789012345680.0, -1e-7, 10.00001])
@example([1.7976931348623157e308, 1.7976931348623157e308])
def test_floats_are_written_as_python_writes_them(numbers: list[float]):
    expected = json.dumps(numbers, separators=(",", ":")).encode()
    assert array_to_json(np.array(numbers, np.float64), field="x") == expected


def test_texts_are_written_in_ascii():
    texts = np.array(["é", b"\xe2\x98\x83", "\ud83d", '"'], dtype=object)
    assert array_to_json(texts, field="x") == rb'["\u00e9","\u2603","\ud83d","\""]'


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_goes_through_bytes_without_losing_a_bit(datatype: str):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(DTYPES[datatype])
    restored = array_from_bytes(memoryview(array_to_bytes(array)), datatype, 6, field="x")
    assert restored.tobytes() == array.tobytes()
    assert restored.dtype == array.dtype
    assert restored.flags.aligned
    assert restored.flags.writeable


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=10))
def test_bytes_elements_of_any_length_go_through_bytes(elements: list[bytes]):
    array = np.array(elements, dtype=object)
    restored = array_from_bytes(memoryview(array_to_bytes(array)), BYTES, len(elements), field="x")
    assert restored.tolist() == elements
    assert datatype_of(restored) == BYTES


@pytest.mark.parametrize(
    ("values", "datatype", "index", "value"),
    [
        ([1, True], "INT64", 1, "true"),
        ([1.0], "INT64", 0, "1.0"),
        ([0, 128], "INT8", 1, "128"),
        ([-1], "UINT64", 0, "-1"),
        ([2**64], "UINT64", 0, str(2**64)),
        (["1"], "INT32", 0, '"1"'),
        ([None], "INT32", 0, "null"),
        ([1], "BOOL", 0, "1"),
        ([True], "FP32", 0, "true"),
        ([1e39], "FP32", 0, "1e+39"),
        ([1.0, 65520.0], "FP16", 1, "65520.0"),
        ([float("inf")], "FP64", 0, "Infinity"),
        ([10**400], "FP64", 0, "1000"),
        (["a", 1], "BYTES", 1, "1"),
        ([[1]], "FP32", 0, "a list"),
        ([{}], "BYTES", 0, "an object"),
    ],
)
def test_a_value_that_its_datatype_cannot_hold_is_refused_with_its_index(
    values: list[object], datatype: str, index: int, value: str
):
    sentence = refusal(values, datatype)
    assert f"inputs.0.data.{index} must be " in sentence
    assert f"got {value}" in sentence


def test_an_integer_is_accepted_as_a_float():
    assert array_from_values([1, 2.5], "FP32", field="x").tolist() == [1.0, 2.5]


def test_half_an_emoji_is_accepted_as_a_text():
    assert array_from_values(["\ud83d"], BYTES, field="x").tolist() == ["\ud83d"]


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_numbers_that_json_cannot_write_are_refused_with_a_hint_at_binary_data(number: float):
    with pytest.raises(BadRequest, match=r'output y .*"binary_data": true'):
        array_to_json(np.array([1.0, number], np.float32), field="output y")


def test_bytes_that_are_not_text_are_refused_with_a_hint_at_binary_data():
    with pytest.raises(BadRequest, match=r'output y .*not UTF-8.*"binary_data": true'):
        array_to_json(np.array([b"\xff"], dtype=object), field="output y")


@pytest.mark.parametrize(
    ("raw", "datatype", "count", "sentence"),
    [
        (b"\0" * 7, "INT64", 1, "must be 8 bytes for 1 elements of INT64, got 7"),
        (b"", "FP32", 2**60, f"must be {2**62} bytes"),
        (b"\x02", "BOOL", 1, "must hold the bytes 0 and 1 for BOOL, got 2"),
        (b"\0\0\0", BYTES, 1, "ends within its element 0"),
        (b"\1\0\0\0", BYTES, 1, "ends within its element 0"),
        (b"\xff\xff\xff\xffab", BYTES, 1, "ends within its element 0"),
        (b"\1\0\0\0a", BYTES, 2, "fewer elements than the 2"),
        (b"\1\0\0\0a\0\0\0\0", BYTES, 1, "more elements than the 1"),
        (b"", BYTES, 10**30, "fewer elements"),
    ],
)
def test_bytes_that_do_not_fit_their_shape_are_refused(
    raw: bytes, datatype: str, count: int, sentence: str
):
    with pytest.raises(BadRequest, match=r"^inputs\.0\.data") as error:
        array_from_bytes(memoryview(raw), datatype, count, field="inputs.0.data")
    assert sentence in str(error.value)
