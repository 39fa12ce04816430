"""Rule census: every place where the module drops in training is named with its rate and is absent
from the graph.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from evalmode.bundle.certificate import Finding, Record, Severity, Verdict
from evalmode.export.graph import module_of
from evalmode.export.module.dropouts import declared_rate, is_dropout
from evalmode.export.module.forward import as_tensors
from evalmode.export.module.randomness import draws
from evalmode.export.module.untouched import untouched
from evalmode.export.rules.subject import Subject

RULE = "census"


def check(subject: Subject) -> Record:
    """Unproven for a dropout module that left nodes in the graph: what they do is for a person to
    judge.

    The sites are the modules that are a dropout, and whatever else draws in a forward of a copy in
    training mode. That the graph itself holds nothing random is the rules stochastic-op's and
    training-mode's to show.
    """
    network = subject.network
    # The largest probe: batch normalisation, for one, cannot train on a single row.
    sizes = [sum(array.size for array in probe.values()) for probe in subject.evidence.probes]
    largest = subject.evidence.probes[sizes.index(max(sizes))]
    try:
        with untouched(network):  # the module itself trains where it cannot be copied
            trained = network.copy().module
            trained.train()
            drawn = draws(trained, as_tensors(largest))
    except Exception as error:  # the user's own code, in another mode than it is exported in
        why = f"the module does not run in training mode: {type(error).__name__}: {error}"
        return Record(rule=RULE, verdict=Verdict.UNPROVEN, why=why)
    left = Counter(module_of(node.name) for node in subject.graph.proto.graph.node)
    modules = {path: part for path, part in network.parts.items() if path and is_dropout(part)}
    sites = [_module_site(path, part, left[path]) for path, part in modules.items()]
    sites += [f"{draw}: absent" for draw in drawn if draw.path not in modules]
    present = [
        Finding(
            severity=Severity.UNPROVEN,
            node=path,
            op=type(part).__name__,
            why=f"this dropout left {left[path]} nodes in the graph",
            fix=(
                "fold its scale into the next layer's weights, or use inverted dropout, which"
                " leaves nothing"
            ),
        )
        for path, part in modules.items()
        if left[path]
    ]
    return Record.of(
        RULE,
        present,
        fine="every dropout site is absent from the graph",
        otherwise="dropout sites left nodes in the graph",
        measured=f"{len(sites)} sites, {len(present)} present",
        limit="0 present",
        sites=tuple(sites),
    )


def _module_site(path: str, part: nn.Module, nodes: int) -> str:
    rate = declared_rate(part)
    named = f"{path} ({type(part).__name__}{'' if rate is None else f', p={rate:g}'})"
    return f"{named}: {f'{nodes} nodes left' if nodes else 'absent'}"
