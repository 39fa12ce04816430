"""Find normalisation by the statistics of the batch, from the graph alone.

An exporter writes a BatchNorm without running statistics as the operators that compute the
statistics. The node itself is then in inference mode, but its mean and variance come from the rows
that share the batch. Two forms are found:

- a BatchNormalization whose statistics are computed from its batch (`computed_over_batch`);
- plain arithmetic that subtracts a mean over the rows and divides by a spread (`BatchAxes`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from evalmode.export.graph.fold import constant_of
from evalmode.export.graph.scope import (
    Absent,
    Initializer,
    NodeOutput,
    Origin,
    Unknown,
    Value,
    domain_of,
)
from evalmode.export.graph.walk import NodeAt
from evalmode.export.graph.weight import Weight

# The most values that one decision visits. A larger number would cost time on hostile graphs.
_MAX_VALUES = 1000
# The most steps of scaling and reshaping between a mean or a variance and its use.
_MAX_NEAR_VALUES = 20
_REDUCTIONS = frozenset(
    ["ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "ReduceMax"]
)
_ELEMENTWISE_NAMES = """
    Abs Cast CastLike Clip Dropout Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Log
    Mish Neg PRelu Reciprocal Relu Selu Sigmoid Softplus Sqrt Tanh
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_LAYER_NAMES = """
    AveragePool BatchNormalization Conv ConvTranspose GlobalAveragePool GlobalMaxPool
    GroupNormalization InstanceNormalization LayerNormalization MaxPool RMSNormalization Softmax
"""
# The output of these has the axes of the first input.
_SAME_AXES = _ELEMENTWISE | frozenset(_LAYER_NAMES.split())
_BROADCASTING = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where"])
_SCALING = frozenset(
    ["Cast", "CastLike", "Identity", "Mul", "Div", "Reshape", "Squeeze", "Unsqueeze"]
)


@dataclass(frozen=True)
class _Axis:
    """The axis of a tensor that holds its rows, and how many axes the tensor has."""

    index: int
    rank: int


def computed_over_batch(at: NodeAt, index: int) -> bool | None:
    """Whether input `index` of a BatchNormalization is a statistic of the rows that share a batch.

    None if it depends on the model's inputs in a way that is not understood. The decisions, in
    order:

    1. It is an initializer, or the data input itself: no.
    2. It does not depend on the model's inputs: no.
    3. An Unsqueeze or a Reshape gave the data input a first axis of size 1: no. This is an instance
       normalisation that is written as a batch normalisation.
    4. It is computed by way of a reduction over what may be the first axis: yes.
    5. It is computed by elementwise operators alone: no. Otherwise: None.
    """
    value = at.scope.argument(at.node, index)
    normalised = at.scope.argument(at.node, 0)
    # A value that is its own mean has one axis, that of channels, and no rows.
    if not isinstance(value, NodeOutput) or value is normalised:
        return False

    ancestors = list(_ancestors(value))
    is_complete = len(ancestors) < _MAX_VALUES
    depends_on_inputs = any(
        isinstance(ancestor, Unknown) and ancestor.origin is not Origin.OVERRIDABLE
        for ancestor in ancestors
    )
    if is_complete and not depends_on_inputs:
        return False

    if _has_one_row(normalised):
        return False

    outputs = [ancestor for ancestor in ancestors if isinstance(ancestor, NodeOutput)]
    if any(_reduces(output, None) for output in outputs):
        return True

    if not is_complete:
        return None
    for output in outputs:
        # For a call, the values inside of the function are ancestors too, and are judged.
        if output.index in output.scope.calls:
            continue
        if domain_of(output.node.domain):
            return None
        if output.node.op_type not in _ELEMENTWISE | _BROADCASTING:
            return None
    return False


