"""Rule dynamic-axes: every axis that was declared to vary does, in the graph and when it runs."""

from __future__ import annotations

from collections.abc import Iterator

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.bundle.errors import ModelRunFailed
from evalmode.bundle.known_answers import Tensors
from evalmode.export.subject import Subject

RULE = "dynamic-axes"

_FIX = "compute with x.shape, not with sizes that were numbers when the module was traced"


def check(subject: Subject) -> Record:
    """Fail for an axis that the exporter fixed, and for a size that the module reads and the graph does not."""
    declared = sum(len(places) for places in subject.dynamic_axes.values())
    if not declared:
        return Record.not_applicable(RULE, "no axis was declared to vary")
    return Record.of(
        RULE,
        [*_fixed(subject), *_refused(subject)],
        fine="every declared axis varies",
        otherwise="an axis that was declared to vary is fixed in the graph",
        measured=f"{declared} axes, {len(subject.probes)} shapes",
        limit="0 fixed",
    )


def _fixed(subject: Subject) -> Iterator[Finding]:
    for value in subject.model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        for place, axis in subject.dynamic_axes.get(value.name, {}).items():
            if place >= len(sizes) or sizes[place].HasField("dim_value"):
                size = sizes[place].dim_value if place < len(sizes) else "absent"
                yield _error(value.name, f"axis {place} ({axis}) is {size} in the graph")


def _refused(subject: Subject) -> Iterator[Finding]:
    for probe in subject.probes:
        try:
            answers = subject.served.run(probe)
        except ModelRunFailed as error:
            reason = str(error).rpartition(" : ")[2].strip()
            yield _error("", f"the module reads {_shapes(probe)}, the graph does not: {reason}")
            continue
        for name, reference in subject.reference(probe).items():
            if reference.shape != answers[name].shape:
                shape, right = list(answers[name].shape), list(reference.shape)
                yield _error(name, f"its shape is {shape} for {_shapes(probe)}, the module's is {right}")


def _shapes(probe: Tensors) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in probe.items())


def _error(node: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, why=why, fix=_FIX)
