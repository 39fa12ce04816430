"""Rule baked-noise: no random number that was drawn at export lives on as a constant of the
graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.errors import EvalmodeError
from evalmode.export.fingerprint import fingerprint
from evalmode.export.graph import Graph, graph_of, module_of
from evalmode.export.graph.suspicious_weights import mask_like
from evalmode.export.rules import stochastic_op, training_mode
from evalmode.export.rules.subject import Subject

RULE = "baked-noise"

_FIX = (
    "draw nothing in eval mode; what was drawn once and must stay belongs into a buffer of the"
    " module, not into a list, a cache or a class"
)


def check(subject: Subject) -> Record:
    """Fail for noise that the optimiser left as a constant, and for constants that differ under
    other seeds.

    The graph is read as it was before constants were folded, and compared with exports of the same
    weights under other seeds of torch, NumPy and Python. A weight that looks like a mask is a
    warning.
    """
    findings = dict.fromkeys([*_folded(subject), *_differing(subject), *glimpse(subject.graph)])
    weights = subject.graph.proto.graph.initializer
    return Record.of(
        RULE,
        findings,
        fine="exports under other seeds have the same constants",
        otherwise="random numbers of the export are constants of the graph",
        measured=f"{len(weights)} weights in {1 + len(subject.export.twins)} exports",
        limit="0 differ",
    )


def glimpse(graph: Graph) -> tuple[Finding, ...]:
    """A warning for every weight that looks like a mask, which the graph alone shows."""
    return mask_like(graph)


def _folded(subject: Subject) -> Iterator[Finding]:
    """What draws in the graph before optimisation and is gone after it."""
    if subject.export.unoptimised is None:
        return
    before, after = graph_of(subject.export.unoptimised), subject.graph
    # Names end in a number, which optimisation changes: a place is its module and operator.
    left = {
        _place(item) for rule in (stochastic_op, training_mode) for item in rule.findings_in(after)
    }
    why = (
        "it draws in the graph before optimisation: its noise may have been folded into a constant"
    )
    for finding in (*stochastic_op.findings_in(before), *training_mode.findings_in(before)):
        if finding.severity is Severity.ERROR and _place(finding) not in left:
            yield finding.model_copy(update={"why": why, "fix": _FIX})


def _place(finding: Finding) -> tuple[str, str]:
    return module_of(finding.node), finding.op


def _differing(subject: Subject) -> Iterator[Finding]:
    own = fingerprint(subject.graph.proto)
    for make in subject.export.twins:
        try:
            twin = make()
        except EvalmodeError as error:
            why = f"a second export could not be compared: {error}"
            fix = "let the factory build the same network each time, under other seeds too"
            yield Finding(severity=Severity.UNPROVEN, why=why, fix=fix)
            continue
        held = Counter(digest for _, digest in twin.weights)
        moved: list[str] = []
        for name, digest in own.weights:
            if held[digest]:
                held[digest] -= 1
            else:
                moved.append(name)
        for name in moved:
            nodes = subject.graph.proto.graph.node
            readers = ", ".join(node.name for node in nodes if name in node.input) or "nothing"
            why = f"its values differ in another export, under other seeds; it is read by {readers}"
            yield _baked(name, "weight", why)
        computed = {digest for _, digest in twin.nodes}
        others = [name for name, digest in own.nodes if digest not in computed]
        # A node behind one that differs differs too: the first is where they part.
        if others and not moved:
            yield _baked(others[0], "", "what it computes differs under other seeds")


def _baked(node: str, op: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, op=op, why=why, fix=_FIX)