class BatchAxes:
    """Which axis of each value of a graph holds the rows, as far as known operators show it.

    Rows are on the axis of the model's inputs whose name contains "batch".
    """

    def __init__(self, inputs: Sequence[onnx.ValueInfoProto]) -> None:
        # By the identity of an output, which is kept alive beside its axis.
        self._axes: dict[int, tuple[Value, _Axis | None]] = {}
        self._input_axes: dict[str, _Axis] = {}
        for item in inputs:
            sizes = item.type.tensor_type.shape.dim
            for index, size in enumerate(sizes):
                if "batch" in size.dim_param.lower():
                    self._input_axes.setdefault(item.name, _Axis(index, len(sizes)))

    def are_normalised(self, at: NodeAt) -> bool:
        """Whether a division, or a product, completes a normalisation over the axis of rows.

        It does so if one side is a value minus its mean over that axis, and the other side, such as
        a variance, comes from another reduction over that axis.
        """
        if not self._input_axes or at.domain or at.node.op_type not in ("Div", "Mul"):
            return False
        sides = [at.scope.argument(at.node, index) for index in range(len(at.node.input))]
        centred = [any(map(self._is_centred, _near(side))) for side in sides]
        if len(sides) != 2 or sum(centred) != 1:
            return False
        scale = sides[centred.index(False)]
        return any(self._reduces_rows(value) for value in _ancestors(scale))

    def _is_centred(self, value: Value) -> bool:
        """Whether the value is another one minus its mean over the rows."""
        if not isinstance(value, NodeOutput):
            return False
        if value.node.op_type != "Sub" or value.node.domain:
            return False
        minuend = value.scope.argument(value.node, 0)
        mean = value.scope.argument(value.node, 1)
        if self._axis_of(minuend) is None:
            return False
        return any(self._reduces_rows(near) for near in _near(mean))

    def _reduces_rows(self, value: Value) -> bool:
        if not isinstance(value, NodeOutput):
            return False
        if value.node.op_type not in _REDUCTIONS or not value.node.input:
            return False
        axis = self._axis_of(value.scope.argument(value.node, 0))
        return axis is not None and _reduces(value, axis)

    def _axis_of(self, value: Value) -> _Axis | None:
        """The axis of rows of a value; None if it has none or it is not known."""
        pending = [value]
        while pending and len(pending) < _MAX_VALUES:
            current = pending[-1]
            if not isinstance(current, NodeOutput) or id(current) in self._axes:
                pending.pop()
                continue
            missing = [
                source
                for source in _sources(current)
                if isinstance(source, NodeOutput) and id(source) not in self._axes
            ]
            if missing:
                pending += missing
            else:
                self._axes[id(current)] = (current, self._axis_of_output(current))
        return self._stored_axis(value)

    def _stored_axis(self, value: Value) -> _Axis | None:
        if isinstance(value, Unknown) and value.origin is Origin.CALLER:
            return self._input_axes.get(value.name)
        return self._axes[id(value)][1] if id(value) in self._axes else None

    def _axis_of_output(self, output: NodeOutput) -> _Axis | None:
        """The axis of rows of an output, from those of the node's inputs."""
        node, scope = output.node, output.scope
        if output.index in scope.calls:
            sources = _sources(output)
            return self._stored_axis(sources[-1]) if sources else None
        if domain_of(node.domain) or not node.input:
            return None
        if node.op_type in _BROADCASTING:
            return self._axis_of_broadcast(output)

        axis = self._stored_axis(scope.argument(node, 0))
        if axis is None:
            return None
        if node.op_type in _SAME_AXES:
            return axis
        if node.op_type == "MatMul":
            # The last axis of the first factor is summed over.
            return axis if axis.index < axis.rank - 1 else None
        if node.op_type == "Gemm":
            transposed = scope.attribute(node, "transA")
            is_plain = isinstance(transposed, Absent) or not getattr(transposed, "i", 1)
            return axis if is_plain else None
        if node.op_type == "Transpose":
            order = scope.attribute(node, "perm")
            if isinstance(order, onnx.AttributeProto) and axis.index in order.ints:
                return _Axis(list(order.ints).index(axis.index), axis.rank)
        return None

    def _axis_of_broadcast(self, output: NodeOutput) -> _Axis | None:
        """The axis of rows after broadcasting, which aligns the last axes of all inputs."""
        node, scope = output.node, output.scope
        arguments = [scope.argument(node, index) for index in range(len(node.input))]
        axes: list[_Axis] = []
        ranks: list[int] = []
        for argument in arguments:
            axis = self._stored_axis(argument)
            if axis is not None:
                axes.append(axis)
                ranks.append(axis.rank)
            elif isinstance(argument, Initializer) and isinstance(argument.weight, Weight):
                ranks.append(len(argument.weight.dims))
        if not axes:
            return None
        if len(ranks) < len(arguments):
            # The rank of some input is not known. Most often the input is a scalar computed in the
            # graph, or a mean of the same rank, and the axis stays the same. Not so for a Where.
            return axes[0] if node.op_type != "Where" else None
        rank = max(ranks)
        from_the_end = {axis.rank - axis.index for axis in axes}
        return _Axis(rank - from_the_end.pop(), rank) if len(from_the_end) == 1 else None


