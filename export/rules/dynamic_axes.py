"""Rule dynamic-axes: every axis that was declared dynamic can vary, in the graph and when it
runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, product

import numpy as np
import numpy.typing as npt
from torch import Tensor

from evalmode.bundle.certificate import (
    Finding,
    Record,
    Severity,
    relative_difference,
    scale_of,
)
from evalmode.bundle.errors import ModelRunFailed
from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.axes import Sample, shapes_of, sizes_of
from evalmode.export.inputs.resize import keeps_masks, resized
from evalmode.export.module.forward import as_tensors
from evalmode.export.rules.parity import limits_of, mend_padding
from evalmode.export.rules.subject import Subject

RULE = "dynamic-axes"

_FIX = "compute with x.shape, not with sizes that were numbers when the module was traced"
_FIX_BRANCH = (
    "remove branches that depend on a size (make a table for the longest input in the constructor),"
    " or let the module raise an error for sizes beyond the branch"
)

# For each condition of the trace, this many inputs that break it are tried.
_BREAKING_INPUTS = 3
# The sizes and combinations of sizes that are searched for them.
_SEARCHED_SIZES = range(1, 65)
_SEARCHED_COMBINATIONS = 4096
# Elements. A larger input would take long to make and to run, so it is skipped.
_LARGEST_INPUT = 1 << 24


def check(subject: Subject) -> Record:
    """Fail for an axis that the exporter fixed, and for sizes that the graph does not support.

    1. An axis has a fixed size in the graph's signature.
    2. The module reads a probe and the graph refuses it, or answers with another shape.
    3. The graph is valid up to a size, and the module also reads larger ones.
    4. The module's code takes another branch than the traced one for some sizes, and its answers
       differ from the graph's there, padding aside.

    Not applicable where no axis was declared dynamic.
    """
    axes = subject.evidence.dynamic_axes
    axis_count = sum(len(names) for names in axes.values())
    if not axis_count:
        return Record.not_applicable(RULE, "no axis was declared to vary")
    findings: list[Finding] = []

    for value in subject.graph.proto.graph.input:
        sizes = value.type.tensor_type.shape.dim
        for index, axis in axes.get(value.name, {}).items():
            if index >= len(sizes):
                findings.append(_error(value.name, f"axis {index} ({axis}) is absent in the graph"))
            elif sizes[index].HasField("dim_value"):
                size = sizes[index].dim_value
                findings.append(_error(value.name, f"axis {index} ({axis}) is {size} in the graph"))

    for probe in subject.evidence.probes:
        try:
            answers = subject.served.run(probe)
        except ModelRunFailed as error:
            # ONNX Runtime puts the status code and the node in front of the reason.
            reason = str(error).rpartition(" : ")[2].strip()
            why = f"the module reads {shapes_of(probe)}, the graph does not: {reason}"
            findings.append(_error("", why))
            continue
        for name, reference in subject.reference(probe).items():
            if reference.shape != answers[name].shape:
                why = (
                    f"its shape is {list(answers[name].shape)} for {shapes_of(probe)},"
                    f" the module's is {list(reference.shape)}"
                )
                findings.append(_error(name, why))

    sample = as_tensors(subject.evidence.probes[0])
    for axis, bound in subject.export.bounds.items():
        larger = _as_arrays(resized(sample, axes, {axis: bound + 1}))
        try:
            subject.reference(larger)
        except Exception:  # the user's own code: the module ends where the graph does
            continue
        why = f"the graph is valid for {axis} up to {bound}, and the module also reads {bound + 1}"
        findings.append(Finding(severity=Severity.ERROR, why=why, fix=_FIX_BRANCH))

    findings += _untraced_branches(subject, sample)
    bounds = "".join(f", {axis} at most {bound}" for axis, bound in subject.export.bounds.items())
    return Record.of(
        RULE,
        findings,
        fine="every declared axis varies",
        otherwise="an axis that was declared to vary is fixed in the graph",
        measured=f"{axis_count} axes, {len(subject.evidence.probes)} shapes{bounds}",
        limit="0 fixed",
    )


def _untraced_branches(subject: Subject, sample: Sample) -> Iterator[Finding]:
    """An error for each condition of the trace without which the graph's answers differ from the
    module's.

    A trace assumes conditions on sizes (`length != 11`). The probes may not break them, so this
    function makes inputs that do.
    """
    axes = subject.evidence.dynamic_axes
    limit = limits_of(subject.graph.proto).difference
    for condition in subject.export.conditions:
        # The sizes to try: the numbers in the condition and their neighbours first, then small
        # ones. Several axes share the number of combinations.
        sizes = sizes_of(sample, axes)
        names = sorted(set(condition.axes.values()))
        neighbours = {number + step for number in condition.numbers for step in (0, 1, -1)}
        candidates = dict.fromkeys([*sorted(neighbours), *_SEARCHED_SIZES])
        most = int(_SEARCHED_COMBINATIONS ** (1 / len(names)))
        sizes_to_try = sorted([size for size in candidates if size > 0][:most])
        combinations = (
            dict(zip(names, choice, strict=True))
            for choice in product(sizes_to_try, repeat=len(names))
        )
        breaking = (changes for changes in combinations if not condition.holds(sizes | changes))

        for changes in islice(breaking, _BREAKING_INPUTS):
            changed = resized(sample, axes, changes)
            inputs = _as_arrays(changed)
            is_too_large = max(array.size for array in inputs.values()) > _LARGEST_INPUT
            if is_too_large or not keeps_masks(sample, changed):
                continue
            try:
                expected = subject.reference(inputs)
            except Exception:  # the user's own code, which does not read these sizes
                continue
            try:
                answers = subject.served.run(inputs)
            except ModelRunFailed:
                answers = {}
            is_different = False
            for name, reference in expected.items():
                if name not in answers or _differs(
                    subject, inputs, reference, answers[name], limit=limit
                ):
                    is_different = True
                    break
            if is_different:
                where = ", ".join(f"{name} = {size}" for name, size in changes.items())
                why = (
                    f"the graph is valid where {condition}, and the module takes another branch at"
                    f" {where}"
                )
                yield Finding(severity=Severity.ERROR, why=why, fix=_FIX_BRANCH)
                break


def _differs(
    subject: Subject,
    inputs: Tensors,
    expected: npt.NDArray[np.generic],
    actual: npt.NDArray[np.generic],
    *,
    limit: float,
) -> bool:
    """Whether the graph's answer differs from the module's anywhere but at padding."""
    if relative_difference(actual, expected) <= limit:
        return False
    mended = mend_padding(
        subject.reference, inputs, expected, actual, limit=limit, deviation=scale_of(expected)
    )
    return mended is None or relative_difference(mended.answer, expected) > limit


def _as_arrays(sample: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in sample.items()}


def _error(node: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, why=why, fix=_FIX)
