"""Rule stochastic-op: no operator that draws random numbers stands anywhere in the graph."""

from __future__ import annotations

from functools import cache

import onnx
import onnx.defs

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.graph import Graph, NodeAt
from evalmode.export.rules.subject import Subject

RULE = "stochastic-op"

# What a schema calls non-deterministic though it draws nothing itself. Dropout draws in training
# mode only, which the rule of that name judges. Control flow is what its bodies are, and those are
# walked. AffineGrid's schema says so because of how its function body is built.
_NOT_BY_SCHEMA = {("", op) for op in ("Dropout", "If", "Loop", "Scan", "SequenceMap", "AffineGrid")}
# ONNX Runtime's own, of which onnx has no schema; it chooses the next token by chance. The others
# have had it.
_CONTRIB = {("com.microsoft", op) for op in ("Sampling", "RandomNormal", "RandomUniform")}

_FIX = (
    "export the module in eval mode; what must be random there should be drawn outside and passed"
    " in as an input"
)

_Readers = dict[tuple[int, str], list[onnx.NodeProto]]
_COMPARES = frozenset({"GreaterOrEqual", "Greater", "Less", "LessOrEqual", "Floor"})
_PASSES = frozenset(
    {"Cast", "CastLike", "Identity", "Not", "Add", "Reshape", "Expand", "Unsqueeze"}
)
_SCALES = frozenset({"Mul", "Div", "Where"})
_NEAR = 32  # values to look at from a draw


def check(subject: Subject) -> Record:
    """Fail for every node that draws; its path through subgraphs and functions is named.

    A seed changes nothing: it decides the first draw of a session, and not the second.
    """
    graph = subject.graph
    found = findings_in(graph)
    return Record.of(
        RULE,
        found,
        fine="no operator draws random numbers",
        otherwise="operators draw random numbers",
        measured=f"{len(found)} of {len(graph.nodes)} nodes",
        limit="0",
    )


def findings_in(graph: Graph) -> list[Finding]:
    """An error for every node of the graph that draws."""
    findings = []
    drawing = [at for at in graph.nodes if (at.domain, at.node.op_type) in drawing_operators()]
    readers = _readers(graph, {id(at.scope) for at in drawing})
    for at in drawing:
        why = "it draws random numbers"
        if _is_a_mask(at, readers):
            why = (
                "it draws the mask of a hand-written dropout: what it draws is compared with a rate"
                " and scales values"
            )
        if at.is_dead:
            why += "; it stands in a function that nothing calls"
        findings.append(Finding(severity=Severity.ERROR, node=at.path, op=at.op, why=why, fix=_FIX))
    return findings


@cache
def drawing_operators() -> frozenset[tuple[str, str]]:
    """Domain and name, whatever the opset: where a draw was written for another opset, it is a draw
    all the same.
    """
    draws = onnx.defs.OpSchema.NodeDeterminism.NonDeterministic
    operators = {
        (schema.domain, schema.name)
        for schema in onnx.defs.get_all_schemas_with_history()
        # Present at run time, absent from onnx's type stubs.
        if schema.node_determinism == draws  # type: ignore[attr-defined]
    }
    return frozenset(operators - _NOT_BY_SCHEMA | _CONTRIB)


def _readers(graph: Graph, scopes: set[int]) -> _Readers:
    readers: _Readers = {}
    for at in graph.nodes:
        if id(at.scope) in scopes:
            for name in at.node.input:
                readers.setdefault((id(at.scope), name), []).append(at.node)
    return readers


def _is_a_mask(at: NodeAt, readers: _Readers) -> bool:
    """Whether what is drawn goes through a comparison into a product or a quotient.

    RandomUniformLike -> GreaterOrEqual -> Cast -> Mul -> Div is x * (rand_like(x) >= p) / (1 - p);
    dropout in place and that of whole channels have Less -> Cast -> Div -> Mul. This only names
    what fails the rule anyway.
    """
    pending = [(name, at.node.op_type == "Bernoulli") for name in at.node.output]
    for _ in range(_NEAR):
        if not pending:
            break
        name, compared = pending.pop(0)
        for reader in readers.get((id(at.scope), name), []):
            if compared and reader.op_type in _SCALES:
                return True
            if reader.op_type in _COMPARES | _PASSES:
                pending += [
                    (output, compared or reader.op_type in _COMPARES) for output in reader.output
                ]
    return False
