"""Fingerprints of models, by which two exports of one module are compared.

Names do not count, nor does the order of independent steps. An exporter names one constant after
the attribute that holds it or after the operator that computed it, and a module that iterates over
a set takes another order in each process. A value is identified by a hash of its operator and of
the values that this reads, down to the weights. Equal networks have equal fingerprints. Noise in a
constant, or a branch that a random number chose, changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx
from pydantic import BaseModel, ConfigDict


class Fingerprint(BaseModel):
    """The weights and the nodes of the main graph in order, each as its name and a sha256 of what
    it holds or computes.
    """

    model_config = ConfigDict(frozen=True)

    weights: tuple[tuple[str, str], ...]
    nodes: tuple[tuple[str, str], ...]


def fingerprint(model: onnx.ModelProto) -> Fingerprint:
    """The fingerprint of a model in memory, with its weights."""
    values = {item.name: f"input {item.name}" for item in model.graph.input}
    weights: list[tuple[str, str]] = []
    for tensor in model.graph.initializer:
        values[tensor.name] = _hash_weight(tensor)
        weights.append((tensor.name, values[tensor.name]))
    nodes = [(node.name, _hash_node(node, values)) for node in model.graph.node]
    outputs = " ".join(values[item.name] for item in model.graph.output)
    return Fingerprint(weights=tuple(weights), nodes=(*nodes, ("the answers", _sha256(outputs))))


def _hash_node(node: onnx.NodeProto, values: dict[str, str]) -> str:
    """The hash of what a node computes. Its outputs are added to `values`, by name."""
    parts = [node.domain, node.op_type, node.overload, str(len(node.output))]
    parts += [values.get(name, "absent") for name in node.input]
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        parts.append(attribute.name)
        parts += [_hash_body(body, values) for body in bodies]
        if not bodies:
            parts.append(_sha256(attribute.SerializeToString(deterministic=True)))
    digest = _sha256("\n".join(parts))
    for index, name in enumerate(node.output):
        if name:
            values[name] = f"{digest} {index}"
    return digest


def _hash_body(graph: onnx.GraphProto, outer_values: Mapping[str, str]) -> str:
    values = dict(outer_values)
    for index, item in enumerate(graph.input):
        values[item.name] = f"body input {index}"
    for tensor in graph.initializer:
        values[tensor.name] = _hash_weight(tensor)
    nodes = sorted(_hash_node(node, values) for node in graph.node)
    return _sha256("\n".join([*nodes, *(values[item.name] for item in graph.output)]))


def _hash_weight(tensor: onnx.TensorProto) -> str:
    """The hash of a weight's type, shape and values, without its name."""
    nameless = onnx.TensorProto()
    nameless.CopyFrom(tensor)
    nameless.ClearField("name")
    return _sha256(nameless.SerializeToString(deterministic=True))


def _sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
