"""Rule baked-noise: no constant of the graph is a random number that was drawn at export."""

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
    "draw nothing in eval mode; keep random numbers that must stay in a buffer of the module, not"
    " in a list, a cache or a class"
)


def check(subject: Subject) -> Record:
    """Fail for noise that became a constant of the graph.

    1. An operator draws, or trains, in the graph before optimisation, and is gone after it: its
       noise may have been folded into a constant.
    2. A constant differs in an export of the same weights under other seeds of torch, NumPy and
       Python. Unproven where that export cannot be made.
    3. A weight that looks like a dropout mask is a warning.
    """
    # 1. Operators that draw before optimisation and are gone after it.
    folded: list[Finding] = []
    if subject.export.unoptimised is not None:
        before, after = graph_of(subject.export.unoptimised), subject.graph
        remaining: set[tuple[str, str]] = set()
        for rule in (stochastic_op, training_mode):
            remaining.update(map(_module_and_operator, rule.findings_in(after)))
        why = (
            "it draws in the graph before optimisation: its noise may have been folded into a"
            " constant"
        )
        for finding in (*stochastic_op.findings_in(before), *training_mode.findings_in(before)):
            is_gone = _module_and_operator(finding) not in remaining
            if finding.severity is Severity.ERROR and is_gone:
                folded.append(finding.model_copy(update={"why": why, "fix": _FIX}))

    # 2. and 3., without repetitions.
    findings = dict.fromkeys(
        [*folded, *_differences_under_other_seeds(subject), *graph_findings(subject.graph)]
    )
    weights = subject.graph.proto.graph.initializer
    return Record.of(
        RULE,
        findings,
        fine="exports under other seeds have the same constants",
        otherwise="random numbers of the export are constants of the graph",
        measured=f"{len(weights)} weights in {1 + len(subject.export.twins)} exports",
        limit="0 differ",
    )


def graph_findings(graph: Graph) -> tuple[Finding, ...]:
    """A warning for every weight that looks like a dropout mask."""
    return mask_like(graph)


def _module_and_operator(finding: Finding) -> tuple[str, str]:
    """What identifies a node in both graphs: its name ends in a number, which the optimiser
    changes.
    """
    return module_of(finding.node), finding.op


def _differences_under_other_seeds(subject: Subject) -> Iterator[Finding]:
    own = fingerprint(subject.graph.proto)
    for make_twin in subject.export.twins:
        try:
            twin = make_twin()
        except EvalmodeError as error:
            why = f"a second export could not be compared: {error}"
            fix = "let the factory build the same network each time, under other seeds too"
            yield Finding(severity=Severity.UNPROVEN, why=why, fix=fix)
            continue

        # Weights are matched by their values, because an exporter may name them differently. Each
        # weight of the twin matches one weight here.
        unmatched = Counter(digest for _, digest in twin.weights)
        differing_weights: list[str] = []
        for name, digest in own.weights:
            if unmatched[digest]:
                unmatched[digest] -= 1
            else:
                differing_weights.append(name)
        for name in differing_weights:
            nodes = subject.graph.proto.graph.node
            readers = ", ".join(node.name for node in nodes if name in node.input) or "nothing"
            why = f"its values differ in another export, under other seeds; it is read by {readers}"
            yield Finding(severity=Severity.ERROR, node=name, op="weight", why=why, fix=_FIX)

        # A node that reads a differing weight or node differs too. So nodes are reported only where
        # all weights agree, and then the first one.
        twin_digests = {digest for _, digest in twin.nodes}
        differing_nodes = [name for name, digest in own.nodes if digest not in twin_digests]
        if differing_nodes and not differing_weights:
            why = "what it computes differs under other seeds"
            yield Finding(severity=Severity.ERROR, node=differing_nodes[0], why=why, fix=_FIX)
