"""Any `nn.Module` in eval mode -> an ONNX model whose bytes depend on the module alone.

The steps:

1. Refuse a module that is still in training mode.
2. Let torch's exporter trace it, and keep the graph from before and from after optimisation.
3. Read from the trace the sizes for which it holds.
4. Put loops, names of values, outputs and nodes into an order that does not change from process to
   process, and remove what the exporter writes about this machine.

Each node is named after the module it came from (`blocks.0.attention/MatMul_17`).
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

# Larger bounds do not count, because torch writes some infinities as large numbers.
_UNBOUNDED = 1 << 20

# The exporter's metadata of a node: the path of its module, as the text of a Python list.
_SCOPES = "pkg.torch.onnx.name_scopes"
# torch calls inner values `embedding`, `linear` or `exp`; an output could have the same name.
_TEMPORARY_NAME = "evalmode_output_"


class NotInEvalMode(EvalmodeError):  # noqa: N818 - read as a sentence: "raise NotInEvalMode"
    """A module that would be exported with training behaviour; the message names the sites."""


class NotConvertible(EvalmodeError):  # noqa: N818
    """A module that torch's exporter cannot write as ONNX; the message carries its reason."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition on sizes under which a trace holds, since the module's own code depends on it.

    `expression` is sympy's (`s0 > 16`); `axes` has the axis' name for each symbol in it.
    """

    expression: Any
    axes: Mapping[Any, str]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true for these sizes, which are given by the names of their axes."""
        values = {symbol: sympy.Integer(sizes[axis]) for symbol, axis in self.axes.items()}
        return bool(self.expression.xreplace(values))

    @property
    def numbers(self) -> frozenset[int]:
        """The whole numbers in it."""
        return frozenset(int(number) for number in self.expression.atoms(sympy.Integer))

    def __str__(self) -> str:
        names = {symbol: sympy.Symbol(axis) for symbol, axis in self.axes.items()}
        return str(self.expression.xreplace(names))


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The model as it goes into a bundle, and the graph before optimisation.

    The optimiser computes nodes that read only constants, and stores the result. If such a node is
    a Dropout or a Bernoulli, its noise becomes a constant. Only the `unoptimised` graph shows it.

    `bounds` maps the name of an axis to the largest size for which the trace holds: beyond it the
    module's own code takes another branch. `conditions` are the other conditions on sizes.
    `index_bounds` maps the name of an input to the values that are valid indices.
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

    `dynamic_axes` names the axes of each input that may vary. `outputs` names the output tensors
    in order.

    `.eval()` is never called here. Raises NotInEvalMode, with the modules' paths, for a module that
    is still in training mode, and NotConvertible if the exporter gives up.

    Example:
        converted = convert(
            module.eval(),
            {"input_ids": torch.ones(3, 9, dtype=torch.int64)},
            dynamic_axes={"input_ids": {0: "batch", 1: "length"}},
            outputs=["logits"],
        )
    """
    network = Network.of(module)
    if network.in_training:
        paths = []
        for path, part in network.in_training.items():
            paths.append(f"{path or '(root)'} ({type(part).__name__})")
        raise NotInEvalMode(f"still in training mode, call .eval() and look at: {'; '.join(paths)}")
    unknown = dynamic_axes.keys() - inputs.keys()
    if unknown:
        raise ValueError(f"dynamic_axes names {sorted(unknown)}, the inputs are {list(inputs)}")

    untraced = network.copy()
    try:
        converted = _export(module, inputs, dynamic_axes=dynamic_axes, outputs=outputs, opset=opset)
    except NotConvertible:
        # A first call that registers a buffer cannot be traced, but a second call can. If a plain
        # call registers nothing, this is not the reason.
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
            f"{type(module).__name__} has {len(model.graph.output)} outputs, but the names are"
            f" {list(outputs)}"
        )
    version = next(item.version for item in model.opset_import if item.domain == "")
    if version != opset:
        raise NotConvertible(
            f"{type(module).__name__} was exported with opset {version}: the exporter cannot use"
            f" opset {opset} for it"
        )
    for proto in (model, converted.unoptimised):
        _order_loops(proto.graph)
        _rename_inner_values(proto.graph)
        _rename_outputs(proto.graph, outputs)
        _name_nodes_after_modules(proto)
        _strip(proto)
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
                output_names=[f"{_TEMPORARY_NAME}{index}" for index in range(len(outputs))],
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
            assert program is not None, "the dynamo exporter returns a program"
            _separate_names(program.model.graph)
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


def _separate_names(graph: Any) -> None:
    """Rename outputs of nodes that have the name of a weight or an input (an onnx_ir graph).

    ONNX allows each name one meaning.
    """
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
    """The largest size of each axis for which the trace holds, and the other conditions."""
    exported = program.exported_program
    assert exported is not None, "the dynamo exporter keeps what it traced"
    axes: dict[Any, str] = {}  # by sympy's symbol
    bounds: dict[str, int] = {}
    expressions: dict[Any, None] = {}  # an ordered set
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        for index, axis in dynamic_axes.get(node.name, {}).items():
            size = node.meta["val"].shape[index]
            if not isinstance(size, torch.SymInt):  # the trace made the axis a fixed size
                continue
            symbol, environment = size.node.expr, size.node.shape_env
            if symbol.is_Symbol:
                axes.setdefault(symbol, axis)
            limits = exported.range_constraints.get(symbol)
            if limits is not None and limits.upper.is_Integer and limits.upper < _UNBOUNDED:
                bounds[axis] = int(limits.upper)
            expressions |= dict.fromkeys(guard.expr for guard in environment.guards)
            for assertions in environment.deferred_runtime_asserts.values():
                expressions |= dict.fromkeys(assertion.expr for assertion in assertions)

    # A condition on sizes that no input has cannot be tested from outside of the module.
    conditions = []
    for expression in expressions:
        symbols = expression.free_symbols
        if symbols and symbols <= axes.keys():
            symbol_axes = {symbol: axes[symbol] for symbol in symbols}
            conditions.append(Condition(expression=expression, axes=symbol_axes))
    return bounds, tuple(conditions)


def _order_loops(graph: onnx.GraphProto) -> None:
    """Sort the values that a loop carries by where its body reads them first.

    onnxscript takes them from a set, and the order of a set differs from process to process.
    """
    for node in graph.node:
        bodies = list(bodies_of(node))
        for body in bodies:
            _order_loops(body)
        if node.op_type != "Loop" or node.domain or len(bodies) != 1:
            continue
        # The inputs of a Loop are the trip count, the condition and the carried values; those of
        # its body the iteration number, the condition and the carried values. The outputs of the
        # body begin with the condition.
        body, count = bodies[0], len(node.input) - 2
        reads = list(dict.fromkeys(names_read(body)))
        names = [item.name for item in body.input[2:]]
        # Values that the body does not read come last, in their old order: sorting is stable.
        first_reads = [reads.index(name) if name in reads else len(reads) for name in names[:count]]
        order = sorted(range(count), key=first_reads.__getitem__)

        inputs, outputs = list(node.input[2:]), list(node.output)
        node.input[2:] = [inputs[index] for index in order]
        node.output[:count] = [outputs[index] for index in order]
        for values, offset in ((body.input, 2), (body.output, 1)):
            before = [copy.deepcopy(item) for item in values]
            for new_index, old_index in enumerate(order):
                values[offset + new_index].CopyFrom(before[offset + old_index])


def _rename_inner_values(graph: onnx.GraphProto) -> None:
    """Name the values of a graph with loops or branches after the nodes that define them.

    onnxscript numbers them in the order of a set. A graph without bodies stays as it is.
    """
    new_names: dict[str, str] = {}
    fixed_names = {item.name for item in (*graph.input, *graph.output, *graph.initializer)}
    has_bodies = False
    for index, node in enumerate(graph.node):
        # What the node and the bodies in it define.
        names = list(node.output)
        pending = list(bodies_of(node))
        has_bodies = has_bodies or bool(pending)
        while pending:
            body = pending.pop()
            names += [item.name for item in (*body.input, *body.initializer)]
            for step in body.node:
                names += step.output
                pending += bodies_of(step)
        for number, name in enumerate(names):
            if name and name not in fixed_names:
                new_names.setdefault(name, f"{node.op_type}_{index}_{number}")
    if not has_bodies:
        return
    _rename(graph, new_names)
    value_infos = sorted(graph.value_info, key=lambda item: item.name)
    del graph.value_info[:]
    graph.value_info.extend(value_infos)


def _rename_outputs(graph: onnx.GraphProto, outputs: Sequence[str]) -> None:
    """Give the outputs these names; an inner value that has one of them gets a number."""
    inner_names = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        inner_names.update(node.output)
    new_names: dict[str, str] = {}
    for output, name in zip(graph.output, outputs, strict=True):
        new_names[output.name] = name
        if name in inner_names:
            count = 1
            while f"{name}_{count}" in {*inner_names, *outputs, *new_names.values()}:
                count += 1
            new_names[name] = f"{name}_{count}"
    _rename(graph, new_names)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in the bodies of its nodes, which read them too."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for body in bodies_of(node):
            _rename(body, names)


def _name_nodes_after_modules(model: onnx.ModelProto) -> None:
    for index, node in enumerate(model.graph.node):
        scopes: list[str] = []
        for item in node.metadata_props:
            if item.key == _SCOPES:
                scopes = ast.literal_eval(item.value)  # from the root to the operator itself
                break
        path = scopes[-2] if len(scopes) > 1 else ""
        # torch's strict mode puts the path to the replaced `forward` in front of the module's own.
        node.name = f"{path.rpartition('.__self__.')[2]}/{node.op_type}_{index}"


def _strip(message: Message) -> None:
    """Remove the exporter's notes at any depth: stack traces, paths of this machine, and texts that
    vary.
    """
    for item, value in message.ListFields():
        if item.name in ("metadata_props", "doc_string"):
            message.ClearField(item.name)
        elif item.message_type is not None:
            is_repeated = isinstance(value, Sequence) or hasattr(value, "add")
            for part in value if is_repeated else (value,):
                _strip(part)
