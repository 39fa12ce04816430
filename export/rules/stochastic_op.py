"""Rule stochastic-op: no operator in the graph draws random numbers."""

from __future__ import annotations

from collections import deque
from functools import cache

import onnx
import onnx.defs

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.graph import Graph, NodeAt
from evalmode.export.rules.subject import Subject

RULE = "stochastic-op"

# Operators that draw nothing, although their schemas call them non-deterministic (onnx 1.23).
# Dropout draws in training mode only, and the rule training-mode judges that. A control-flow
# operator draws only if a node in its bodies does, and the graph's nodes include these. For
# AffineGrid the value is an artefact: it is derived from how the schema builds its function body.
_QUIET = {("", op) for op in ("Dropout", "If", "Loop", "Scan", "SequenceMap", "AffineGrid")}

# ONNX Runtime's own operators, for which onnx has no schema. Sampling chooses the next token by
# chance. The other two were in this domain in earlier versions.
_CONTRIB = {("com.microsoft", op) for op in ("Sampling", "RandomNormal", "RandomUniform")}

_FIX = (
    "export the module in eval mode; if it needs random numbers there, draw them outside of the"
    " module and pass them as an input"
)

# The steps of a hand-written dropout: noise is compared with the rate, the result may be cast, and
# it scales values.
_COMPARISONS = frozenset({"GreaterOrEqual", "Greater", "Less", "LessOrEqual", "Floor"})
_INTERMEDIATE = frozenset(
    {"Cast", "CastLike", "Identity", "Not", "Add", "Reshape", "Expand", "Unsqueeze"}
)
_SCALINGS = frozenset({"Mul", "Div", "Where"})
# The most values that are followed from one draw. A mask takes about five. The limit bounds the
# time where a large part of the graph reads the noise.
_FOLLOWED_VALUES = 32

# (identity of the scope, name of a value) -> the nodes that read it
_Readers = dict[tuple[int, str], list[onnx.NodeProto]]


def check(subject: Subject) -> Record:
    """Fail for every node that draws, and name its path through subgraphs and functions.

    A `seed` attribute excuses nothing: it fixes the first draw of a session, not the second.
    """
    graph = subject.graph
    findings = findings_in(graph)
    return Record.of(
        RULE,
        findings,
        fine="no operator draws random numbers",
        otherwise="operators draw random numbers",
        measured=f"{len(findings)} of {len(graph.nodes)} nodes",
        limit="0",
    )


def findings_in(graph: Graph) -> list[Finding]:
    """An error for every node of the graph that draws."""
    drawing = [at for at in graph.nodes if (at.domain, at.node.op_type) in drawing_operators()]
    readers: _Readers = {}
    scopes = {id(at.scope) for at in drawing}
    for at in graph.nodes:
        if id(at.scope) in scopes:
            for name in at.node.input:
                readers.setdefault((id(at.scope), name), []).append(at.node)

    findings = []
    for at in drawing:
        why = "it draws random numbers"
        if _is_dropout_mask(at, readers):
            why = (
                "it draws the mask of a hand-written dropout: its numbers are compared with a rate,"
                " and the result scales values"
            )
        if at.is_dead:
            why += "; it is in a function that nothing calls"
        findings.append(Finding(severity=Severity.ERROR, node=at.path, op=at.op, why=why, fix=_FIX))
    return findings


@cache
def drawing_operators() -> frozenset[tuple[str, str]]:
    """Domain and name of every operator that draws, in any opset.

    The opset of a node does not matter: an operator that draws in one opset counts as one that
    draws in any.
    """
    draws = onnx.defs.OpSchema.NodeDeterminism.NonDeterministic
    operators = {
        (schema.domain, schema.name)
        for schema in onnx.defs.get_all_schemas_with_history()
        # Present at run time, absent from onnx's type stubs.
        if schema.node_determinism == draws  # type: ignore[attr-defined]
    }
    return frozenset(operators - _QUIET | _CONTRIB)


def _is_dropout_mask(at: NodeAt, readers: _Readers) -> bool:
    """Whether the noise of a node goes through a comparison into a product or a quotient.

    RandomUniformLike -> GreaterOrEqual -> Cast -> Mul -> Div is x * (rand_like(x) >= p) / (1 - p).
    Dropout in place and dropout of whole channels have Less -> Cast -> Div -> Mul. The answer
    changes only the sentence of the finding, not the verdict.
    """
    # Values to follow, and whether a comparison lies between the draw and each. Bernoulli draws
    # zeros and ones already, so it needs none.
    pending = deque((name, at.node.op_type == "Bernoulli") for name in at.node.output)
    for _ in range(_FOLLOWED_VALUES):
        if not pending:
            break
        name, is_compared = pending.popleft()
        for reader in readers.get((id(at.scope), name), []):
            if is_compared and reader.op_type in _SCALINGS:
                return True
            if reader.op_type in _COMPARISONS | _INTERMEDIATE:
                is_mask = is_compared or reader.op_type in _COMPARISONS
                pending.extend((output, is_mask) for output in reader.output)
    return False
