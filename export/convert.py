"""Any `nn.Module` in eval mode -> an ONNX model whose bytes depend on the module alone.

Every node is named after the module it came from (`blocks.0.attention/MatMul_17`). Knows no
checkpoint and no bundle.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import sympy
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from evalmode.bundle.manifest import Bound
from evalmode.errors import EvalmodeError
from evalmode.export.graph import bodies_of, names_read
from evalmode.export.index_bounds import index_bounds
from evalmode.export.module.forward import copies_of, plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import answering_tensors
from evalmode.export.module.untouched import state_of
from evalmode.export.refusal import refusal
from evalmode.export.rewrites import Rewrites, traceable_modules
from evalmode.export.torch_quirks import forget_unrolled_loops, one_operator_table, quiet_exporter

# The first opset with GELU as one operator; the runtimes of the last two years read it.
OPSET = 20

# A bound that no input reaches is none; torch writes its infinity as a very large number in places.
_UNBOUNDED = 1 << 20

_SCOPES = "pkg.torch.onnx.name_scopes"
_NEUTRAL = "evalmode_output_"


class NotInEvalMode(EvalmodeError):  # noqa: N818 - read as a sentence: "raise NotInEvalMode"
    """A module that would be exported with training behaviour; the message names the sites."""


class NotConvertible(EvalmodeError):  # noqa: N818
    """A module that torch's exporter cannot write as ONNX; the message carries its reason."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What holds of the sizes that a trace was made for, where the module's own code asked.

    `expression` is sympy's, over the symbols that `axes` names.
    """

    expression: Any
    axes: Mapping[Any, str]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it holds for sizes by the names of their axes."""
        numbers = {symbol: sympy.Integer(sizes[axis]) for symbol, axis in self.axes.items()}
        return bool(self.expression.xreplace(numbers))

    @property
    def numbers(self) -> frozenset[int]:
        """The whole numbers that stand in it."""
        return frozenset(int(number) for number in self.expression.atoms(sympy.Integer))

    def __str__(self) -> str:
        names = {symbol: sympy.Symbol(axis) for symbol, axis in self.axes.items()}
        return str(self.expression.xreplace(names))


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The model as it goes into a bundle, and the graph before optimisation.

    The optimiser computes what depends on constants alone, once: also a Dropout or a Bernoulli,
    whose noise it then leaves behind as a constant. The evidence is in the graph that it was given.
    `bounds` holds, by the axis' name, the largest size for which the trace holds: beyond it the
    module's own code takes another way. `conditions` are what else the trace was made for.
    `index_bounds` holds, by the input's name, which values are indices of what it indexes.
    """

    model: onnx.ModelProto
    unoptimised: onnx.ModelProto
    bounds: Mapping[str, int]
    conditions: tuple[Condition, ...] = ()
    index_bounds: Mapping[str, tuple[Bound, ...]] = field(default_factory=dict)


def convert(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    opset: int = OPSET,
) -> Converted:
    """The ONNX model of `module`, which is called with `inputs` by name.

    `dynamic_axes` names, for each input, the axes that may vary: {"input_ids": {0: "batch", 1:
    "length"}}. `outputs` names the output tensors in order. Never calls `.eval()`: raises
    NotInEvalMode, naming the sites, for a module that has not left training, and NotConvertible
    when the exporter gives up.
    """
    network = Network.of(module)
    if escaped := network.in_training:
        sites = [f"{path or '(root)'} ({type(part).__name__})" for path, part in escaped.items()]
        raise NotInEvalMode(f"still in training mode, call .eval() and look at: {'; '.join(sites)}")
    if unknown := dynamic_axes.keys() - inputs.keys():
        raise ValueError(f"dynamic_axes names {sorted(unknown)}, the inputs are {list(inputs)}")
    untraced = network.copy()
    try:
        converted = _export(module, inputs, dynamic_axes=dynamic_axes, outputs=outputs, opset=opset)
    except NotConvertible:
        # A first call that registers a buffer cannot be traced, and a second one can.
        before = state_of(untraced)
        with plain_forward():
            untraced.module(**copies_of(inputs))
        if state_of(Network.of(untraced.module)).keys() == before.keys():
            raise
        converted = _export(
            untraced.module, inputs, dynamic_axes=dynamic_axes, outputs=outputs, opset=opset
        )
    model = converted.model
    if len(model.graph.output) != len(outputs):
        raise NotConvertible(
            f"{type(module).__name__} has {len(model.graph.output)} outputs, named were"
            f" {list(outputs)}"
        )
    if (version := next(item.version for item in model.opset_import if item.domain == "")) != opset:
        raise NotConvertible(
            f"{type(module).__name__} was exported at opset {version}: opset {opset} cannot be had"
        )
    for written in (model, converted.unoptimised):
        _order_loops(written.graph)
        _name_values(written.graph)
        _name_outputs(written.graph, outputs)
        _name_nodes(written)
        _strip(written)
    return converted


def _export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    opset: int,
) -> Converted:
    try:
        forget_unrolled_loops()
        with (
            quiet_exporter(),
            one_operator_table(),
            plain_forward(),
            traceable_modules(),
            answering_tensors(module, tuple(inputs), tracing=Rewrites()),
        ):
            program = torch.onnx.export(
                module,
                (),
                kwargs=copies_of(inputs),
                dynamo=True,
                dynamic_shapes={name: dict(dynamic_axes.get(name, {})) for name in inputs},
                # Neutral names: torch calls inner values `embedding`, `linear` or `exp` as well.
                output_names=[f"{_NEUTRAL}{index}" for index in range(len(outputs))],
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
            assert program is not None, "the dynamo exporter returns a program"
            _name_values_apart(program.model.graph)
            unoptimised = program.model_proto
            program.optimize()
            model = program.model_proto
        onnx.checker.check_model(model)
    except (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError) as error:
        why = refusal(error, inputs, dynamic_axes)
        raise NotConvertible(f"{type(module).__name__} cannot be exported: {why}") from error
    bounds, conditions = _traced_sizes(program, dynamic_axes)
    assert program.exported_program is not None, "the dynamo exporter keeps what it traced"
    return Converted(
        model=model,
        unoptimised=unoptimised,
        bounds=bounds,
        conditions=conditions,
        index_bounds=index_bounds(program.exported_program),
    )


def _name_values_apart(graph: Any) -> None:
    """Give the values that nodes make names that no weight and no input has."""
    names = {*graph.initializers, *(value.name for value in graph.inputs)}
    for node in graph.all_nodes():
        for value in node.outputs:
            count = 1
            name = value.name
            while value.name in names:
                value.name = f"{name}_{count}"
                count += 1


def _traced_sizes(
    program: torch.onnx.ONNXProgram, dynamic_axes: Mapping[str, Mapping[int, str]]
) -> tuple[dict[str, int], tuple[Condition, ...]]:
    """The largest size of each axis for which the trace holds, and what else it was made for."""
    exported = program.exported_program
    assert exported is not None, "the dynamo exporter keeps what it traced"
    axes: dict[Any, str] = {}
    bounds: dict[str, int] = {}
    expressions: dict[Any, None] = {}
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        for place, axis in dynamic_axes.get(node.name, {}).items():
            size = node.meta["val"].shape[place]
            if not isinstance(size, torch.SymInt):
                continue
            symbol, environment = size.node.expr, size.node.shape_env
            if symbol.is_Symbol:
                axes.setdefault(symbol, axis)
            known = exported.range_constraints.get(symbol)
            if known is not None and known.upper.is_Integer and known.upper < _UNBOUNDED:
                bounds[axis] = int(known.upper)
            expressions |= dict.fromkeys(guard.expr for guard in environment.guards)
            for assertions in environment.deferred_runtime_asserts.values():
                expressions |= dict.fromkeys(assertion.expr for assertion in assertions)
    conditions = [
        Condition(expression=expression, axes={symbol: axes[symbol] for symbol in symbols})
        for expression in expressions
        if (symbols := expression.free_symbols) and symbols <= axes.keys()
    ]
    return bounds, tuple(conditions)


def _order_loops(graph: onnx.GraphProto) -> None:
    """Put what a loop carries into the order in which its body reads it first.

    onnxscript takes it from a set, whose order is another one in each process.
    """
    for node in graph.node:
        bodies = list(bodies_of(node))
        for body in bodies:
            _order_loops(body)
        if node.op_type != "Loop" or node.domain or len(bodies) != 1:
            continue
        body, carried = bodies[0], len(node.input) - 2
        reads = list(dict.fromkeys(names_read(body)))
        names = [item.name for item in body.input[2:]]
        order = sorted(
            range(carried),
            key=lambda place: (
                reads.index(names[place]) if names[place] in reads else len(reads),
                place,
            ),
        )
        inputs, outputs = list(node.input[2:]), list(node.output)
        node.input[2:] = [inputs[place] for place in order]
        node.output[:carried] = [outputs[place] for place in order]
        for values, first in ((body.input, 2), (body.output, 1)):
            before = [copy.deepcopy(item) for item in values]
            for index, place in enumerate(order):
                values[first + index].CopyFrom(before[first + place])


def _name_values(graph: onnx.GraphProto) -> None:
    """Name the values of a graph with loops or branches in the order in which they are made:
    onnxscript numbers them in the order of a set.
    """
    names: dict[str, str] = {}
    kept = {item.name for item in (*graph.input, *graph.output, *graph.initializer)}
    has_bodies = False
    for index, node in enumerate(graph.node):
        made = list(node.output)
        pending = list(bodies_of(node))
        has_bodies = has_bodies or bool(pending)
        while pending:
            body = pending.pop()
            made += [item.name for item in (*body.input, *body.initializer)]
            for step in body.node:
                made += step.output
                pending += bodies_of(step)
        for number, name in enumerate(made):
            if name and name not in kept:
                names.setdefault(name, f"{node.op_type}_{index}_{number}")
    if not has_bodies:
        return
    _rename(graph, names)
    described = sorted(graph.value_info, key=lambda item: item.name)
    del graph.value_info[:]
    graph.value_info.extend(described)


def _name_outputs(graph: onnx.GraphProto, outputs: Sequence[str]) -> None:
    """Give the outputs their own names; an inner value that has such a name gets another one."""
    inner = {name for node in graph.node for name in node.output}
    inner |= {tensor.name for tensor in graph.initializer}
    names: dict[str, str] = {}
    for output, name in zip(graph.output, outputs, strict=True):
        names[output.name] = name
        if name in inner:
            count = 1
            while f"{name}_{count}" in {*inner, *outputs, *names.values()}:
                count += 1
            names[name] = f"{name}_{count}"
    _rename(graph, names)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in the bodies of its nodes, which read them too."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for body in bodies_of(node):
            _rename(body, names)


def _name_nodes(model: onnx.ModelProto) -> None:
    for index, node in enumerate(model.graph.node):
        found = next((item.value for item in node.metadata_props if item.key == _SCOPES), "[]")
        scopes = ast.literal_eval(found)  # from the root to the operator itself
        path = scopes[-2] if len(scopes) > 1 else ""
        # The strict exporter names a module by the way it took through the exchanged forward.
        node.name = f"{path.rpartition('.__self__.')[2]}/{node.op_type}_{index}"


def _strip(message: Message) -> None:
    """Remove what the exporter notes about itself: stack traces and paths of this machine, and
    texts that vary.
    """
    for item, value in message.ListFields():
        if item.name in ("metadata_props", "doc_string"):
            message.ClearField(item.name)
        elif item.message_type is not None:
            for part in value if isinstance(value, Sequence) or hasattr(value, "add") else (value,):
                _strip(part)
