"""Constant propagation: the value of a name where the graph alone decides it.

How a value is decided:

1. An initializer that no caller can override, and a Constant node, are read (`stored_values`).
2. A function call has the value of the output inside the function. An If has the value of its
   branch, if the condition is decided.
3. Identity, and Not, And, Or, Xor and Where of booleans, are computed here.
4. Some other operators on few integers and booleans are left to ONNX Runtime itself (`runtime`).
   Such a value is first marked COMPUTABLE. The runtime runs once, for the requested value, and not
   for each value that it depends on.
5. Everything else is undecided (None): floating-point arithmetic, on which execution providers
   differ, and all computations that are not small. A file must not be able to make its verifier run
   a whole model.
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
from evalmode.export.graph.scope import (
    Absent,
    Budget,
    Initializer,
    NodeOutput,
    Origin,
    Unknown,
    Value,
    domain_of,
)
from evalmode.export.graph.stored_values import read_constant_node, read_sparse, read_weight
from evalmode.export.graph.weight import Array, Weight

_MAX_STEPS = 1000  # values that one decision may visit
_MAX_INPUTS = 1000  # of one node
_MAX_RUNTIME_BYTES = 4 << 20  # of one model that the runtime is asked to run

# All runtimes compute the same booleans with these.
_PLAIN_OPERATORS = frozenset({"Identity", "Not", "And", "Or", "Xor", "Where"})
_RUNTIME_OPERATORS = frozenset(
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
# These read only the declared shape of an initializer, so they work for any number of elements.
_SHAPE_OPERATORS = ("Shape", "Size")
# A function of such a domain may have the name of an operator of ONNX Runtime, which then runs
# instead of the function.
_RUNTIME_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")


class Computable(Enum):
    """The mark of a value that ONNX Runtime can compute from the nodes before it."""

    COMPUTABLE = "to be computed by the runtime"


COMPUTABLE = Computable.COMPUTABLE

# What is decided about a value: its array, the mark, or None if the graph does not decide it.
Decision = Array | Computable | None


def constant_of(value: Value) -> Array | None:
    """The value if the graph alone decides it, else None."""
    if isinstance(value, NodeOutput):
        _decide(value)
    return _array_of(value)


def describe_source(value: Value) -> str:
    """What decides a value that is not constant. The text ends a sentence that begins "it is"."""
    if isinstance(value, Unknown):
        return _describe_unknown(value)
    if not isinstance(value, NodeOutput):
        return "a constant that cannot be read"
    text = f"computed by {value.scope.path_of(value.index)} ({value.node.op_type})"

    # Search backwards for the first value that is known only when the model runs.
    budget = value.scope.budget
    pending: deque[Value] = deque([value])
    visited: set[tuple[int, str]] = set()
    while pending and len(visited) < _MAX_STEPS and budget.steps > 0:
        source = pending.popleft()
        if isinstance(source, Unknown):
            return f"{text} from {_describe_unknown(source)}"
        if isinstance(source, NodeOutput) and _key(source) not in visited:
            visited.add(_key(source))
            input_count = min(len(source.node.input), _MAX_INPUTS)
            budget.steps -= input_count + 1
            for index in range(input_count):
                pending.append(source.scope.argument(source.node, index))
    return f"{text} when the model runs"


def _describe_unknown(value: Unknown) -> str:
    if value.origin is Origin.OVERRIDABLE:
        return f"the initializer {value.name!r}, which is an input too: the caller may override it"
    if value.origin is Origin.CALLER:
        return f"the model's input {value.name!r}: the caller decides"
    return f"{value.name!r}, {value.origin.value}"


def _decide(output: NodeOutput) -> None:
    """Decide an output, and first all values that it depends on, without recursion."""
    pending = [output]
    steps = 0
    while pending:
        current = pending[-1]
        if _is_decided(current):
            pending.pop()
            continue
        steps += 1
        if steps > _MAX_STEPS:
            # None is stored for the whole chain: many nodes may read it, and each would walk it.
            for waiting in pending:
                if not _is_decided(waiting):
                    _store(waiting, None)
            return
        dependencies = _dependencies(current)
        if dependencies is None:
            _store(current, None)
            continue
        if any(_is_decided(value) and _decision(value) is None for value in dependencies):
            _store(current, None)
            continue
        missing = [
            value
            for value in dependencies
            if isinstance(value, NodeOutput) and not _is_decided(value)
        ]
        if missing:
            pending += missing
        else:
            _store(current, _evaluate(current, dependencies))


def _key(output: NodeOutput) -> tuple[int, str]:
    """The identity of an output: a scope defines each name once."""
    return id(output.scope), output.name


def _is_decided(value: Value) -> bool:
    return not isinstance(value, NodeOutput) or value.name in value.scope.constants


def _decision(value: Value) -> Decision:
    """The decision about a value. An initializer is read at the first call."""
    if isinstance(value, NodeOutput):
        return value.scope.constants.get(value.name)
    if not isinstance(value, Initializer):
        return None
    arrays, key = value.budget.arrays, id(value.weight)
    if key not in arrays:
        if isinstance(value.weight, Weight):
            array = read_weight(value.weight)
        else:
            array = read_sparse(value.weight)
        arrays[key] = _charge(array, value.budget)
    decision: Array | None = arrays[key]
    return decision


def _store(output: NodeOutput, decision: Decision) -> None:
    if not isinstance(decision, Computable):
        decision = _charge(decision, output.scope.budget)
    output.scope.constants[output.name] = decision


def _charge(array: Array | None, budget: Budget) -> Array | None:
    """The array, or None if it exceeds what is left of the model's memory budget."""
    if array is None or array.nbytes > budget.bytes:
        return None
    budget.bytes -= array.nbytes
    return array


