"""Constant propagation: the value of a name where the graph alone decides it.

Plain values are read: initializers that nobody can change, Constant nodes, and what Identity, Not,
And, Or, Xor and Where make of booleans; through function calls, and through an If whose condition
is decided. Other operators on small integers and booleans are run by ONNX Runtime itself
(`runtime`). Anything else is undecided: floating-point arithmetic, on which execution providers
differ, and whatever costs more than a little, for a verifier must never be made to run a model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from enum import Enum

import numpy as np
import onnx
from onnx import helper, numpy_helper

from evalmode.export.graph import runtime
from evalmode.export.graph.errors import Broken
from evalmode.export.graph.scope import (
    Absent,
    Budget,
    Fixed,
    Made,
    Open,
    Origin,
    Value,
    domain_of,
)
from evalmode.export.graph.weight import Array, Weight

_ELEMENTS = runtime.ELEMENTS
_STEPS = 1000  # values that one answer may take
_INPUTS = 1000  # of one node
_QUESTION_BYTES = 4 << 20  # of what the runtime is asked at once

# Boolean operators, whose result no implementation can see otherwise.
_PLAIN = frozenset({"Identity", "Not", "And", "Or", "Xor", "Where"})
_RUN = frozenset(  # names, as onnx spells them
    [
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Add",
        "Sub",
        "Mul",
        "Neg",
        "Abs",
        "Sign",
        "Min",
        "Max",
        "Cast",
        "CastLike",
        "Gather",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Flatten",
        "Transpose",
        "Concat",
        "Slice",
        "Shape",
        "Size",
        "ReduceMax",
        "ReduceMin",
        "ReduceSum",
        "ReduceProd",
        "ConstantOfShape",
        "Expand",
    ]
)
# A function of such a domain may be named like an operator of the runtime, which then runs instead.
_RUNTIMES_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")


class Unsettled(Enum):
    """A value that ONNX Runtime can compute: it stands for the nodes that make it."""

    UNSETTLED = "to be computed by the runtime"


UNSETTLED = Unsettled.UNSETTLED


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
            for unknown in pending:
                if not _is_known(unknown):
                    _remember(unknown, None)
            return None
        needs = _needs(top)
        if needs is None or any(_is_known(need) and _known(need) is None for need in needs):
            _remember(top, None)
        elif missing := [need for need in needs if not _is_known(need)]:
            pending += missing
        else:
            _remember(top, _made(top, needs))
    return _settled(value)


def decider(value: Value) -> str:
    """What decides a value that the graph alone does not, for the end of a sentence that begins
    with "it is".
    """
    if isinstance(value, Made):
        made = f"computed by {value.scope.path_of(value.index)} ({value.node.op_type})"
        source = _source(value)
        if source is not None:
            return f"{made} from {_described(source)}"
        return f"{made} when the model runs"
    return _described(value) if isinstance(value, Open) else "a constant that cannot be read"


def _described(value: Open) -> str:
    if value.origin is Origin.OVERRIDABLE:
        return f"the initializer {value.name!r}, which is an input too: the caller may override it"
    if value.origin is Origin.CALLER:
        return f"the model's input {value.name!r}: the caller decides"
    return f"{value.name!r}, {value.origin.value}"


def _source(value: Made) -> Open | None:
    """The first value on the way to `value` that is known only when the model runs."""
    budget = value.scope.budget
    pending: deque[Value] = deque([value])
    seen: set[tuple[int, str]] = set()
    while pending and len(seen) < _STEPS and budget.steps > 0:
        top = pending.popleft()
        if isinstance(top, Open):
            return top
        if isinstance(top, Made) and (id(top.scope), top.name) not in seen:
            seen.add((id(top.scope), top.name))
            inputs = min(len(top.node.input), _INPUTS)
            budget.steps -= inputs + 1
            pending += [top.scope.argument(top.node, index) for index in range(inputs)]
    return None


def _is_known(value: Value) -> bool:
    return value.name in value.scope.decided if isinstance(value, Made) else True


def _known(value: Value) -> Array | Unsettled | None:
    if isinstance(value, Made):
        return value.scope.decided.get(value.name)
    return _read(value) if isinstance(value, Fixed) else None


def _read(value: Fixed) -> Array | None:
    """The values of an initializer, which is read once."""
    budget, key = value.budget, id(value.weight)
    if key not in budget.read:
        budget.read[key] = _charged(_fixed(value.weight), budget)
    result: Array | None = budget.read[key]
    return result


def _remember(value: Value, result: Array | Unsettled | None) -> None:
    assert isinstance(value, Made), "everything else is known from the start"
    if isinstance(result, np.ndarray | np.generic):
        result = _charged(result, value.scope.budget)
    value.scope.decided[value.name] = result


def _charged(array: Array | None, budget: Budget) -> Array | None:
    """The array, or None where the model has no memory left to hold it."""
    if array is None or array.nbytes > budget.bytes:
        return None
    budget.bytes -= array.nbytes
    return array


def _settled(value: Value) -> Array | None:
    """The known value, which the runtime computes if it is not settled yet."""
    known = _known(value)
    if known is not UNSETTLED:
        return known
    assert isinstance(value, Made), "everything else is settled"
    result = None
    if value.scope.budget.values:
        value.scope.budget.values -= 1
        result = _run(value)
    _remember(value, result)
    return result


def _needs(value: Value) -> Sequence[Value] | None:
    """What has to be known before `value` is; None where it cannot be decided."""
    assert isinstance(value, Made), "everything else is known from the start"
    scope, node = value.scope, value.node
    domain = domain_of(node.domain)
    if (inner := scope.calls.get(value.index)) is not None:
        # ONNX Runtime takes every node of type Constant for the standard one, and an operator of
        # its own before a function of that name.
        if not domain or domain.startswith(_RUNTIMES_DOMAINS) or node.op_type == "Constant":
            return None
        position = _position(value)
        if node.overload or position >= len(inner.outputs):
            return None
        return [inner.read(inner.outputs[position])]
    if domain != "" or scope.opsets.get("", 0) == 0 or len(node.input) > _INPUTS:
        return None
    inputs = [scope.argument(node, index) for index in range(len(node.input))]
    if node.op_type == "If" and inputs:
        return _of_branch(value, inputs[0])
    if node.op_type in ("Shape", "Size") and isinstance(inputs[0] if inputs else None, Fixed):
        return []  # the shape is declared; the values, however many, are not needed
    if node.op_type not in {*_PLAIN, *_RUN, "Constant"} or len(node.output) != 1:
        return None
    if any(item.name == "broadcast" for item in node.attribute):  # operators of before opset 7
        return None
    return [operand for operand in inputs if not isinstance(operand, Absent)]


def _position(value: Made) -> int:
    return list(value.node.output).index(value.name)


def _of_branch(value: Made, condition: Value) -> Sequence[Value] | None:
    """The condition first, then what the branch that is taken answers."""
    if not _is_known(condition):
        return [condition]
    taken = _settled(condition)
    if taken is None or taken.size != 1 or taken.dtype != np.bool_:
        return None
    branch = value.scope.bodies.get((value.index, "then_branch" if taken.all() else "else_branch"))
    position = _position(value)
    if branch is None or position >= len(branch.outputs):
        return None
    return [condition, branch.read(branch.outputs[position])]


def _made(value: Value, needs: Sequence[Value]) -> Array | Unsettled | None:
    """What a node makes of known operands: a plain value, or one for the runtime to compute."""
    assert isinstance(value, Made), "everything else is known from the start"
    scope, node = value.scope, value.node
    if value.index in scope.calls or node.op_type == "If":
        return _known(needs[-1])
    if node.op_type == "Constant":
        return _constant(value)
    if node.op_type in ("Shape", "Size") and isinstance(scope.argument(node, 0), Fixed):
        return UNSETTLED
    operands = [_known(need) for need in needs]
    arrays = [operand for operand in operands if isinstance(operand, np.ndarray | np.generic)]
    if any(array.size > _ELEMENTS for array in arrays):
        return None
    if node.op_type == "Identity":
        return operands[0] if len(operands) == 1 else None
    if any(array.dtype.kind not in "biu" for array in arrays):
        return None  # floating-point arithmetic, on which execution providers differ
    if node.op_type in _RUN:
        return UNSETTLED
    # ONNX Runtime has no Where of booleans, so what it computes is settled first.
    settled = [_settled(need) for need in needs]
    arrays = [array for array in settled if array is not None]
    return _of_booleans(node.op_type, arrays) if len(arrays) == len(needs) else None


def _of_booleans(op: str, arrays: Sequence[Array]) -> Array | Unsettled | None:
    if any(array.dtype != np.bool_ for array in arrays):
        return UNSETTLED if op == "Where" else None
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        if math.prod(shape) > _ELEMENTS:
            return None
        match op, arrays:
            case "Not", [a]:
                return np.logical_not(a)
            case "And", [a, b]:
                return np.logical_and(a, b)
            case "Or", [a, b]:
                return np.logical_or(a, b)
            case "Xor", [a, b]:
                return np.logical_xor(a, b)
            case "Where", [condition, a, b]:
                return np.where(condition, a, b)
        return None
    except ValueError:  # shapes that do not go together
        return None


def _fixed(weight: Weight | onnx.SparseTensorProto) -> Array | None:
    try:
        if isinstance(weight, onnx.SparseTensorProto):
            return _dense(weight)
        if weight.size > _ELEMENTS:
            return None
        array = weight.array()
    except Broken:  # what cannot be read decides nothing
        return None
    if not _reads_alike(array, weight.tensor):
        return None
    # A copy, in the machine's byte order: a mapped file would stay open with it.
    return np.array(array, np.dtype(array.dtype.name))


def _reads_alike(array: Array, tensor: onnx.TensorProto) -> bool:
    """Whether NumPy and every runtime read these values from the tensor.

    They do from plain types alone, and differ on booleans that are written as neither 0 nor 1.
    """
    # 2 is a type of ml_dtypes; 0 is one of NumPy's own with its byte order spelled out, as of what
    # is mapped from a file.
    if array.dtype.isbuiltin == 2 or array.dtype.kind not in "biuf":
        return False
    if array.dtype == np.bool_:
        in_bytes = np.ascontiguousarray(array).view(np.uint8)
        return set(tensor.int32_data) <= {0, 1} and bool((in_bytes <= 1).all())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


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
    return dense if _reads_alike(values, sparse.values) else None


def _constant(value: Made) -> Array | None:
    """The value of a Constant node, whose one attribute may be its function's caller's to give."""
    scope, node = value.scope, value.node
    if len(node.attribute) != 1 or node.input:
        return None
    name = node.attribute[0].name
    attribute = scope.attribute(node, name)
    if attribute is None or isinstance(attribute, Absent):
        return None
    # The caller's attribute has a name of its own; its type says which of the five it can be.
    if attribute.type != _CONSTANT_TYPES.get(name):
        return None
    if name == "value":
        weight = scope.tensors.get((value.index, name))
        return _fixed(weight or Weight(name=name, path=name, tensor=attribute.t))
    if name == "sparse_value":
        return _dense(attribute.sparse_tensor)
    if max(len(attribute.ints), len(attribute.floats)) > _ELEMENTS:
        return None
    if name in ("value_int", "value_ints"):
        return np.asarray(attribute.i if name == "value_int" else attribute.ints, np.int64)
    return np.asarray(attribute.f if name == "value_float" else attribute.floats, np.float32)


_CONSTANT_TYPES = {
    "value": onnx.AttributeProto.TENSOR,
    "sparse_value": onnx.AttributeProto.SPARSE_TENSOR,
    "value_int": onnx.AttributeProto.INT,
    "value_ints": onnx.AttributeProto.INTS,
    "value_float": onnx.AttributeProto.FLOAT,
    "value_floats": onnx.AttributeProto.FLOATS,
}


def _run(value: Made) -> Array | None:
    """The value as ONNX Runtime computes it from the plain values that it is made of."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    names: dict[tuple[int, str], str] = {}
    leaves: dict[tuple[int, bool], str] = {}  # of initializers, and of the shapes of some
    size = 0  # bytes
    opsets = set()
    pending: list[Value] = [value]
    while pending:
        top = pending[-1]
        assert isinstance(top, Made), "only what nodes make is unsettled"
        key = (id(top.scope), top.name)
        if key in names:
            pending.pop()
            continue
        operands = _operands(top)
        if operands is None:
            return None
        unsettled = [
            operand
            for operand in operands
            if isinstance(operand, Made)
            and _known(operand) is UNSETTLED
            and (id(operand.scope), operand.name) not in names
        ]
        if unsettled:
            pending += unsettled
            continue
        pending.pop()
        if top.index in top.scope.calls or top.node.op_type == "If":  # passes its last operand on
            last = operands[-1]
            assert isinstance(last, Made), "what is passed on is unsettled"
            names[key] = names[id(last.scope), last.name]
            continue
        opsets.add(top.scope.opsets.get("", 0))
        node = onnx.NodeProto(op_type=top.node.op_type, output=[f"v{len(names)}"])
        for item in top.node.attribute:
            attribute = top.scope.attribute(top.node, item.name)
            if attribute is None:
                return None
            if not isinstance(attribute, Absent):
                node.attribute.add().CopyFrom(attribute)
                node.attribute[-1].name = item.name
        for operand in operands:
            if isinstance(operand, Absent):
                node.input.append("")
            elif isinstance(operand, Made) and (id(operand.scope), operand.name) in names:
                node.input.append(names[id(operand.scope), operand.name])
            else:
                initializer = id(operand.weight) if isinstance(operand, Fixed) else id(operand)
                leaf = initializer, top.node.op_type in ("Shape", "Size")
                if leaf not in leaves:
                    array = _leaf(top, operand, _QUESTION_BYTES - size)
                    if array is None:
                        return None
                    size += array.nbytes
                    leaves[leaf] = f"c{len(constants)}"
                    constants.append(numpy_helper.from_array(array, leaves[leaf]))
                node.input.append(leaves[leaf])
        size += node.ByteSize()
        names[key] = node.output[0]
        nodes.append(node)
        if size > _QUESTION_BYTES or len(nodes) > _STEPS:
            return None
    if len(opsets) != 1:  # of functions that import another opset
        return None
    outputs = [onnx.ValueInfoProto(name=node.output[0]) for node in nodes]
    outputs.sort(key=lambda output: output.name == names[id(value.scope), value.name])
    graph = helper.make_graph(nodes, "constants", [], outputs, constants)
    opset = helper.make_opsetid("", opsets.pop())
    return runtime.computed(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def _operands(value: Made) -> Sequence[Value] | None:
    """What a node reads, in order; what a call or an If passes on."""
    if value.index in value.scope.calls or value.node.op_type == "If":
        return _needs(value)
    node = value.node
    return [value.scope.argument(node, index) for index in range(len(node.input))]


def _leaf(value: Made, operand: Value, most_bytes: int) -> Array | None:
    """A plain operand; of an initializer whose shape alone is asked for, one of that shape."""
    if value.node.op_type in ("Shape", "Size") and isinstance(operand, Fixed):
        dims = tuple(operand.weight.dims)
        if min(dims, default=0) < 0 or math.prod(dims) > most_bytes:
            return None
        return np.zeros(dims, np.bool_)
    known = _known(operand)
    if not isinstance(known, np.ndarray | np.generic) or known.nbytes > most_bytes:
        return None
    return known
