"""Walk a graph and decide whether anything in it rounds.

1. Inputs and stored tensors get their bounds. Nothing is known of a float input without a range.
2. Each node, in the order in which nodes run, gets outlines of its outputs (`shapes`). If all its
   inputs have bounds, so have its outputs (`operators`), or there is a reason why not.
3. What is computed from a tensor without bounds has none either, and adds no reason.
4. The graph is proved if all its outputs have bounds and no float output may be -0.0.

A call of a function has the outputs of the function's nodes, and an If those of both branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from evalmode.bundle.certificate import Reason
from evalmode.errors import EvalmodeError
from evalmode.export.exact import movement
from evalmode.export.exact.call import Call
from evalmode.export.exact.limits import FloatRange, Range
from evalmode.export.exact.operators import (
    FOLDABLE,
    OPERATORS,
    SHAPE_READERS,
    why_not_followed,
)
from evalmode.export.exact.outline import Outline
from evalmode.export.exact.shapes import MALFORMED, outlines
from evalmode.export.exact.values import (
    BOOL,
    FLOAT32,
    SIGNIFICAND_BITS,
    Bounds,
    Extent,
    NotExact,
    Shape,
    Tensor,
    integer_bounds,
    joined,
    shape_of,
    steps_of,
    type_bounds,
)
from evalmode.export.graph import Graph, NodeAt, Weight
from evalmode.export.graph.scope import (
    Absent,
    Initializer,
    NodeOutput,
    Origin,
    Scope,
    Unknown,
    Value,
    domain_of,
)
from evalmode.export.graph.weight import Array

# Opset 13 made axes inputs and is what exporters have written since 2021.
_FIRST_OPSET = 13

# A function of such a domain may have the name of a runtime's own operator, which then runs.
_RUNTIME_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.ms.")

_SUMS = frozenset({"Add", "Sub", "Mul", "MatMul", "Gemm", "Conv", "Einsum", "ReduceSum", "Sum"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest bits of a result or an operand, and the path of the node that has them."""

    bits: float = 0.0
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the walk found.

    proved          whether no operator on the way to an output rounds
    reasons         why not, in the order of the graph; the first is the first loss
    node_count      the nodes that were walked
    widest          the result that needs the most bits; float32 has 24
    widest_operand  the operand of a float product that needs the most bits; TF32 keeps 11
    calls           the nodes that were followed, each with its inputs
    tensors         what is known of the tensors of the main graph, by name
    """

    proved: bool
    reasons: tuple[Reason, ...]
    node_count: int
    widest: Peak
    widest_operand: Peak
    calls: tuple[Call, ...] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        return "proved" if self.proved else f"not proved: {self.reasons[0]}"


def prove(
    graph: Graph,
    *,
    ranges: Mapping[str, Range] | None = None,
    largest: Mapping[str, int] | None = None,
) -> Proof:
    """Whether nothing in the graph rounds, whatever the caller sends within these limits.

    `ranges` are the smallest and the largest integer of inputs by name, or a FloatRange for float32
    inputs. Without one an input may hold any number of its type. `largest` are the largest sizes of
    axes that vary: by the name that the graph gives them, or as "input:axis". Each such axis has at
    least one element.

    Raises EvalmodeError for a name that is not in the graph.

    Example:
        proof = prove(open_graph(path), ranges={"ids": (0, 65535)}, largest={"length": 32})
        print(proof)
    """
    walk = _Walk(graph, dict(ranges or {}), dict(largest or {}))
    for at in graph.nodes:
        if not at.is_dead:
            walk.visit(at)
    return walk.proof()


class _Walk:
    """The state of one walk: what is known of each tensor, and the reasons so far."""

    def __init__(self, graph: Graph, ranges: dict[str, Range], largest: dict[str, int]) -> None:
        self._graph = graph
        self._reasons: list[Reason] = []
        self._calls: list[Call] = []
        self._widest = self._widest_operand = Peak()
        self._outputs: dict[tuple[int, str], Tensor] = {}  # of nodes, by scope and name
        self._weights: dict[int, Tensor] = {}
        self._nothings: dict[tuple[str, str], Tensor] = {}
        self._main: Scope | None = None
        names = {value.name for value in graph.proto.graph.input}
        symbols, labels = set(), set()
        for value in graph.proto.graph.input:
            for index, dim in enumerate(value.type.tensor_type.shape.dim):
                symbols.add(f"{value.name}:{index}")
                labels.add(dim.dim_param)
        axes = symbols | labels
        # A file may call an axis "ids:1", which is another axis: the limit is for that one.
        self._largest_by_label = {
            name: size for name, size in largest.items() if name not in symbols
        }
        self._inputs = {
            value.name: self._input(value, ranges, largest) for value in graph.proto.graph.input
        }
        for flag, given, existing in (("range", ranges, names), ("largest", largest, axes)):
            unknown = sorted(set(given) - existing)
            if unknown:
                raise EvalmodeError(
                    f"--{flag} names {', '.join(unknown)}, which {graph.name} does not have; it has"
                    f" {', '.join(sorted(existing - {''})) or 'none'}"
                )

    def _lost(self, node: str, op: str, why: str) -> frozenset[int]:
        """Add a reason; the result is for the tensors of which nothing is known because of it."""
        self._reasons.append(Reason(node=node, op=op, why=why))
        return frozenset({len(self._reasons) - 1})

    def _input(
        self,
        value: onnx.ValueInfoProto,
        ranges: dict[str, Range],
        largest: dict[str, int],
    ) -> Tensor:
        """What is known of an input before anyone calls the model."""
        tensor_type = value.type.tensor_type
        dtype = _dtype_of_input(value)
        shape: list[Extent] = []
        for index, dim in enumerate(tensor_type.shape.dim):
            symbol = f"{value.name}:{index}"
            label = dim.dim_param or symbol
            if dim.HasField("dim_value") and dim.dim_value >= 0:
                shape.append(Extent.exactly(dim.dim_value))
            else:
                limit = largest.get(symbol, self._largest_by_label.get(dim.dim_param))
                shape.append(Extent(1, limit, symbol=symbol, label=label))
        has_shape = tensor_type.HasField("shape")
        bounds: Bounds | None = None
        limits = ranges.get(value.name)
        if dtype == FLOAT32 and isinstance(limits, FloatRange):
            bounds = limits.bounds
        elif dtype is not None and (dtype == BOOL or dtype.kind in "iu"):
            bounds = type_bounds(dtype)
            if limits is not None:
                low, high = _integers_within(limits)
                smallest = max(float(low), float(bounds.low))
                greatest = min(float(high), float(bounds.high))
                if smallest > greatest:
                    raise EvalmodeError(
                        f"the range of {value.name} is empty: {low} to {high} for {dtype.name}"
                    )
                bounds = integer_bounds(smallest, greatest)
        return Tensor(dtype=dtype, shape=tuple(shape) if has_shape else None, computed=bounds)

    def visit(self, at: NodeAt) -> None:
        """Find out what is known of the node's outputs."""
        is_passed_on = at.is_call or (at.domain == "" and at.node.op_type == "If")
        if is_passed_on:
            return  # its outputs are looked up in the function or in the branches
        if not at.scope.path:
            self._main = at.scope
        inputs = [
            self._tensor(at.scope.argument(at.node, index)) for index in range(len(at.node.input))
        ]
        call = Call(at=at, inputs=inputs)
        is_standard = at.domain == ""
        outputs = outlines(call) if is_standard else _unknown_outlines(call)

        reasons: frozenset[int] = frozenset().union(
            *(tensor.reasons for tensor in inputs if tensor is not None and not tensor.is_known)
        )
        reads_numbers = not (is_standard and at.node.op_type in SHAPE_READERS)
        unknown = [tensor for tensor in inputs if tensor is not None and not tensor.is_known]
        if reads_numbers and unknown:
            if not reasons:  # the first node that reads a float input says so
                reasons = self._unknown_input(call)
            self._define(at, outputs, None, reasons)
            return
        try:
            self._require_followed(at)
            if at.node.op_type == "Constant":
                self._define_constant(at)
                return
            stored = movement.fold(call, outputs) if at.node.op_type in FOLDABLE else None
            if stored is not None:
                self._set(
                    at, 0, Tensor(dtype=stored.dtype, shape=shape_of(stored.shape), stored=stored)
                )
                return
            bounds = OPERATORS[at.node.op_type](call, outputs)
            if len(bounds) < len(at.node.output):
                raise NotExact("it has outputs that the proof does not follow")
            self._measure(call, bounds)
        except NotExact as error:
            self._define(at, outputs, None, self._lost(at.path, at.op, str(error)))
            return
        except MALFORMED as error:  # a node may be malformed in ways that no list has
            why = f"its inputs and attributes do not fit one another: {error}"
            self._define(at, outputs, None, self._lost(at.path, at.op, why))
            return
        self._calls.append(call)
        self._define(at, outputs, bounds, frozenset())

    def _require_followed(self, at: NodeAt) -> None:
        """Raise NotExact for a node of a domain, an opset or an operator that is not followed."""
        if at.domain:
            raise NotExact(f"the operators of {at.domain} are not followed")
        last = onnx.defs.onnx_opset_version()
        if not _FIRST_OPSET <= at.opset <= last:
            raise NotExact(f"opset {at.opset} is not followed, only {_FIRST_OPSET} to {last}")
        if at.node.op_type not in OPERATORS and at.node.op_type != "Constant":
            raise NotExact(why_not_followed(at.node.op_type))

    def _unknown_input(self, call: Call) -> frozenset[int]:
        """The reason for a node that reads an input of the model of which nothing is known."""
        for index, tensor in enumerate(call.inputs):
            if tensor is not None and not tensor.is_known:
                name = call.at.node.input[index]
                kind = "a type that is not followed" if tensor.dtype is None else tensor.dtype.name
                why = f"it reads {name!r}, which comes from outside as {kind} with any values"
                if tensor.dtype == FLOAT32:
                    why += f": give them with --range {name}=LOW:HIGH/STEP"
                return self._lost(call.at.path, call.at.op, why)
        raise AssertionError("only a node with such an input has this reason")

    def _define(
        self,
        at: NodeAt,
        outputs: list[Outline],
        bounds: list[Bounds] | None,
        reasons: frozenset[int],
    ) -> None:
        for index, outline in enumerate(outputs):
            tensor = Tensor(
                dtype=outline.dtype,
                shape=outline.shape,
                computed=None if bounds is None else bounds[index],
                sizes=None if bounds is None else outline.sizes,
                reasons=reasons,
            )
            self._set(at, index, tensor)

    def _set(self, at: NodeAt, index: int, tensor: Tensor) -> None:
        name = at.node.output[index]
        if name:
            self._outputs[id(at.scope), name] = tensor

    def _define_constant(self, at: NodeAt) -> None:
        """Read the value of a Constant node. Raises NotExact for texts and sparse values."""
        if len(at.node.attribute) != 1 or len(at.node.output) != 1:
            raise NotExact("it has several values")
        name = at.node.attribute[0].name
        output = at.scope.read(at.node.output[0])
        value = Call(at=at, inputs=[]).attribute(name, None)
        if name == "value" and isinstance(output, NodeOutput):
            weight = at.scope.tensors.get((output.index, name))
            if weight is None:
                weight = Weight(name=name, path=at.path, tensor=value)
            self._set(at, 0, self._stored(weight))
            return
        dtypes = {
            "value_int": np.int64,
            "value_ints": np.int64,
            "value_float": np.float32,
            "value_floats": np.float32,
        }
        if name not in dtypes:
            raise NotExact(f"its {name} is not followed")
        array = np.asarray(value, dtypes[name])
        self._set(at, 0, _constant(array))

    def _stored(self, weight: Weight) -> Tensor:
        """The tensor of a weight, whose values are read only if they are needed."""
        tensor = self._weights.get(id(weight))
        if tensor is None:
            tensor = Tensor(dtype=weight.dtype, shape=shape_of(weight.dims), stored=weight)
            self._weights[id(weight)] = tensor
        return tensor

    def _tensor(self, value: Value) -> Tensor | None:
        """What is known of a value; None for an input that is left out."""
        match value:
            case Absent():
                return None
            case Initializer():
                if isinstance(value.weight, Weight):
                    return self._stored(value.weight)
                name = value.weight.values.name
                return self._nothing(name, "sparse tensor", "sparse tensors are not followed")
            case Unknown():
                if value.origin is Origin.CALLER and value.name in self._inputs:
                    return self._inputs[value.name]
                if value.origin is Origin.OVERRIDABLE:
                    why = "it is an input too, so the caller may override it"
                    return self._nothing(value.name, "initializer", why)
                return self._nothing(value.name, "input", f"it is {value.origin.value}")
            case NodeOutput():
                return self._output(value)

    def _nothing(self, name: str, kind: str, why: str) -> Tensor:
        """A tensor of which nothing is known, with a reason of its own."""
        tensor = self._nothings.get((name, kind))
        if tensor is None:
            tensor = Tensor(dtype=None, reasons=self._lost(name, kind, why))
            self._nothings[name, kind] = tensor
        return tensor

    def _output(self, output: NodeOutput) -> Tensor:
        """What is known of a node's output, also of a call's or an If's."""
        key = (id(output.scope), output.name)
        tensor = self._outputs.get(key)
        if tensor is None:
            tensor = self._passed_on(output)
            self._outputs[key] = tensor
        return tensor

    def _passed_on(self, output: NodeOutput) -> Tensor:
        """The output of a call: that of the function. That of an If: either branch's."""
        scope, node, index = output.scope, output.node, output.index
        position = list(node.output).index(output.name)
        path, op = scope.path_of(index), node.op_type
        inner = scope.calls.get(index)
        if inner is not None:
            domain = domain_of(node.domain)
            if domain.startswith(_RUNTIME_DOMAINS[1:]) or domain == "":
                why = "a runtime may have an operator of the name of this function"
                return self._nothing(path, op, why)
            tensor = self._tensor(inner.read(inner.outputs[position]))
            assert tensor is not None, "an output of a function is a value"
            return tensor
        branches = []
        for name in ("then_branch", "else_branch"):
            body = scope.bodies.get((index, name))
            if body is None or position >= len(body.outputs):
                return self._nothing(path, op, "its branches are not known")
            tensor = self._tensor(body.read(body.outputs[position]))
            assert tensor is not None, "an output of a branch is a value"
            branches.append(tensor)
        condition = self._tensor(scope.argument(node, 0))
        parts = [*branches, *([condition] if condition is not None else [])]
        reasons: frozenset[int] = frozenset().union(*(part.reasons for part in parts))
        dtype = branches[0].dtype
        if not all(part.is_known for part in parts):
            if not reasons:
                reasons = self._lost(path, op, "it reads an input of which nothing is known")
            return Tensor(dtype=dtype, reasons=reasons)
        if dtype != branches[1].dtype:
            return self._nothing(path, op, "its branches have different types")
        try:
            bounds = joined([branch.bounds.together() for branch in branches])
        except NotExact as error:
            return self._nothing(path, op, str(error))
        return Tensor(dtype=dtype, shape=_common_shape(branches), computed=bounds)

    def _measure(self, call: Call, bounds: list[Bounds]) -> None:
        """Take note of the widest result and of the widest operand of a float product."""
        if not call.inputs or call.input(0).dtype != FLOAT32:
            return
        if call.op in _SUMS:
            for part in bounds:
                steps = steps_of(part.largest, part.grid)
                narrow = steps <= 2.0**SIGNIFICAND_BITS  # others have few bits at any exponent
                if narrow.any():
                    bits = float(np.log2(np.maximum(steps[narrow], 1)).max())
                    if bits > self._widest.bits:
                        self._widest = Peak(bits=bits, node=call.at.path)
        if call.op in _PRODUCTS:
            for index in range(min(2, len(call.inputs))):  # an Einsum may have one operand
                bits = float(call.bounds(index).bits.max())
                if bits > self._widest_operand.bits:
                    self._widest_operand = Peak(bits=bits, node=call.at.path)

    def proof(self) -> Proof:
        """The proof of the graph's outputs."""
        numbers: set[int] = set()
        scope = self._main_scope()
        for output in self._graph.proto.graph.output:
            tensor = None if scope is None else self._tensor(scope.read(output.name))
            if tensor is None:
                numbers |= self._lost(output.name, "output", "the graph has no nodes")
            elif not tensor.is_known:
                why = "it is an input of which nothing is known"
                numbers |= tensor.reasons or self._lost(output.name, "output", why)
            else:
                try:
                    if tensor.bounds.negative_zero:
                        why = "it may be -0.0 on one machine and 0.0 on another"
                        numbers |= self._lost(output.name, "output", why)
                except NotExact as error:
                    numbers |= self._lost(output.name, "output", str(error))
        tensors = {
            name: tensor for (key, name), tensor in self._outputs.items() if key == id(scope)
        }
        return Proof(
            proved=not numbers,
            reasons=tuple(self._reasons[number] for number in sorted(numbers)),
            node_count=sum(not at.is_dead for at in self._graph.nodes),
            widest=self._widest,
            widest_operand=self._widest_operand,
            calls=tuple(self._calls),
            tensors=tensors | self._inputs,
        )

    def _main_scope(self) -> Scope | None:
        if self._main is not None:
            return self._main
        for at in self._graph.nodes:
            if not at.scope.path:
                return at.scope
        return None