def _array_of(value: Value) -> Array | None:
    """The array of a decided value; the runtime computes one that is only marked."""
    decision = _decision(value)
    if not isinstance(decision, Computable):
        return decision
    assert isinstance(value, NodeOutput), "only outputs of nodes are computable"
    array = None
    if value.scope.budget.runtime_calls:
        value.scope.budget.runtime_calls -= 1
        array = _compute(value)
    _store(value, array)
    return array


def _dependencies(output: NodeOutput) -> Sequence[Value] | None:
    """The values that must be decided before `output`; None if it cannot be decided.

    For a call and for an If, the last one is the value that the output equals.
    """
    scope, node = output.scope, output.node
    domain = domain_of(node.domain)

    # 1. A call depends on the output inside the function.
    function_scope = scope.calls.get(output.index)
    if function_scope is not None:
        # ONNX Runtime takes each node of type Constant for the standard operator, and runs an
        # operator of its own rather than a function of that name.
        if not domain or domain.startswith(_RUNTIME_DOMAINS) or node.op_type == "Constant":
            return None
        position = _output_position(output)
        if node.overload or position >= len(function_scope.outputs):
            return None
        return [function_scope.read(function_scope.outputs[position])]

    if domain != "" or scope.opsets.get("", 0) == 0 or len(node.input) > _MAX_INPUTS:
        return None
    inputs = [scope.argument(node, index) for index in range(len(node.input))]

    # 2. An If depends on its condition alone until that is decided, then on its branch, too.
    if node.op_type == "If" and inputs:
        condition = inputs[0]
        if not _is_decided(condition):
            return [condition]
        choice = _array_of(condition)
        if choice is None or choice.size != 1 or choice.dtype != np.bool_:
            return None
        branch_name = "then_branch" if choice.all() else "else_branch"
        branch = scope.bodies.get((output.index, branch_name))
        position = _output_position(output)
        if branch is None or position >= len(branch.outputs):
            return None
        return [condition, branch.read(branch.outputs[position])]

    # 3. An operator depends on its inputs.
    if node.op_type in _SHAPE_OPERATORS and inputs and isinstance(inputs[0], Initializer):
        return []
    if node.op_type not in {*_PLAIN_OPERATORS, *_RUNTIME_OPERATORS, "Constant"}:
        return None
    # `broadcast` is an attribute of operators before opset 7, with rules of broadcasting that
    # differ from today's.
    if len(node.output) != 1 or any(item.name == "broadcast" for item in node.attribute):
        return None
    return [operand for operand in inputs if not isinstance(operand, Absent)]


def _output_position(output: NodeOutput) -> int:
    return list(output.node.output).index(output.name)


def _evaluate(output: NodeOutput, dependencies: Sequence[Value]) -> Decision:
    """Decide an output whose dependencies are decided, none of them as None."""
    scope, node = output.scope, output.node
    if _passes_on(output):
        return _decision(dependencies[-1])
    if node.op_type == "Constant":
        return read_constant_node(output)
    if node.op_type in _SHAPE_OPERATORS and isinstance(scope.argument(node, 0), Initializer):
        return COMPUTABLE
    operands = [_decision(value) for value in dependencies]
    arrays = [operand for operand in operands if isinstance(operand, np.ndarray | np.generic)]
    if any(array.size > runtime.ELEMENTS for array in arrays):
        return None
    if node.op_type == "Identity":
        return operands[0] if len(operands) == 1 else None
    if any(array.dtype.kind not in "biu" for array in arrays):
        return None  # floating-point arithmetic
    if node.op_type in _RUNTIME_OPERATORS:
        return COMPUTABLE
    # ONNX Runtime has no Where of booleans. So what it has to compute for a boolean operator is
    # computed now, and the operator itself is computed here.
    computed = [_array_of(value) for value in dependencies]
    arrays = [array for array in computed if array is not None]
    if len(arrays) < len(dependencies):
        return None
    if any(array.dtype != np.bool_ for array in arrays):
        # A Where of integers is left to the runtime.
        return COMPUTABLE if node.op_type == "Where" else None
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        if math.prod(shape) > runtime.ELEMENTS:
            return None
        match node.op_type, arrays:
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
    except ValueError:  # the shapes cannot be broadcast together
        return None


