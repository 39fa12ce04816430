"""What two exports of one module are compared by: a hash of every weight and of every node. Knows
no rule.

Exporters name weights and nodes in the order of the trace, so equal modules give equal
fingerprints; noise that was baked into a constant, or a branch that a random number chose, does
not.
"""

from __future__ import annotations

import hashlib

import onnx
from pydantic import BaseModel, ConfigDict


class Fingerprint(BaseModel):
    """By name, the sha256 of every weight of the main graph; and every node in order, with its
    name.
    """

    model_config = ConfigDict(frozen=True)

    weights: dict[str, str]
    nodes: tuple[tuple[str, str], ...]


def fingerprint(model: onnx.ModelProto) -> Fingerprint:
    """The fingerprint of a model whose weights are in it."""
    return Fingerprint(
        weights={tensor.name: _sha256(tensor) for tensor in model.graph.initializer},
        nodes=tuple((node.name, _sha256(node)) for node in model.graph.node),
    )


def _sha256(message: onnx.TensorProto | onnx.NodeProto) -> str:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()
