"""Walking an ONNX model: every node of the main graph, of subgraphs at any depth, and of local functions.

Knows no rule. A node's path names where it stands: `loop_1/body/drop` is the node `drop` in the attribute `body`
of the node `loop_1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from evalmode.bundle.errors import EvalmodeError

_LAST_OPSET = 10_000  # far above any that exists; a larger number is damage


class ModelUnreadable(EvalmodeError):  # noqa: N818 - read as a sentence: "raise ModelUnreadable"
    """A file that is no ONNX model, or a broken one."""


@dataclass(frozen=True, kw_only=True)
class NodeAt:
    """A node, the path to it, the opset its domain has there, and the constants that are visible to it."""

    node: onnx.NodeProto
    path: str
    opset: int
    constants: Mapping[str, onnx.TensorProto]

    @property
    def domain(self) -> str:
        """The operator's domain, with ONNX's own spelled as the empty string."""
        return _domain(self.node.domain)

    def flag(self, name: str) -> bool | None:
        """Whether an integer attribute is set; None where a function's caller decides. Absent is not set."""
        found = next((item for item in self.node.attribute if item.name == name), None)
        if found is None:
            return False
        return None if found.ref_attr_name else bool(found.i)

    def has_output(self, index: int) -> bool:
        """Whether the node's optional output `index` is asked for."""
        return len(self.node.output) > index and self.node.output[index] != ""

    def input_name(self, index: int) -> str:
        """The name of input `index`, or "" where it is absent."""
        return self.node.input[index] if len(self.node.input) > index else ""

    def constant(self, index: int) -> npt.NDArray[np.generic] | None:
        """The value of input `index` where the graph alone decides it and it can be read, else None."""
        tensor = self.constants.get(self.input_name(index))
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError):  # a malformed tensor decides nothing
            return None


def read_model(data: bytes, *, name: str) -> onnx.ModelProto:
    """The model in `data`; raises ModelUnreadable, naming the file, for bytes that hold none."""
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ModelUnreadable(f"{name} is not an ONNX model: {error}") from error
    if not model.opset_import or not model.HasField("graph"):
        raise ModelUnreadable(f"{name} is not an ONNX model: it has no graph")
    for item in model.opset_import:
        if not 0 < item.version <= _LAST_OPSET:
            raise ModelUnreadable(f"{name} is not an ONNX model: opset {item.version} of domain {item.domain!r}")
    return model


def read_file(path: Path) -> onnx.ModelProto:
    """The model in the file `path`, without its external data."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror}") from error
    return read_model(data, name=str(path))


def walk(model: onnx.ModelProto) -> Iterator[NodeAt]:
    """Every node of the model, those of subgraphs and local functions included."""
    opsets = _opsets(model.opset_import)
    yield from _walk_graph(model.graph, "", opsets, {})
    for function in model.functions:
        path = f"{function.domain}:{function.name}/"
        yield from _walk_nodes(function.node, path, _opsets(function.opset_import) or opsets, {})


def _opsets(imports: object) -> dict[str, int]:
    return {_domain(item.domain): item.version for item in imports}  # type: ignore[attr-defined]


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _walk_graph(
    graph: onnx.GraphProto, path: str, opsets: Mapping[str, int], outer: Mapping[str, onnx.TensorProto]
) -> Iterator[NodeAt]:
    # An initializer that is also an input is a default which the caller may override: nothing is decided by it.
    overridable = {item.name for item in graph.input}
    own = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in overridable}
    visible = {name: tensor for name, tensor in outer.items() if name not in overridable} | own
    yield from _walk_nodes(graph.node, path, opsets, visible)


def _walk_nodes(
    nodes: object, path: str, opsets: Mapping[str, int], outer: Mapping[str, onnx.TensorProto]
) -> Iterator[NodeAt]:
    constants = dict(outer)
    for index, node in enumerate(nodes):  # type: ignore[arg-type, var-annotated]
        here = f"{path}{node.name or f'{node.op_type}_{index}'}"
        yield NodeAt(node=node, path=here, opset=opsets.get(_domain(node.domain), 0), constants=constants)
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and node.output:
                constants[node.output[0]] = attribute.t
            subgraphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for graph in subgraphs:
                yield from _walk_graph(graph, f"{here}/{attribute.name}/", opsets, constants)