def _passes_on(output: NodeOutput) -> bool:
    """Whether the output is another value unchanged: that of a function, or of a branch."""
    return output.index in output.scope.calls or output.node.op_type == "If"


def _compute(output: NodeOutput) -> Array | None:
    """Let ONNX Runtime compute an output, in a new model of the nodes that it depends on.

    The initializers of the new model (the leaves) are the arrays that are decided already.
    """
    nodes: list[onnx.NodeProto] = []
    leaves: list[onnx.TensorProto] = []
    names: dict[tuple[int, str], str] = {}  # of outputs in the new model
    leaf_names: dict[tuple[int, bool], str] = {}  # by identity, and whether only the shape counts
    opsets = set()
    size = 0  # bytes
    pending = [output]
    while pending:
        current = pending[-1]
        if _key(current) in names:
            pending.pop()
            continue

        # The operands come first.
        scope, node = current.scope, current.node
        operands: Sequence[Value] | None
        if _passes_on(current):
            operands = _dependencies(current)
        else:
            operands = [scope.argument(node, index) for index in range(len(node.input))]
        if operands is None:
            return None
        missing: list[NodeOutput] = []
        for operand in operands:
            if not isinstance(operand, NodeOutput) or _key(operand) in names:
                continue
            if _decision(operand) is COMPUTABLE:
                missing.append(operand)
        if missing:
            pending += missing
            continue
        pending.pop()
        if _passes_on(current):
            last = operands[-1]
            assert isinstance(last, NodeOutput), "a value that is passed on is computable"
            names[_key(current)] = names[_key(last)]
            continue

        # A copy of the node, with the attributes that a function's caller passes.
        opsets.add(scope.opsets.get("", 0))
        copy = onnx.NodeProto(op_type=node.op_type, output=[f"v{len(names)}"])
        for item in node.attribute:
            attribute = scope.attribute(node, item.name)
            if attribute is None:
                return None
            if not isinstance(attribute, Absent):
                copy.attribute.add().CopyFrom(attribute)
                copy.attribute[-1].name = item.name

        # Its inputs: nothing, an output of the new model, or a leaf.
        reads_shape = node.op_type in _SHAPE_OPERATORS
        for operand in operands:
            if isinstance(operand, Absent):
                copy.input.append("")
                continue
            if isinstance(operand, NodeOutput) and _key(operand) in names:
                copy.input.append(names[_key(operand)])
                continue
            identity = id(operand.weight) if isinstance(operand, Initializer) else id(operand)
            leaf = identity, reads_shape
            if leaf not in leaf_names:
                array = _leaf(operand, reads_shape=reads_shape, max_bytes=_MAX_RUNTIME_BYTES - size)
                if array is None:
                    return None
                size += array.nbytes
                leaf_names[leaf] = f"c{len(leaves)}"
                leaves.append(numpy_helper.from_array(array, leaf_names[leaf]))
            copy.input.append(leaf_names[leaf])

        size += copy.ByteSize()
        names[_key(current)] = copy.output[0]
        nodes.append(copy)
        if size > _MAX_RUNTIME_BYTES or len(nodes) > _MAX_STEPS:
            return None

    # Functions may import other opsets than the model, and one model cannot mix them.
    if len(opsets) != 1:
        return None
    # All outputs are returned, so that the child sees each intermediate array. The requested output
    # comes last.
    target = names[_key(output)]
    output_names = [node.output[0] for node in nodes]
    output_names.sort(key=lambda name: name == target)
    outputs = [onnx.ValueInfoProto(name=name) for name in output_names]
    graph = helper.make_graph(nodes, "constants", [], outputs, leaves)
    opset = helper.make_opsetid("", opsets.pop())
    return runtime.compute(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def _leaf(operand: Value, *, reads_shape: bool, max_bytes: int) -> Array | None:
    """The array of a decided operand; zeros of the same shape for an initializer whose shape alone
    is read.
    """
    if reads_shape and isinstance(operand, Initializer):
        dims = tuple(operand.weight.dims)
        if min(dims, default=0) < 0 or math.prod(dims) > max_bytes:
            return None
        return np.zeros(dims, np.bool_)
    array = _decision(operand)
    if not isinstance(array, np.ndarray | np.generic) or array.nbytes > max_bytes:
        return None
    return array