def _sources(output: NodeOutput) -> list[Value]:
    """The values that an output is computed from: the node's inputs and, if the node calls a
    function, last the output inside of the function.
    """
    node, scope = output.node, output.scope
    sources = [scope.argument(node, index) for index in range(len(node.input))]
    function_scope = scope.calls.get(output.index)
    if function_scope is not None:
        position = list(node.output).index(output.name)
        if position < len(function_scope.outputs):
            sources.append(function_scope.read(function_scope.outputs[position]))
    return sources


def _ancestors(value: Value) -> Iterator[Value]:
    """The value and all values that it is computed from, each once, the nearest first."""
    visited: set[int] = set()
    pending = deque([value])
    while pending and len(visited) < _MAX_VALUES:
        current = pending.popleft()
        if id(current) not in visited:
            visited.add(id(current))
            yield current
            if isinstance(current, NodeOutput):
                pending += _sources(current)


def _near(value: Value) -> Iterator[Value]:
    """The value and those that it is computed from by scaling or reshaping alone."""
    pending = deque([value])
    for _ in range(_MAX_NEAR_VALUES):
        if not pending:
            return
        current = pending.popleft()
        yield current
        if isinstance(current, NodeOutput) and current.node.op_type in _SCALING:
            pending.append(current.scope.argument(current.node, 0))
            if current.node.op_type == "Mul":
                pending.append(current.scope.argument(current.node, 1))


def _reduces(output: NodeOutput, axis: _Axis | None) -> bool:
    """Whether a node reduces this axis. Without an axis: whether it may reduce the first one."""
    node, scope = output.node, output.scope
    if domain_of(node.domain) or node.op_type not in _REDUCTIONS:
        return False
    # The axes are an attribute in old opsets (before 13 or 18) and an input in newer ones.
    axes: list[int] = []
    attribute = scope.attribute(node, "axes")
    argument = scope.argument(node, 1)
    if isinstance(attribute, onnx.AttributeProto):
        axes = list(attribute.ints)
    elif not isinstance(argument, Absent):
        array = constant_of(argument)
        if array is None:
            return axis is None
        axes = [int(number) for number in array.reshape(-1)]
    if not axes:  # all axes, unless an attribute of the node says otherwise
        noop = scope.attribute(node, "noop_with_empty_axes")
        return isinstance(noop, Absent) or not getattr(noop, "i", 0)
    if axis is None:
        # A negative number may be the first axis: the rank is not known.
        return 0 in axes or min(axes) < 0
    return axis.index in [number % max(axis.rank, 1) for number in axes]


def _has_one_row(value: Value) -> bool:
    """Whether an Unsqueeze or a Reshape gave the value a first axis of size 1."""
    if not isinstance(value, NodeOutput) or domain_of(value.node.domain):
        return False
    shape = value.scope.argument(value.node, 1)
    if value.node.op_type == "Unsqueeze":
        attribute = value.scope.attribute(value.node, "axes")
        if isinstance(attribute, onnx.AttributeProto):
            return 0 in helper.get_attribute_value(attribute)
        axes = constant_of(shape)
        return axes is not None and 0 in axes
    if value.node.op_type != "Reshape":
        return False
    sizes = constant_of(shape)
    if sizes is None and isinstance(shape, NodeOutput) and shape.node.op_type == "Concat":
        # A shape of which only the first part is constant.
        sizes = constant_of(shape.scope.argument(shape.node, 0))
    return sizes is not None and sizes.size > 0 and int(sizes.reshape(-1)[0]) == 1
