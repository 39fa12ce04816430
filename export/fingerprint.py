"""What two exports of one module are compared by: a hash of every weight and of every node. Knows
no rule.

Names are left out: an exporter calls one constant after the attribute that holds it or after the
operator that made it. A weight is known by its place in the order of first use, so equal networks
give equal fingerprints; noise that was baked into a constant, or a branch that a random number
chose, does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx
from pydantic import BaseModel, ConfigDict


class Fingerprint(BaseModel):
    """Every weight of the main graph in the order of first use, and every node in order: its name
    and a sha256.
    """

    model_config = ConfigDict(frozen=True)

    weights: tuple[tuple[str, str], ...]
    nodes: tuple[tuple[str, str], ...]


def fingerprint(model: onnx.ModelProto) -> Fingerprint:
    """The fingerprint of a model whose weights are in it."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    used = dict.fromkeys(
        name for node in graph.node for name in _names_read(node) if name in weights
    )
    order = [*used, *(name for name in weights if name not in used)]
    places = {name: f"weight {index}" for index, name in enumerate(order)}
    nodes: list[tuple[str, str]] = []
    for index, node in enumerate(graph.node):
        places |= {name: f"value {index} {place}" for place, name in enumerate(node.output)}
        nameless = onnx.NodeProto()
        nameless.CopyFrom(node)
        nameless.ClearField("name")
        _rename(nameless, places)
        nodes.append((node.name, _sha256(nameless)))
    hashes: list[tuple[str, str]] = []
    for name in order:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(weights[name])
        tensor.ClearField("name")
        hashes.append((name, _sha256(tensor)))
    return Fingerprint(weights=tuple(hashes), nodes=tuple(nodes))


def _names_read(node: onnx.NodeProto) -> list[str]:
    names = list(node.input)
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in body.node:
                names += _names_read(inner)
            names += [output.name for output in body.output]
    return names


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in body.node:
                _rename(inner, names)
            for output in body.output:
                output.name = names.get(output.name, output.name)


def _sha256(message: onnx.TensorProto | onnx.NodeProto) -> str:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()
