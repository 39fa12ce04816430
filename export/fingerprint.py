"""Fingerprints of models, by which two exports of one module are compared.

Names do not count, nor does the order of independent steps. An exporter may name a constant after
the attribute that holds it or after the operator that computed it. A module that iterates over a
set runs in another order in each process. So a value is identified by a hash of its operator and of
the values that the operator reads, down to the weights. Equal networks have equal fingerprints.
Noise in a constant, or a branch that a random number chose, changes them.
"""

from __future__ import annotations

import hashlib

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
        parts.append(attribute.name)
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        if not bodies:
            parts.append(_sha256(attribute.SerializeToString(deterministic=True)))
        for body in bodies:
            # A body reads the values around it, and its own inputs by their position.
            body_values = dict(values)
            for index, item in enumerate(body.input):
                body_values[item.name] = f"body input {index}"
            for tensor in body.initializer:
                body_values[tensor.name] = _hash_weight(tensor)
            steps = sorted(_hash_node(step, body_values) for step in body.node)
            steps += [body_values[item.name] for item in body.output]
            parts.append(_sha256("\n".join(steps)))
    digest = _sha256("\n".join(parts))
    for index, name in enumerate(node.output):
        if name:
            values[name] = f"{digest} {index}"
    return digest


def _hash_weight(tensor: onnx.TensorProto) -> str:
    """The hash of a weight's type, shape and values, without its name."""
    nameless = onnx.TensorProto()
    nameless.CopyFrom(tensor)
    nameless.ClearField("name")
    return _sha256(nameless.SerializeToString(deterministic=True))


def _sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
