"""What two exports of one module are compared by: what is computed, as a set. Knows no rule.

Neither names nor the order of independent steps count: an exporter calls one constant after the
attribute that holds it or after the operator that made it, and a module that walks over a set takes
another order in each process. Each value is known by a hash of the operator that makes it and of
the values that it is made from, down to the weights. Equal networks give equal fingerprints; noise
that was baked into a constant, or a branch that a random number chose, does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx
from pydantic import BaseModel, ConfigDict


class Fingerprint(BaseModel):
    """Every weight and every node of the main graph in order: its name, and a sha256 of what it
    holds or computes.
    """

    model_config = ConfigDict(frozen=True)

    weights: tuple[tuple[str, str], ...]
    nodes: tuple[tuple[str, str], ...]


def fingerprint(model: onnx.ModelProto) -> Fingerprint:
    """The fingerprint of a model whose weights are in it."""
    values = {item.name: f"input {item.name}" for item in model.graph.input}
    weights: list[tuple[str, str]] = []
    for tensor in model.graph.initializer:
        values[tensor.name] = _held(tensor)
        weights.append((tensor.name, values[tensor.name]))
    nodes = [(node.name, _computed(node, values)) for node in model.graph.node]
    outputs = " ".join(values[item.name] for item in model.graph.output)
    return Fingerprint(weights=tuple(weights), nodes=(*nodes, ("the answers", _sha256(outputs))))


def _computed(node: onnx.NodeProto, values: dict[str, str]) -> str:
    """The hash of what a node computes, which its outputs are entered into `values` with."""
    parts = [node.domain, node.op_type, node.overload, str(len(node.output))]
    parts += [values.get(name, "absent") for name in node.input]
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        parts.append(attribute.name)
        parts += [_body(body, values) for body in bodies]
        if not bodies:
            parts.append(_sha256(attribute.SerializeToString(deterministic=True)))
    digest = _sha256("\n".join(parts))
    values.update({name: f"{digest} {place}" for place, name in enumerate(node.output) if name})
    return digest


def _body(graph: onnx.GraphProto, around: Mapping[str, str]) -> str:
    values = dict(around)
    values.update({item.name: f"body input {place}" for place, item in enumerate(graph.input)})
    values.update({tensor.name: _held(tensor) for tensor in graph.initializer})
    nodes = sorted(_computed(node, values) for node in graph.node)
    return _sha256("\n".join([*nodes, *(values[item.name] for item in graph.output)]))


def _held(tensor: onnx.TensorProto) -> str:
    """The hash of what a weight holds, without its name."""
    nameless = onnx.TensorProto()
    nameless.CopyFrom(tensor)
    nameless.ClearField("name")
    return _sha256(nameless.SerializeToString(deterministic=True))


def _sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
