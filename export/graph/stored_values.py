"""The values that a model stores: small initializers, and the attributes of Constant nodes.

None stands for a value that must not decide anything: it is too large, cannot be read, or is stored
in a form that runtimes read differently.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.runtime import ELEMENTS
from evalmode.export.graph.scope import Absent, NodeOutput
from evalmode.export.graph.weight import Array, Weight

# The attributes of Constant that hold numbers, with the type that each must have.
_CONSTANT_TYPES = {
    "value": onnx.AttributeProto.TENSOR,
    "sparse_value": onnx.AttributeProto.SPARSE_TENSOR,
    "value_int": onnx.AttributeProto.INT,
    "value_ints": onnx.AttributeProto.INTS,
    "value_float": onnx.AttributeProto.FLOAT,
    "value_floats": onnx.AttributeProto.FLOATS,
}


def read_weight(weight: Weight) -> Array | None:
    """The values of a weight with at most `runtime.ELEMENTS` elements."""
    try:
        if weight.size > ELEMENTS:
            return None
        array = weight.array()
    except Broken:
        return None
    if not _is_portable(array, weight.tensor):
        return None
    # A copy in the machine's byte order: a view would keep the mapped file open.
    return np.array(array, np.dtype(array.dtype.name))


def read_sparse(sparse: onnx.SparseTensorProto) -> Array | None:
    """The dense form of a sparse tensor with at most `runtime.ELEMENTS` elements."""
    if math.prod(sparse.dims) > ELEMENTS or min(sparse.dims, default=0) < 0:
        return None
    if len(sparse.values.dims) != 1:
        return None
    try:
        values = numpy_helper.to_array(sparse.values)  # (N,)
        indices = numpy_helper.to_array(sparse.indices)  # (N,) of the flat tensor, or (N, rank)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            dense[np.unravel_index(indices, dense.shape)] = values
        else:
            dense[tuple(indices.T)] = values
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return dense if _is_portable(values, sparse.values) else None


def read_constant_node(output: NodeOutput) -> Array | None:
    """The value of a Constant node; a function's caller may pass the attribute that holds it."""
    scope, node = output.scope, output.node
    if len(node.attribute) != 1 or node.input:
        return None
    name = node.attribute[0].name
    attribute = scope.attribute(node, name)
    if attribute is None or isinstance(attribute, Absent):
        return None
    # The attribute of a caller may have any name. Its type must be that of the node's attribute.
    if attribute.type != _CONSTANT_TYPES.get(name):
        return None
    if name == "value":
        weight = scope.tensors.get((output.index, name))
        return read_weight(weight or Weight(name=name, path=name, tensor=attribute.t))
    if name == "sparse_value":
        return read_sparse(attribute.sparse_tensor)
    if max(len(attribute.ints), len(attribute.floats)) > ELEMENTS:
        return None
    if name == "value_int":
        return np.asarray(attribute.i, np.int64)
    if name == "value_ints":
        return np.asarray(attribute.ints, np.int64)
    if name == "value_float":
        return np.asarray(attribute.f, np.float32)
    return np.asarray(attribute.floats, np.float32)


def _is_portable(array: Array, tensor: onnx.TensorProto) -> bool:
    """Whether NumPy and every runtime read the same values from the tensor.

    They do so for plain types alone. They differ on booleans that are stored as other bytes than 0
    and 1.
    """
    # `isbuiltin` is 2 for the types of ml_dtypes. It is 0 for NumPy's own types with an explicit
    # byte order, which mapped files have.
    if array.dtype.isbuiltin == 2 or array.dtype.kind not in "biuf":
        return False
    if array.dtype == np.bool_:
        stored = np.ascontiguousarray(array).view(np.uint8)
        return set(tensor.int32_data) <= {0, 1} and bool((stored <= 1).all())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
