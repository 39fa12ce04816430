"""Normalisation by the statistics of the batch, seen in the graph alone.

An exporter writes a BatchNorm without running statistics as the operators that compute them: the
node itself is in inference mode, and its mean and variance come from the rows that share the batch.
Knows no rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from evalmode.export.graph.fold import decide
from evalmode.export.graph.scope import Absent, Fixed, Made, Open, Origin, Value, domain_of
from evalmode.export.graph.walk import NodeAt
from evalmode.export.graph.weight import Weight

_MOST = 1000  # values that are looked at behind one node
_MEANS = frozenset(
    ["ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "ReduceMax"]
)
_NAMES = """
    Abs Cast CastLike Clip Dropout Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Log
    Mish Neg PRelu Reciprocal Relu Selu Sigmoid Softplus Sqrt Tanh
"""
_ELEMENTWISE = frozenset(_NAMES.split())
_NAMES_OF_LAYERS = """
    AveragePool BatchNormalization Conv ConvTranspose GlobalAveragePool GlobalMaxPool
    GroupNormalization InstanceNormalization LayerNormalization MaxPool RMSNormalization Softmax
"""
# Of these the answer has the axes of the first input.
_SAME_AXES = _ELEMENTWISE | frozenset(_NAMES_OF_LAYERS.split())
_BROADCAST = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where"])


@dataclass(frozen=True)
class _Axis:
    """Where a value has its rows, and how many axes it has."""

    place: int
    rank: int


def computed_over_batch(at: NodeAt, index: int) -> bool | None:
    """Whether input `index` of a BatchNormalization is a statistic of the rows that share a batch.

    None where it depends on the model's inputs and it cannot be told. A first axis of size 1, made
    for the purpose, is an instance normalisation written as a batch normalisation.
    """
    value = at.scope.argument(at.node, index)
    # A value that is its own mean has one axis, that of channels, and no rows.
    if not isinstance(value, Made) or value is at.scope.argument(at.node, 0):
        return False
    ancestors = list(_ancestors(value))
    depends = len(ancestors) >= _MOST or any(
        isinstance(item, Open) and item.origin is not Origin.OVERRIDABLE for item in ancestors
    )
    if not depends or _has_one_row(at.scope.argument(at.node, 0)):
        return False
    made = [item for item in ancestors if isinstance(item, Made)]
    if any(_reduces(item, None) for item in made):
        return True
    return False if len(ancestors) < _MOST and all(map(_keeps_places, made)) else None


def _keeps_places(made: Made) -> bool:
    """Whether every number that a node makes comes from those in its own place."""
    if made.index in made.scope.calls:  # what the function makes is looked at itself
        return True
    op = made.node.op_type
    return not domain_of(made.node.domain) and (op in _ELEMENTWISE or op in _BROADCAST)


class BatchAxes:
    """Where the values of a graph have their rows, as far as plain operators tell.

    The rows are on the axis of the model's inputs that is called batch.
    """

    def __init__(self, inputs: Sequence[onnx.ValueInfoProto]) -> None:
        self._known: dict[int, tuple[Value, _Axis | None]] = {}
        self._inputs: dict[str, _Axis] = {}
        for item in inputs:
            sizes = item.type.tensor_type.shape.dim
            for place, size in enumerate(sizes):
                if "batch" in size.dim_param.lower():
                    self._inputs.setdefault(item.name, _Axis(place, len(sizes)))

    def are_normalised(self, at: NodeAt) -> bool:
        """Whether a division, or a product, completes a normalisation over the axis of rows.

        It is one where a side is what remains of a value without its mean over that axis, and the
        other side comes from another reduction over it, as a variance does.
        """
        if not self._inputs or at.domain or at.node.op_type not in ("Div", "Mul"):
            return False
        sides = [at.scope.argument(at.node, index) for index in range(len(at.node.input))]
        centred = [any(map(self._is_centred, _near(side))) for side in sides]
        if len(sides) != 2 or sum(centred) != 1:
            return False
        scale = sides[centred.index(False)]
        return any(isinstance(item, Made) and self._reduces(item) for item in _ancestors(scale))

    def _is_centred(self, value: Value) -> bool:
        if not isinstance(value, Made) or value.node.op_type != "Sub" or value.node.domain:
            return False
        whole, mean = (value.scope.argument(value.node, index) for index in (0, 1))
        if self._of(whole) is None:
            return False
        return any(isinstance(item, Made) and self._reduces(item) for item in _near(mean))

    def _reduces(self, made: Made) -> bool:
        if made.node.op_type not in _MEANS or not made.node.input:
            return False
        axis = self._of(made.scope.argument(made.node, 0))
        return axis is not None and _reduces(made, axis)

    def _of(self, value: Value) -> _Axis | None:
        """The axis of rows of a value; None where it has none, or it is not known."""
        pending = [value]
        while pending and len(pending) < _MOST:
            item = pending[-1]
            if not isinstance(item, Made) or id(item) in self._known:
                pending.pop()
                continue
            missing = [
                source
                for source in _sources(item)
                if isinstance(source, Made) and id(source) not in self._known
            ]
            if missing:
                pending += missing
            else:
                self._known[id(item)] = (item, self._through(item))
        return self._look(value)

    def _look(self, value: Value) -> _Axis | None:
        if isinstance(value, Open):
            return self._inputs.get(value.name) if value.origin is Origin.CALLER else None
        return self._known[id(value)][1] if id(value) in self._known else None

    def _through(self, made: Made) -> _Axis | None:
        """The axis of rows of what a node makes of its inputs."""
        node, scope = made.node, made.scope
        if made.index in scope.calls:
            sources = _sources(made)
            return self._look(sources[-1]) if sources else None
        if domain_of(node.domain) or not node.input:
            return None
        first = self._look(scope.argument(node, 0))
        op = node.op_type
        if op in _BROADCAST:
            arguments = [scope.argument(node, index) for index in range(len(node.input))]
            axes = [axis for item in arguments if (axis := self._look(item)) is not None]
            ranks = [axis.rank for axis in axes]
            weights = [item.weight for item in arguments if isinstance(item, Fixed)]
            ranks += [len(weight.dims) for weight in weights if isinstance(weight, Weight)]
            if not axes or len(ranks) < len(arguments):
                # Scalars computed in the graph are common, and so is a mean of the same rank.
                return axes[0] if axes and op != "Where" else None
            behind = {axis.rank - axis.place for axis in axes}
            return _Axis(max(ranks) - behind.pop(), max(ranks)) if len(behind) == 1 else None
        if first is None:
            return None
        if op in _SAME_AXES:
            return first
        if op == "MatMul":
            return first if first.place < first.rank - 1 else None
        if op == "Gemm":
            turned = scope.attribute(node, "transA")
            return first if isinstance(turned, Absent) or not getattr(turned, "i", 1) else None
        if op == "Transpose":
            order = scope.attribute(node, "perm")
            if isinstance(order, onnx.AttributeProto) and first.place in order.ints:
                return _Axis(list(order.ints).index(first.place), first.rank)
        return None


def _sources(made: Made) -> list[Value]:
    """What a value is made of: the node's inputs, and inside of a function what it answers."""
    node, scope = made.node, made.scope
    sources = [scope.argument(node, index) for index in range(len(node.input))]
    if made.index in scope.calls:
        inner, position = scope.calls[made.index], list(node.output).index(made.name)
        if position < len(inner.outputs):
            sources.append(inner.read(inner.outputs[position]))
    return sources


