"""Rule dynamic-axes: every axis that was declared to vary does, in the graph and when it runs."""

from __future__ import annotations

from collections.abc import Iterator

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.bundle.errors import ModelRunFailed
from evalmode.export.inputs.axes import resized, shapes_of
from evalmode.export.module.forward import as_tensors
from evalmode.export.rules.subject import Subject

RULE = "dynamic-axes"

_FIX_BOUND = "let no branch depend on a size, or let the module raise for sizes beyond the branch"
_FIX = "compute with x.shape, not with sizes that were numbers when the module was traced"


def check(subject: Subject) -> Record:
    """Fail for an axis that the exporter fixed, and for a size that the module reads and the graph
    does not.
    """
    declared = sum(len(places) for places in subject.evidence.dynamic_axes.values())
    if not declared:
        return Record.not_applicable(RULE, "no axis was declared to vary")
    return Record.of(
        RULE,
        [*_fixed(subject), *_refused(subject), *_beyond(subject)],
        fine="every declared axis varies",
        otherwise="an axis that was declared to vary is fixed in the graph",
        measured=f"{declared} axes, {len(subject.evidence.probes)} shapes{_bounded(subject)}",
        limit="0 fixed",
    )


def _fixed(subject: Subject) -> Iterator[Finding]:
    for value in subject.graph.proto.graph.input:
        sizes = value.type.tensor_type.shape.dim
        for place, axis in subject.evidence.dynamic_axes.get(value.name, {}).items():
            if place >= len(sizes) or sizes[place].HasField("dim_value"):
                size = sizes[place].dim_value if place < len(sizes) else "absent"
                yield _error(value.name, f"axis {place} ({axis}) is {size} in the graph")


def _refused(subject: Subject) -> Iterator[Finding]:
    for probe in subject.evidence.probes:
        try:
            answers = subject.served.run(probe)
        except ModelRunFailed as error:
            reason = str(error).rpartition(" : ")[2].strip()
            yield _error("", f"the module reads {shapes_of(probe)}, the graph does not: {reason}")
            continue
        for name, reference in subject.reference(probe).items():
            if reference.shape != answers[name].shape:
                shape, right = list(answers[name].shape), list(reference.shape)
                yield _error(
                    name, f"its shape is {shape} for {shapes_of(probe)}, the module's is {right}"
                )


def _beyond(subject: Subject) -> Iterator[Finding]:
    """A bound of the graph that is none of the module's: for larger inputs the module may do what
    was never traced.
    """
    sample = as_tensors(subject.evidence.probes[0])
    for axis, bound in subject.export.bounds.items():
        larger = {
            name: tensor.numpy()
            for name, tensor in resized(
                sample, subject.evidence.dynamic_axes, {axis: bound + 1}
            ).items()
        }
        try:
            subject.reference(larger)
        except Exception:  # the user's own code: it ends where the graph does
            continue
        why = (
            f"the graph is the module's for {axis} up to {bound}, and the module also reads"
            f" {bound + 1}"
        )
        yield Finding(severity=Severity.ERROR, why=why, fix=_FIX_BOUND)


def _bounded(subject: Subject) -> str:
    return "".join(f", {axis} at most {bound}" for axis, bound in subject.export.bounds.items())


def _error(node: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, why=why, fix=_FIX)
