"""The protocol's datatypes, and their tensors from and to lists of JSON values. Knows no bytes and
no shapes.

Strict where Python is not: a bool is no number, 1.0 is no integer, and a number that its datatype
cannot hold is refused instead of wrapped or rounded to infinity. Floats are written with as many
digits as it takes to read the same bits back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from evalmode.bundle.datatypes import ELEMENT_TYPES
from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import shown_flat

Array: TypeAlias = npt.NDArray[Any]

BYTES = "BYTES"

DTYPES: dict[str, np.dtype[Any]] = {
    element.datatype: element.dtype for element in ELEMENT_TYPES if element.dtype is not None
}
DATATYPES = (*DTYPES, BYTES)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def datatype_of(array: Array) -> str:
    """The protocol's name for the elements of an array; objects (`str` or `bytes`) are BYTES."""
    return BYTES if array.dtype.hasobject else _NAMES[array.dtype.newbyteorder("<")]


def array_from_values(values: Sequence[object], datatype: str, *, field: str) -> Array:
    """A flat array of JSON values; BYTES become objects of `str`. Raises BadRequest naming the
    first that is wrong.
    """
    kinds = set(map(type, values))
    if datatype == BYTES:
        _require(
            kinds <= {str},
            values,
            lambda value: isinstance(value, str),
            what="a string",
            field=field,
        )
        return np.array(values, dtype=object)
    dtype = DTYPES[datatype]
    if dtype.kind == "b":
        _require(
            kinds <= {bool},
            values,
            lambda value: isinstance(value, bool),
            what="true or false",
            field=field,
        )
        return np.array(values, dtype=dtype)
    if dtype.kind == "f":
        return _floats(
            values,
            dtype,
            sound=kinds <= {int, float},
            what=f"a number within {datatype}",
            field=field,
        )
    return _integers(
        values, dtype, sound=kinds <= {int}, what=f"an integer within {datatype}", field=field
    )


def values_of(array: Array, *, field: str) -> list[Any]:
    """The elements, row-major, as JSON values. Raises BadRequest for what JSON cannot write, naming
    the way out.
    """
    flat = array.ravel()
    if array.dtype.hasobject:
        return [_text(element, field=field) for element in flat]
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        raise BadRequest(
            f"{field} holds numbers that are not finite, which JSON cannot write: ask for it with"
            ' the parameter "binary_data": true',
            field=field,
        )
    return list(flat.tolist())


def _text(element: str | bytes, *, field: str) -> str:
    if isinstance(element, str):
        return element
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(
            f'{field} holds bytes that are not UTF-8: ask for it with the parameter "binary_data":'
            " true",
            field=field,
        ) from error


def _integers(
    values: Sequence[object], dtype: np.dtype[Any], *, sound: bool, what: str, field: str
) -> Array:
    bounds = np.iinfo(dtype)
    lowest, highest = int(bounds.min), int(bounds.max)

    def fits(value: object) -> bool:
        return type(value) is int and lowest <= value <= highest

    sound = sound and (not values or (fits(min(values)) and fits(max(values))))  # type: ignore[type-var]
    _require(sound, values, fits, what=what, field=field)
    return np.array(values, dtype=dtype)


def _floats(
    values: Sequence[object], dtype: np.dtype[Any], *, sound: bool, what: str, field: str
) -> Array:
    def fits(value: object) -> bool:
        return type(value) in (int, float) and _all_finite([value], dtype) is not None

    found = _all_finite(values, dtype) if sound else None
    _require(found is not None, values, fits, what=what, field=field)
    assert found is not None
    return found


def _all_finite(values: Sequence[object], dtype: np.dtype[Any]) -> Array | None:
    """The numbers as `dtype`, or None where one of them is beyond it."""
    try:
        with np.errstate(over="ignore"):
            found = np.array(values, dtype=np.float64).astype(dtype)
    except OverflowError:  # an integer beyond float64
        return None
    return found if bool(np.isfinite(found).all()) else None


def _require(
    sound: bool, values: Sequence[object], fits: Callable[[object], bool], *, what: str, field: str
) -> None:
    if sound:
        return
    place = next(place for place, value in enumerate(values) if not fits(value))
    raise BadRequest(
        f"{field}.{place} must be {what}, got {shown_flat(values[place])}", field=f"{field}.{place}"
    )
