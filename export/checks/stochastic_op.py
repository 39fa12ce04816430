"""Rule stochastic-op: no operator that draws random numbers stands anywhere in the graph."""

from __future__ import annotations

import onnx
import onnx.defs

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.graph import NodeAt, walk

RULE = "stochastic-op"

# What a schema calls non-deterministic though it draws nothing itself. Dropout draws in training mode only, which the
# rule of that name judges. Control flow is what its bodies are, and those are walked. AffineGrid's schema says so
# because of how its function body is built.
_NOT_BY_SCHEMA = frozenset({"Dropout", "If", "Loop", "Scan", "SequenceMap", "AffineGrid"})
_CONTRIB = frozenset({"Sampling", "RandomNormal", "RandomUniform"})


def check(model: onnx.ModelProto) -> Record:
    """Fail for every node that draws; its path through subgraphs and functions is named."""
    total, found = 0, []
    for at in walk(model):
        total += 1
        if _draws(at):
            found.append(f"{at.path} ({at.node.op_type})")
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if found else Verdict.PASS,
        why="operators draw random numbers" if found else "no operator draws random numbers",
        measured=f"{len(found)} of {total} nodes",
        limit="0",
        where=tuple(found),
    )


def _draws(at: NodeAt) -> bool:
    if at.domain == "com.microsoft":
        return at.node.op_type in _CONTRIB
    if at.domain != "" or at.node.op_type in _NOT_BY_SCHEMA:
        return False
    try:
        schema = onnx.defs.get_schema(at.node.op_type, at.opset)
    except onnx.defs.SchemaError:
        return False
    # Present at run time, absent from onnx's type stubs.
    determinism = schema.node_determinism  # type: ignore[attr-defined]
    return bool(determinism == onnx.defs.OpSchema.NodeDeterminism.NonDeterministic)