def _integers_within(limits: Range) -> tuple[int, int]:
    """The smallest and the largest integer of a range."""
    if isinstance(limits, FloatRange):
        return math.ceil(limits.low), math.floor(limits.high)
    return limits


def _constant(array: Array) -> Tensor:
    return Tensor(dtype=array.dtype, shape=shape_of(array.shape), stored=array)


def _dtype_of_input(value: onnx.ValueInfoProto) -> np.dtype[np.generic] | None:
    if not value.type.HasField("tensor_type"):
        return None
    try:
        return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    except KeyError:
        return None


def _unknown_outlines(call: Call) -> list[Outline]:
    return [Outline(dtype=None, shape=None)] * call.output_count


def _common_shape(tensors: list[Tensor]) -> Shape | None:
    """The shape of a tensor that is one of these; sizes that differ may be either's."""
    first, second = (tensor.shape for tensor in tensors)
    if first is None or second is None or len(first) != len(second):
        return None
    extents = []
    for a, b in zip(first, second, strict=True):
        if a.is_same_as(b):
            extents.append(a)
            continue
        largest = None
        if a.largest is not None and b.largest is not None:
            largest = max(a.largest, b.largest)
        extents.append(Extent(min(a.lowest, b.lowest), largest, label=a.label or b.label))
    return tuple(extents)
