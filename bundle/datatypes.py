"""The element types that a tensor of a bundle may have, by their three names."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class ElementType(NamedTuple):
    """One element type.

    Attributes:
        datatype: its name in the Open Inference Protocol, in manifests and in requests.
        onnx: its name in ONNX Runtime.
        dtype: its NumPy dtype, little-endian as in binary requests; None for strings.
    """

    datatype: str
    onnx: str
    dtype: np.dtype[Any] | None


ELEMENT_TYPES = (
    ElementType("BOOL", "tensor(bool)", np.dtype("?")),
    ElementType("UINT8", "tensor(uint8)", np.dtype("u1")),
    ElementType("UINT16", "tensor(uint16)", np.dtype("<u2")),
    ElementType("UINT32", "tensor(uint32)", np.dtype("<u4")),
    ElementType("UINT64", "tensor(uint64)", np.dtype("<u8")),
    ElementType("INT8", "tensor(int8)", np.dtype("i1")),
    ElementType("INT16", "tensor(int16)", np.dtype("<i2")),
    ElementType("INT32", "tensor(int32)", np.dtype("<i4")),
    ElementType("INT64", "tensor(int64)", np.dtype("<i8")),
    ElementType("FP16", "tensor(float16)", np.dtype("<f2")),
    ElementType("FP32", "tensor(float)", np.dtype("<f4")),
    ElementType("FP64", "tensor(double)", np.dtype("<f8")),
    ElementType("BYTES", "tensor(string)", None),
)
