"""The protocol's datatypes, and their elements from and to lists of JSON values.

Reading is stricter than Python: a bool is not a number, and 1.0 is not an integer. A number beyond
its datatype is refused, where NumPy would wrap it or round it to infinity. Floats are written with
as many digits as it takes to read the same bits back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic_core import to_json

from evalmode.bundle.datatypes import ELEMENT_TYPES
from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import shown_flat

Array: TypeAlias = npt.NDArray[Any]

BYTES = "BYTES"

# The NumPy type of each datatype but BYTES, whose elements are objects: `str` or `bytes`.
DTYPES: dict[str, np.dtype[Any]] = {
    element.datatype: element.dtype for element in ELEMENT_TYPES if element.dtype is not None
}
DATATYPES = (*DTYPES, BYTES)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The lowest and the highest value of each integer datatype, as Python integers: a request may hold
# an integer that no NumPy type holds.
_INTEGER_BOUNDS = {
    name: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for name, dtype in DTYPES.items()
    if dtype.kind in "iu"
}


def datatype_of(array: Array) -> str:
    """The protocol's name for the elements of an array; `str` and `bytes` objects are BYTES."""
    if array.dtype.hasobject:
        return BYTES
    return _NAMES[array.dtype.newbyteorder("<")]


def array_from_values(values: Sequence[object], datatype: str, *, field: str) -> Array:
    """JSON values as a flat array of `datatype`; elements of BYTES become `str` objects.

    Raises BadRequest, naming the first value that the datatype does not hold.

    >>> array_from_values([1, 2.5], "FP32", field="inputs.0.data")
    array([1. , 2.5], dtype=float32)
    """
    # The values are checked together, which is many times faster than one by one.
    array: Array | None = None
    types = set(map(type, values))
    if datatype == BYTES:
        expected = "a string"
        if types <= {str}:
            array = np.array(values, dtype=object)
    elif datatype == "BOOL":
        expected = "true or false"
        if types <= {bool}:
            array = np.array(values, dtype=np.bool_)
    elif datatype in _INTEGER_BOUNDS:
        expected = f"an integer within {datatype}"
        if types <= {int}:
            # NumPy refuses integers beyond the datatype.
            with suppress(OverflowError):
                array = np.array(values, dtype=DTYPES[datatype])
    else:
        expected = f"a number within {datatype}"
        if types <= {int, float}:
            array = _finite_array(values, datatype)
    if array is not None:
        return array

    # At least one value is wrong. The values are checked one by one only now, to name the first.
    for index, value in enumerate(values):
        if not _fits(value, datatype):
            raise BadRequest(
                f"{field}.{index} must be {expected}, got {shown_flat(value)}",
                field=f"{field}.{index}",
            )
    raise AssertionError("each value fits its datatype, but not all of them together")


def _fits(value: object, datatype: str) -> bool:
    if datatype == BYTES:
        return type(value) is str
    if datatype == "BOOL":
        return type(value) is bool
    if datatype in _INTEGER_BOUNDS:
        lowest, highest = _INTEGER_BOUNDS[datatype]
        return type(value) is int and lowest <= value <= highest
    return type(value) in (int, float) and _finite_array([value], datatype) is not None


def _finite_array(numbers: Sequence[Any], datatype: str) -> Array | None:
    """The numbers as a float datatype; None where it does not hold one of them."""
    try:
        with np.errstate(over="ignore"):
            # By way of float64, which is how most parsers of JSON read all numbers, integers too.
            array: Array = np.array(numbers, dtype=np.float64).astype(DTYPES[datatype])
    except OverflowError:
        # An integer beyond float64.
        return None
    return array if np.isfinite(array).all() else None


def array_to_json(array: Array, *, field: str) -> bytes:
    """The elements in row-major order, as a list in JSON.

    Numbers have as many digits as `repr` writes.

    Raises BadRequest, naming `field`, for elements that JSON cannot write: NaN and infinity, and
    bytes that are not UTF-8. The message names the way out, binary data.
    """
    flat = array.ravel()
    if not array.dtype.hasobject:
        numbers: list[Any] = flat.tolist()
        if array.dtype.kind != "f":
            return to_json(numbers)
        # The sum is not finite if a number is not, but it may be too large all the same.
        if not math.isfinite(sum(numbers)) and not np.isfinite(flat).all():
            raise BadRequest(
                f"{field} holds numbers that are not finite, which JSON cannot write: request it"
                ' with the parameter "binary_data": true',
                field=field,
            )
        written = to_json(numbers)
        if b"e" not in written and b"0.0000" not in written:
            return written
        # Python writes another exponent than pydantic, and writes one below 0.0001.
        magnitudes = np.abs(flat.astype(np.float64))
        parts = written[1:-1].split(b",")
        for index in np.flatnonzero((magnitudes < 1e-4) | (magnitudes >= 1e16)).tolist():
            parts[index] = repr(numbers[index]).encode()
        return b"[%b]" % b",".join(parts)

    texts: list[str] = []
    for element in flat:
        try:
            texts.append(element if isinstance(element, str) else element.decode())
        except UnicodeDecodeError as error:
            raise BadRequest(
                f"{field} holds bytes that are not UTF-8: request it with the parameter"
                ' "binary_data": true',
                field=field,
            ) from error
    return json.dumps(texts, separators=(",", ":")).encode()
