"""Any `nn.Module` in eval mode -> an ONNX model whose bytes depend on the module alone.

Every node is named after the module it came from (`blocks.0.attention/MatMul_17`). Knows no
checkpoint and no bundle.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from evalmode.errors import EvalmodeError
from evalmode.export.module.forward import copies_of, plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import answering_tensors
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
class Converted:
    """The model as it goes into a bundle, and the graph before optimisation.

    The optimiser computes what depends on constants alone, once: also a Dropout or a Bernoulli,
    whose noise it then leaves behind as a constant. The evidence is in the graph that it was given.
    `bounds` holds, by the axis' name, the largest size for which the trace holds: beyond it the
    module's own code takes another way.
    """

    model: onnx.ModelProto
    unoptimised: onnx.ModelProto
    bounds: Mapping[str, int]


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
    if escaped := Network.of(module).in_training:
        sites = [f"{path or '(root)'} ({type(part).__name__})" for path, part in escaped.items()]
        raise NotInEvalMode(f"still in training mode, call .eval() and look at: {'; '.join(sites)}")
    if unknown := dynamic_axes.keys() - inputs.keys():
        raise ValueError(f"dynamic_axes names {sorted(unknown)}, the inputs are {list(inputs)}")
    converted = _export(module, inputs, dynamic_axes=dynamic_axes, outputs=outputs, opset=opset)
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
        with quiet_exporter(), one_operator_table(), plain_forward(), answering_tensors(module):
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
        unoptimised = program.model_proto
        program.optimize()
        model = program.model_proto
        onnx.checker.check_model(model)
        return Converted(
            model=model, unoptimised=unoptimised, bounds=_bounds(program, dynamic_axes)
        )
    except (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError) as error:
        reason = _reason(error.__cause__ or error)
        raise NotConvertible(f"{type(module).__name__} cannot be exported: {reason}") from error


def _bounds(
    program: torch.onnx.ONNXProgram, dynamic_axes: Mapping[str, Mapping[int, str]]
) -> dict[str, int]:
    exported = program.exported_program
    assert exported is not None, "the dynamo exporter keeps what it traced"
    found: dict[str, int] = {}
    for node in exported.graph.nodes:
        for place, axis in (
            dynamic_axes.get(node.name, {}).items() if node.op == "placeholder" else ()
        ):
            size = node.meta["val"].shape[place]
            known = (
                exported.range_constraints.get(size.node.expr)
                if isinstance(size, torch.SymInt)
                else None
            )
            if known is not None and known.upper.is_Integer and known.upper < _UNBOUNDED:
                found[axis] = int(known.upper)
    return found


def _reason(error: BaseException) -> str:
    """The first sentence of torch's reason; where it only announces a list, with the list's first
    item.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    more = (
        next((line for line in lines[1:] if line.startswith("- ")), "")
        if lines and lines[0].endswith(":")
        else ""
    )
    return f"{lines[0] if lines else type(error).__name__} {more}".strip()


def scope(node_name: str) -> str:
    """The path of the module that a converted model's node came from."""
    return node_name.rpartition("/")[0]


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
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename(body, names)


def _name_nodes(model: onnx.ModelProto) -> None:
    for index, node in enumerate(model.graph.node):
        found = next((item.value for item in node.metadata_props if item.key == _SCOPES), "[]")
        scopes = ast.literal_eval(found)  # from the root to the operator itself
        node.name = f"{scopes[-2] if len(scopes) > 1 else ''}/{node.op_type}_{index}"


def _strip(message: Message) -> None:
    """Remove what the exporter notes about itself: stack traces and paths of this machine, and
    texts that vary.
    """
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if isinstance(value, Sequence) or hasattr(value, "add") else (value,):
                _strip(part)
