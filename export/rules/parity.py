"""Rule parity: the graph gives the same answers as the eval module, up to rounding, at both ends of
every dynamic axis.

The order of decisions:

1. The limits follow from the graph's precision: fp32, fp32 with a DFT, fp16 or int8.
2. Where the graph differs at padding alone, the module's answer replaces the graph's there, and a
   warning says so. The module itself ignores its answers at padding.
3. A shape, a type or a whole number that differs is an error, and nothing else is compared.
4. Per output: the largest difference, and for labels the share that flip and the divergence.
5. If the module without PyTorch's fast path for attention gives no errors, the advice names that
   path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from scipy.special import log_softmax  # type: ignore[import-untyped, unused-ignore]

from evalmode.bundle.certificate import (
    TOLERANCE,
    Finding,
    Record,
    Severity,
    relative_difference,
    scale_of,
)
from evalmode.bundle.known_answers import Run, Tensors
from evalmode.export.inputs.padding import (
    Padding,
    Positions,
    at_positions,
    axes_of_positions,
    padding_at,
)
from evalmode.export.rules.subject import Subject

RULE = "parity"

_FIX = (
    "compare the answers layer by layer on one sample: the graph computes another function than the"
    " module"
)
_FIX_FAST_PATH = (
    "the difference comes from PyTorch's fast path for inference: nn.TransformerEncoder then"
    " returns 0 at padding, and the graph does not; exclude padding from what is computed from its"
    " output, or switch the fast path off: torch.backends.mha.set_fastpath_enabled(False)"
)
_FIX_PADDING = "ignore the answers at padding, as the module itself does"

_Array = npt.NDArray[np.generic]
# For each probe, the module's answer and the graph's.
_Pairs = Sequence[tuple[Tensors, Tensors]]


@dataclass(frozen=True, kw_only=True)
class PrecisionLimits:
    """How far the answers of a graph of some precision may be from its module's.

    difference    max |graph - module| over the standard deviation of the module's output
    agreement     the share of labels that must be equal
    divergence    mean Kullback-Leibler divergence of the softmax, in nats
    """

    precision: str
    difference: float
    agreement: float
    divergence: float


# A clean 4-layer encoder measured 1.5e-3 in fp16 and 5.3e-2 in int8. A leak of p = 0.001 causes
# 8.2e-3. So below fp32 these limits cannot show that dropout is absent. Other rules show that.
FP32 = PrecisionLimits(precision="fp32", difference=TOLERANCE, agreement=1.0, divergence=1e-9)
# ONNX Runtime's DFT is 2.2e-5 from torch's at lengths that are no powers of two.
FOURIER = PrecisionLimits(precision="fp32 DFT", difference=1e-4, agreement=1.0, divergence=1e-8)
FP16 = PrecisionLimits(precision="fp16", difference=2e-2, agreement=0.995, divergence=1e-4)
INT8 = PrecisionLimits(precision="int8", difference=0.5, agreement=0.97, divergence=1e-2)

_HALF_TYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_INTEGER_OPS = (
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
)


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """One output over all probes; a label is the index of the largest number of a row.

    difference    as in PrecisionLimits
    labels        all labels
    flipped       labels that differ
    sure          labels that no error of this size can flip: 2 max|d| is below the margin
    divergence    the largest of all probes
    """

    difference: float
    labels: int
    flipped: int
    sure: int
    divergence: float


def check(subject: Subject) -> Record:
    """Fail when an output differs from the module's by more than the graph's precision explains.

    The module runs as it is used: in PyTorch's inference mode, with its fast path. Differences are
    counted in standard deviations of the output over all probes, because one row's own deviation
    may be arbitrarily small.
    """
    limits = limits_of(subject.graph.proto)
    pairs, warnings = _without_padding(subject, limits.difference)
    findings, figures = _compare(subject, pairs, limits)
    if findings:
        probes = zip(subject.probes, subject.answers, strict=True)
        plain = [(subject.reference(probe, plain=True), answer) for probe, (_, answer) in probes]
        plain_findings, _ = _compare(subject, plain, limits)
        if not plain_findings:
            findings = [item.model_copy(update={"fix": _FIX_FAST_PATH}) for item in findings]

    worst = max((item.difference for item in figures.values()), default=float("inf"))
    labels = sum(item.labels for item in figures.values())
    flipped = sum(item.flipped for item in figures.values())
    sure = sum(item.sure for item in figures.values())
    flips = f"{1 - limits.agreement:.1%} flipped, KL {limits.divergence:g}"
    if limits.agreement == 1:
        flips = "0 flipped"
    return Record.of(
        RULE,
        [*findings, *warnings],
        fine=(
            "the graph answers as the module in eval mode, under torch.inference_mode() with"
            " PyTorch's fast path"
        ),
        otherwise="the graph's answers differ from the module's",
        measured=(
            f"{worst:.2e} standard deviations, {flipped} of {labels} labels flipped, {sure} cannot;"
            f" {len(pairs)} shapes"
        ),
        limit=f"{limits.precision}: {limits.difference:g}, {flips}",
    )


def limits_of(model: onnx.ModelProto) -> PrecisionLimits:
    """The limits for a model's precision, by its operators and the types of its weights."""
    operators = {node.op_type for node in model.graph.node}
    if not operators.isdisjoint(_INTEGER_OPS):
        return INT8
    # A scalar is a constant of the code, not a weight.
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.dims}
    if not types.isdisjoint(_HALF_TYPES):
        return FP16
    return FOURIER if "DFT" in operators else FP32


