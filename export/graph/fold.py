"""Constant propagation: the value of a name where the graph alone decides it.

What is made of fixed initializers and Constant nodes by deterministic operators on small tensors is
computed, with onnx's own reference implementation; through function calls, and through an If whose
condition is decided. Anything else is undecided, and so is whatever costs more than a little: a
verifier must never be made to run a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.scope import Absent, Fixed, Made, Open, Origin, Value, domain_of
from evalmode.export.graph.weight import Array, Weight

_ELEMENTS = 1024  # of any tensor on the way; the largest product of two of them is still small
_STEPS = 1000  # values that one answer may take

_ELEMENTWISE = """
    Not And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Where Add Sub Mul Neg Abs Sign Min
    Max Ceil Floor Round Identity Cast CastLike IsNaN
"""
_RESHAPING = """
    Gather Unsqueeze Squeeze Reshape Flatten Transpose Concat Slice Shape Size ReduceMax ReduceMin
    ReduceSum ReduceProd ConstantOfShape Expand
"""
_FOLDED = frozenset(f"{_ELEMENTWISE} {_RESHAPING} Constant".split())


def decide(value: Value) -> Array | None:
    """The value where the graph alone decides it, else None."""
    pending, steps = [value], 0
    while pending:
        top = pending[-1]
        if _is_known(top):
            pending.pop()
            continue
        steps += 1
        if steps > _STEPS:  # and never again: many nodes may read the same long chain
            for one in pending:
                if not _is_known(one):
                    _remember(one, None)
            return None
        needs = _needs(top)
        if needs is None or any(_is_known(one) and _known(one) is None for one in needs):
            _remember(top, None)
        elif missing := [one for one in needs if not _is_known(one)]:
            pending += missing
        else:
            _remember(top, _computed(top, needs))
    return _known(value)


def decider(value: Value) -> str:
    """Who decides a value that the graph alone does not, for the end of a sentence that begins with
    "it is".
    """
    if isinstance(value, Made):
        made = f"computed by {value.scope.path_of(value.index)} ({value.node.op_type})"
        source = _source(value)
        return (
            f"{made} from {_said(source)}" if source is not None else f"{made} when the model runs"
        )
    return _said(value) if isinstance(value, Open) else "a constant that cannot be read"


def _said(value: Open) -> str:
    if value.origin is Origin.OVERRIDABLE:
        return f"the initializer {value.name!r}, which is an input too: the caller may override it"
    if value.origin is Origin.CALLER:
        return f"the model's input {value.name!r}: the caller decides"
    return f"{value.name!r}, {value.origin.value}"


def _source(value: Made) -> Open | None:
    """The first value on the way to `value` that only the caller knows."""
    pending: list[Value] = [value]
    for _ in range(_STEPS):
        if not pending:
            return None
        top = pending.pop(0)
        if isinstance(top, Open):
            return top
        if isinstance(top, Made):
            pending += [top.scope.argument(top.node, index) for index in range(len(top.node.input))]
    return None


def _is_known(value: Value) -> bool:
    return value.name in value.scope.decided if isinstance(value, Made) else True


def _known(value: Value) -> Array | None:
    if isinstance(value, Made):
        return value.scope.decided.get(value.name)
    return _fixed(value.weight) if isinstance(value, Fixed) else None


def _remember(value: Value, found: Array | None) -> None:
    assert isinstance(value, Made), "everything else is known from the start"
    value.scope.decided[value.name] = found


def _needs(value: Value) -> Sequence[Value] | None:
    """What has to be known before `value` is; None where it cannot be decided."""
    assert isinstance(value, Made), "everything else is known from the start"
    scope, node = value.scope, value.node
    if (inner := scope.calls.get(value.index)) is not None:
        return (
            [inner.read(inner.outputs[position])]
            if (position := _position(value)) < len(inner.outputs)
            else None
        )
    if domain_of(node.domain) != "":
        return None
    inputs = [scope.argument(node, index) for index in range(len(node.input))]
    if node.op_type == "If" and inputs:
        return _of_branch(value, inputs[0])
    if node.op_type in ("Shape", "Size") and isinstance(inputs[0] if inputs else None, Fixed):
        return []  # the shape is declared; the values, however many, are not needed
    if node.op_type not in _FOLDED or len(node.output) != 1:
        return None
    return [one for one in inputs if not isinstance(one, Absent)]


def _position(value: Made) -> int:
    return list(value.node.output).index(value.name)


def _of_branch(value: Made, condition: Value) -> Sequence[Value] | None:
    """The condition first, then what the branch that is taken answers."""
    if not _is_known(condition) or (taken := _known(condition)) is None:
        return [condition]
    if taken.size != 1:
        return None
    branch = value.scope.bodies.get((value.index, "then_branch" if taken.all() else "else_branch"))
    position = _position(value)
    if branch is None or position >= len(branch.outputs):
        return None
    return [condition, branch.read(branch.outputs[position])]


def _computed(value: Value, needs: Sequence[Value]) -> Array | None:
    assert isinstance(value, Made), "everything else is known from the start"
    scope, node = value.scope, value.node
    if value.index in scope.calls or node.op_type == "If":
        return _known(needs[-1])
    if node.op_type == "Constant":
        return _constant(value)
    arrays = [
        _operand(one) for one in (scope.argument(node, index) for index in range(len(node.input)))
    ]
    if node.op_type in ("Shape", "Size") and isinstance(scope.argument(node, 0), Fixed):
        return _shape(value)
    if not _is_cheap(node.op_type, [array for array in arrays if array is not None]):
        return None
    return _run(value, arrays)


def _operand(value: Value) -> Array | None:
    return None if isinstance(value, Absent) else _known(value)


def _fixed(weight: Weight | onnx.SparseTensorProto) -> Array | None:
    try:
        if isinstance(weight, onnx.SparseTensorProto):
            return _dense(weight)
        return weight.array() if weight.size <= _ELEMENTS else None
    except Broken:  # what cannot be read decides nothing
        return None


def _dense(sparse: onnx.SparseTensorProto) -> Array | None:
    if (
        math.prod(sparse.dims) > _ELEMENTS
        or len(sparse.values.dims) != 1
        or min(sparse.dims, default=0) < 0
    ):
        return None
    try:
        values, indices = (
            numpy_helper.to_array(sparse.values),
            numpy_helper.to_array(sparse.indices),
        )
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        places = np.unravel_index(indices, dense.shape) if indices.ndim == 1 else tuple(indices.T)
        dense[places] = values
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return dense


def _constant(value: Made) -> Array | None:
    """The value of a Constant node, whose one attribute may be its function's caller's to give."""
    scope, node = value.scope, value.node
    if len(node.attribute) != 1:
        return None
    name = node.attribute[0].name
    if (weight := scope.tensors.get((value.index, name))) is not None:
        return _fixed(weight)
    given = scope.attribute(node, name)
    if given is None or isinstance(given, Absent):
        return None
    if name == "value":
        return _fixed(Weight(name=name, path=name, tensor=given.t))
    if name == "sparse_value":
        return _dense(given.sparse_tensor)
    if name in ("value_int", "value_ints"):
        return np.asarray(given.i if name == "value_int" else given.ints, np.int64)
    if name in ("value_float", "value_floats"):
        return np.asarray(given.f if name == "value_float" else given.floats, np.float32)
    return None


def _shape(value: Made) -> Array | None:
    fixed = value.scope.argument(value.node, 0)
    assert isinstance(fixed, Fixed), "asked of an initializer only"
    dims = fixed.weight.dims
    if value.node.op_type == "Size":
        return np.asarray(math.prod(dims), np.int64)
    ends = [value.scope.attribute(value.node, name) for name in ("start", "end")]
    if any(end is None for end in ends):
        return None
    start, end = (None if isinstance(item, Absent) or item is None else item.i for item in ends)
    return np.asarray(tuple(dims)[start:end], np.int64)


def _is_cheap(op: str, arrays: Sequence[Array]) -> bool:
    """Whether the result is small, judged before it is made."""
    if any(array.size > _ELEMENTS or not _is_plain(array) for array in arrays):
        return False
    try:
        if op in _ELEMENTWISE.split():
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays))) <= _ELEMENTS
        if op == "ConstantOfShape":
            return _is_small(arrays[0])
        if op == "Expand":
            return (
                _is_small(arrays[1])
                and math.prod(np.broadcast_shapes(arrays[0].shape, tuple(arrays[1]))) <= _ELEMENTS
            )
    except (ValueError, TypeError, IndexError):
        return False
    return True


def _is_small(shape: Array) -> bool:
    sizes: list[int] = shape.reshape(-1).astype(np.int64).tolist()
    return (
        len(sizes) <= 16
        and all(0 <= size <= _ELEMENTS for size in sizes)
        and math.prod(sizes) <= _ELEMENTS
    )


def _is_plain(array: Array) -> bool:
    """Booleans, integers and finite floats that NumPy itself has: on the rest, runtimes may
    disagree.
    """
    return (
        array.dtype.isbuiltin == 1 and array.dtype.kind in "biuf" and bool(np.isfinite(array).all())
    )


def _run(value: Made, arrays: Sequence[Array | None]) -> Array | None:
    node = onnx.NodeProto(op_type=value.node.op_type)
    for item in value.node.attribute:
        given = value.scope.attribute(value.node, item.name)
        if given is None:
            return None
        if not isinstance(given, Absent):
            node.attribute.add().CopyFrom(given)
            node.attribute[-1].name = item.name
    if any(item.name == "broadcast" for item in node.attribute):  # operators of before opset 7
        return None
    feeds = {f"x{index}": array for index, array in enumerate(arrays) if array is not None}
    node.input.extend(
        f"x{index}" if array is not None else "" for index, array in enumerate(arrays)
    )
    node.output.append("y")
    try:
        with np.errstate(all="ignore"):
            (found,) = ReferenceEvaluator(_model(node, feeds, value.scope.opsets.get("", 0))).run(
                None, feeds
            )
    except (
        Exception
    ):  # a node from anywhere may be malformed in any way, and then it decides nothing
        return None
    if (
        not isinstance(found, np.ndarray | np.generic)
        or found.size > _ELEMENTS
        or not _is_plain(np.asarray(found))
    ):
        return None
    return (
        np.asarray(found)
        if _is_the_same_everywhere(node.op_type, feeds.values(), np.asarray(found))
        else None
    )


def _model(node: onnx.NodeProto, feeds: Iterable[str], opset: int) -> onnx.ModelProto:
    inputs = [onnx.ValueInfoProto(name=name) for name in feeds]
    graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name="y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _is_the_same_everywhere(op: str, inputs: Iterable[Array], found: Array) -> bool:
    """A float that does not fit into an integer type becomes something else on every platform."""
    first = next(iter(inputs), found)
    if op not in ("Cast", "CastLike") or first.dtype.kind != "f" or found.dtype.kind not in "iu":
        return True
    return bool(np.array_equal(np.trunc(first).astype(np.float64), found.astype(np.float64)))
