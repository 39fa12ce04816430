"""Rule census: every dropout site of the module is named with its rate and is absent from the
graph.
"""

from __future__ import annotations

from collections import Counter

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.export.graph import module_of
from evalmode.export.module.dropouts import declared_rate, is_dropout
from evalmode.export.module.forward import as_tensors
from evalmode.export.module.randomness import draws
from evalmode.export.module.untouched import untouched
from evalmode.export.rules.subject import Subject

RULE = "census"

_FIX = "fold its scale into the next layer's weights, or use inverted dropout, which leaves nothing"


def check(subject: Subject) -> Record:
    """Unproven for a dropout module that left nodes in the graph: a person must judge what they do.

    The sites are the dropout modules, and all other code that draws in a forward of a copy in
    training mode. The rules stochastic-op and training-mode judge whether the graph itself draws.
    """
    network = subject.network
    probes = subject.evidence.probes
    # The largest probe, because batch normalisation cannot train on a single row.
    sizes = [sum(array.size for array in probe.values()) for probe in probes]
    largest = probes[sizes.index(max(sizes))]
    try:
        # A module that cannot be copied is trained itself, and restored.
        with untouched(network):
            module = network.copy().module
            module.train()
            drawn = draws(module, as_tensors(largest))
    except Exception as error:  # the user's own code, which may not run in training mode
        why = f"the module does not run in training mode: {type(error).__name__}: {error}"
        return Record(rule=RULE, verdict=Verdict.UNPROVEN, why=why)

    sites: list[str] = []
    findings: list[Finding] = []
    nodes_of = Counter(module_of(node.name) for node in subject.graph.proto.graph.node)
    dropouts = {path: part for path, part in network.parts.items() if path and is_dropout(part)}
    for path, part in dropouts.items():
        kind, rate, node_count = type(part).__name__, declared_rate(part), nodes_of[path]
        label = kind if rate is None else f"{kind}, p={rate:g}"
        if not node_count:
            sites.append(f"{path} ({label}): absent")
            continue
        sites.append(f"{path} ({label}): {node_count} nodes left")
        why = f"this dropout left {node_count} nodes in the graph"
        findings.append(Finding(severity=Severity.UNPROVEN, node=path, op=kind, why=why, fix=_FIX))
    # Functions such as F.dropout, which belong to no dropout module.
    sites += [f"{draw}: absent" for draw in drawn if draw.path not in dropouts]
    return Record.of(
        RULE,
        findings,
        fine="every dropout site is absent from the graph",
        otherwise="dropout sites left nodes in the graph",
        measured=f"{len(sites)} sites, {len(findings)} present",
        limit="0 present",
        sites=tuple(sites),
    )