def _compare(
    subject: Subject, pairs: _Pairs, limits: PrecisionLimits
) -> tuple[list[Finding], dict[str, _Figures]]:
    """The differences beyond the limits, and the figures of each output.

    There are no figures where a shape, a type or a whole number differs.
    """
    findings: list[Finding] = []
    for reference, answer in pairs:
        for name, expected in reference.items():
            actual = answer[name]
            is_whole = not np.issubdtype(expected.dtype, np.inexact)
            if expected.shape != actual.shape:
                why = f"shape {list(actual.shape)}, the module's is {list(expected.shape)}"
                findings.append(_error(name, why))
            elif expected.dtype != actual.dtype:
                why = f"type {actual.dtype}, the module's is {expected.dtype}"
                findings.append(_error(name, why))
            elif is_whole and not np.array_equal(expected, actual):
                findings.append(_error(name, "whole numbers differ from the module's"))
    if findings:
        return list(dict.fromkeys(findings)), {}

    with np.errstate(invalid="ignore"):  # answers that are not finite are compared too
        figures = {name: _figures_of(pairs, name) for name in pairs[0][0]}
    for index, (name, item) in enumerate(figures.items()):
        # `not <=` in place of `>`: a NaN is beyond every limit.
        if not item.difference <= limits.difference:
            findings.append(
                _error(
                    name,
                    f"it differs by {item.difference:.2e} standard deviations,"
                    f" {limits.difference:g} are allowed",
                )
            )
        # Labels are the first output's.
        if index > 0 or not subject.evidence.labelled:
            continue
        if item.flipped > (1 - limits.agreement) * item.labels:
            findings.append(_error(name, f"{item.flipped} of {item.labels} labels flip"))
        if not item.divergence <= limits.divergence:
            findings.append(
                _error(
                    name,
                    f"the probabilities diverge by {item.divergence:.2e} nats,"
                    f" {limits.divergence:g} are allowed",
                )
            )
    return list(dict.fromkeys(findings)), figures


def _figures_of(pairs: _Pairs, name: str) -> _Figures:
    """Compare one output over all probes."""
    all_expected = np.concatenate([_rows_of(reference[name]) for reference, _ in pairs], axis=None)
    all_actual = np.concatenate([_rows_of(answer[name]) for _, answer in pairs], axis=None)
    labels = flipped = sure = 0
    largest_divergence = 0.0
    for reference, answer in pairs:
        expected, actual = _rows_of(reference[name]), _rows_of(answer[name])
        if expected.size == 0 or expected.shape[-1] < 2:
            continue  # no row has two numbers to choose between
        labels += len(expected)
        flipped += int(np.sum(expected.argmax(-1) != actual.argmax(-1)))

        # By how much the largest number of each row exceeds the second.
        top_two = np.partition(expected, -2, axis=-1)[:, -2:]
        margin = np.nan_to_num(top_two[:, 1] - top_two[:, 0])
        sure += int(np.sum(2 * np.abs(expected - actual).max(-1) < margin))

        # KL(softmax(expected) || softmax(actual)) of each row.
        log_p, log_q = log_softmax(expected, axis=-1), log_softmax(actual, axis=-1)
        divergence = np.nansum(np.exp(log_p) * (log_p - log_q), axis=-1)
        largest_divergence = max(largest_divergence, float(np.mean(divergence)))
    return _Figures(
        difference=relative_difference(all_actual, all_expected),
        labels=labels,
        flipped=flipped,
        sure=sure,
        divergence=largest_divergence,
    )