def _ancestors(value: Value) -> Iterator[Value]:
    """The value and everything that it is computed from, each once, the nearest first."""
    seen: set[int] = set()
    pending = deque([value])
    while pending and len(seen) < _MOST:
        item = pending.popleft()
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            if isinstance(item, Made):
                pending += _sources(item)


def _near(value: Value) -> Iterator[Value]:
    """The value and what it is made of by operators that do no more than scale or reshape it."""
    steps = 0
    pending = [value]
    while pending and steps < 20:
        steps += 1
        item = pending.pop(0)
        yield item
        if isinstance(item, Made) and item.node.op_type in (
            "Cast",
            "CastLike",
            "Identity",
            "Mul",
            "Div",
            "Reshape",
            "Squeeze",
            "Unsqueeze",
        ):
            pending.append(item.scope.argument(item.node, 0))
            if item.node.op_type == "Mul":
                pending.append(item.scope.argument(item.node, 1))


def _reduces(made: Made, axis: _Axis | None) -> bool:
    """Whether a node reduces this axis; without one, whether it may reduce the first."""
    node, scope = made.node, made.scope
    if domain_of(node.domain) or node.op_type not in _MEANS:
        return False
    attribute = scope.attribute(node, "axes")
    given: list[int] | None = None
    if isinstance(attribute, onnx.AttributeProto):
        given = list(attribute.ints)
    elif not isinstance(argument := scope.argument(node, 1), Absent):
        values = decide(argument)
        if values is None:
            return axis is None
        given = [int(number) for number in values.reshape(-1)]
    if not given:
        noop = scope.attribute(node, "noop_with_empty_axes")
        return isinstance(noop, Absent) or not getattr(noop, "i", 0)
    if axis is None:
        return 0 in given or any(number < 0 for number in given)
    return axis.place in [number % max(axis.rank, 1) for number in given]


def _has_one_row(value: Value) -> bool:
    """Whether the first axis was made to have size 1."""
    if not isinstance(value, Made) or domain_of(value.node.domain):
        return False
    shape = value.scope.argument(value.node, 1) if len(value.node.input) > 1 else Absent()
    if value.node.op_type == "Unsqueeze":
        axes = decide(shape) if not isinstance(shape, Absent) else None
        attribute = value.scope.attribute(value.node, "axes")
        if isinstance(attribute, onnx.AttributeProto):
            return 0 in helper.get_attribute_value(attribute)
        return axes is not None and 0 in axes
    if value.node.op_type != "Reshape":
        return False
    sizes = decide(shape)
    if sizes is None and isinstance(shape, Made) and shape.node.op_type == "Concat":
        sizes = decide(shape.scope.argument(shape.node, 0))
    return sizes is not None and sizes.size > 0 and int(sizes.reshape(-1)[0]) == 1
