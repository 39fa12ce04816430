"""Rule dynamic-axes: every axis that was declared dynamic can vary, in the graph and when it
runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product

from evalmode.bundle.certificate import Finding, Record, Severity, relative_difference
from evalmode.bundle.errors import ModelRunFailed
from evalmode.export.inputs.axes import keeps_masks, resized, shapes_of, sizes_of
from evalmode.export.module.forward import as_tensors
from evalmode.export.rules.parity import limits_of
from evalmode.export.rules.subject import Subject

RULE = "dynamic-axes"

_FIX_BOUND = (
    "let no branch depend on a size (make a table for the longest input in the constructor), or let"
    " the module raise for sizes beyond the branch"
)
_TRIED = 3  # sizes for which a condition of the trace does not hold
_SIZES = range(1, 65)
_CHOICES = 4096
_LARGEST = 1 << 24  # elements of an input that is made for the purpose
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
        [*_fixed(subject), *_refused(subject), *_beyond(subject), *_other_ways(subject)],
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


def _other_ways(subject: Subject) -> Iterator[Finding]:
    """Sizes for which the module's own code takes another way than the one that was traced.

    A trace is made for some condition of its sizes (`length != 11`), which no probe may break. So
    inputs are made that break it, and there the graph must answer as the module does.
    """
    axes = subject.evidence.dynamic_axes
    sample = as_tensors(subject.evidence.probes[0])
    limit = limits_of(subject.graph.proto).difference
    for condition in subject.export.conditions:
        sizes = sizes_of(sample, axes)
        names = sorted(set(condition.axes.values()))
        # As many sizes of each axis as make some thousands of choices, those that it names first.
        named = {number + more for number in condition.numbers for more in (0, 1, -1)}
        most = int(_CHOICES ** (1 / len(names)))
        candidates = [size for size in dict.fromkeys([*sorted(named), *_SIZES]) if size > 0]
        choices = product(sorted(candidates[:most]), repeat=len(names))
        broken = (
            dict(zip(names, choice, strict=True))
            for choice in choices
            if not condition.holds(sizes | dict(zip(names, choice, strict=True)))
        )
        for others in islice(broken, _TRIED):
            changed = resized(sample, axes, others)
            made = {name: tensor.numpy() for name, tensor in changed.items()}
            too_large = max(array.size for array in made.values()) > _LARGEST
            if too_large or not keeps_masks(sample, changed):
                continue
            try:
                expected = subject.reference(made)
            except Exception:  # the user's own code, which does not read these sizes
                continue
            where = ", ".join(f"{name} = {size}" for name, size in others.items())
            try:
                answers = subject.served.run(made)
            except ModelRunFailed:
                answers = {}
            if any(
                name not in answers or relative_difference(answers[name], right) > limit
                for name, right in expected.items()
            ):
                why = (
                    f"the graph is the module's where {condition}, and the module takes another way"
                    f" at {where}"
                )
                yield Finding(severity=Severity.ERROR, why=why, fix=_FIX_BOUND)
                break


def _bounded(subject: Subject) -> str:
    return "".join(f", {axis} at most {bound}" for axis, bound in subject.export.bounds.items())


def _error(node: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, why=why, fix=_FIX)