def _rows_of(array: _Array) -> npt.NDArray[np.float64]:
    """An output as rows of float64 over its last axis."""
    values = array.astype(np.float64)
    return values.reshape(-1, values.shape[-1] if values.ndim and values.size else 1)


def _error(node: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, why=why, fix=_FIX)


@dataclass
class _PaddingFigures:
    """Where an output differs at the padding that one mask marks, over all probes."""

    differing: int = 0
    positions: int = 0
    worst: float = 0.0


def _without_padding(subject: Subject, limit: float) -> tuple[_Pairs, list[Finding]]:
    """The answers to compare, and a warning for each output that differs at padding alone.

    Where the graph differs from the module at padding, the graph's answer is replaced by the
    module's.
    """
    pairs: list[tuple[Tensors, Tensors]] = []
    # By output and mask.
    totals: dict[tuple[str, str], _PaddingFigures] = {}

    # The standard deviation of each output over all probes.
    deviations: dict[str, float] = {}
    for name in subject.answers[0][0]:
        references = [_rows_of(reference[name]).reshape(-1) for reference, _ in subject.answers]
        deviations[name] = scale_of(np.concatenate(references))

    for probe, (reference, answer) in zip(subject.probes, subject.answers, strict=True):
        compared = dict(answer)
        for name, expected in reference.items():
            actual = answer[name]
            mended = mend_padding(
                subject.reference, probe, expected, actual, limit=limit, deviation=deviations[name]
            )
            if mended is not None:
                compared[name] = mended.answer
                total = totals.setdefault((name, mended.padding.mask), _PaddingFigures())
                total.differing += int(mended.positions.sum())
                total.positions += mended.positions.size
                total.worst = max(total.worst, mended.worst)
        pairs.append((reference, compared))

    warnings = []
    for (name, mask), total in totals.items():
        why = (
            f"the graph's answers differ from the module's at {total.differing} of"
            f" {total.positions} positions, by up to {total.worst:.2g} standard deviations:"
            f" {mask} marks all of these as padding"
        )
        warnings.append(Finding(severity=Severity.WARNING, node=name, why=why, fix=_FIX_PADDING))
    return pairs, warnings


@dataclass(frozen=True, kw_only=True)
class MendedAnswer:
    """A graph's answer in which the module's answer replaces the positions of `padding`.

    The two differ at `positions` (B, T). `worst` is the largest difference, in standard deviations.
    """

    answer: _Array
    padding: Padding
    positions: Positions
    worst: float


def mend_padding(
    run: Run, probe: Tensors, expected: _Array, actual: _Array, *, limit: float, deviation: float
) -> MendedAnswer | None:
    """Replace the graph's answer at padding; None where it differs at other positions or nowhere.

    `run` is the module, `expected` its answer to `probe`, and `actual` the graph's. Differences of
    up to `limit` times `deviation` do not count.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return None
    if expected.dtype.kind not in "fiub" or not expected.size:
        return None
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    # `not <=` in place of `>`: a NaN differs.
    differs = ~(difference <= limit * deviation)
    if not differs.any():
        return None
    worst = float(np.nan_to_num(difference, nan=np.inf).max()) / deviation

    # The axis of the answer that holds the positions is not known. So each axis is tried that is as
    # long as the second axis of an input, or as the last axis but one.
    shapes = {array.shape[:2] for array in probe.values() if array.ndim > 1}
    shapes |= {(array.shape[0], array.shape[-2]) for array in probe.values() if array.ndim > 2}
    for shape in sorted(shapes):
        for axis in axes_of_positions(expected.shape, np.zeros(shape, bool)):
            by_position = at_positions(differs, axis)
            positions = np.any(by_position.reshape(*by_position.shape[:2], -1), axis=-1)
            if positions.all():
                continue
            padding = padding_at(run, probe, positions, limit)
            if padding is not None:
                answer = at_positions(actual.copy(), axis)
                answer[padding.positions] = at_positions(expected, axis)[padding.positions]
                return MendedAnswer(
                    answer=np.moveaxis(answer, 1, axis),
                    padding=padding,
                    positions=positions,
                    worst=worst,
                )
    return None
