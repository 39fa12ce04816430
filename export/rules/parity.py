"""Rule parity: the graph gives the same answers as the eval module, up to rounding, at both ends of
every dynamic axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from scipy.special import log_softmax  # type: ignore[import-untyped, unused-ignore]

from evalmode.bundle.certificate import TOLERANCE, Finding, Record, Severity, relative_difference
from evalmode.bundle.known_answers import Tensors
from evalmode.export.inputs.padding import (
    Positions,
    at_positions,
    axes_of_positions,
    padding_at,
)
from evalmode.export.rules.subject import Subject

RULE = "parity"

_FIX = (
    "compare the answers layer by layer, on one of the samples: the exporter computes another"
    " function than the module"
)
_FIX_FAST_PATH = (
    "the graph answers as the module does without PyTorch's fast path, which answers 0 at padding"
    " (nn.TransformerEncoder) and is used in inference alone: leave padding out of what is computed"
    " behind it, or switch it off beside the module: torch.backends.mha.set_fastpath_enabled(False)"
)
_REFERENCE = "under torch.inference_mode() with PyTorch's fast path"

_Array = npt.NDArray[np.generic]
_Pairs = Sequence[tuple[Tensors, Tensors]]


@dataclass(frozen=True, kw_only=True)
class PrecisionLimits:
    """How far a graph of some precision may be from its module.

    `difference`: max|d| over the reference's standard deviation. `agreement`: share of equal
    labels. `divergence`: mean Kullback-Leibler divergence of the softmax, in nats.
    """

    precision: str
    difference: float
    agreement: float
    divergence: float


# What leaves fp32 rounds: 1.5e-3 was measured for fp16 and 5.3e-2 for int8 in a clean 4-layer
# encoder, where a leak of p = .001 shows 8.2e-3. So these limits bound the damage and cannot show
# that dropout is absent: other rules do.
FP32 = PrecisionLimits(precision="fp32", difference=TOLERANCE, agreement=1.0, divergence=1e-9)
# ONNX Runtime's DFT is 2.2e-5 from torch's at lengths that are no powers of two.
FOURIER = PrecisionLimits(precision="fp32 DFT", difference=1e-4, agreement=1.0, divergence=1e-8)
FP16 = PrecisionLimits(precision="fp16", difference=2e-2, agreement=0.995, divergence=1e-4)
INT8 = PrecisionLimits(precision="int8", difference=0.5, agreement=0.97, divergence=1e-2)

_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_INTEGER_OPS = (
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """One output over all probes: max|d| in deviations, equal labels of all, KL divergence, rows
    sure not to flip.
    """

    difference: float
    equal: int
    labels: int
    divergence: float
    sure: int


def check(subject: Subject) -> Record:
    """Fail when an output is further from the module's than the graph's precision explains, or a
    label flips in fp32.

    The deviation is that of the output over all probes: one row's own may be as small as one likes.
    A shape or a type that differs is a failure and never a large number. A label is sure where 2
    max|d| is below the reference's margin.

    The module answers as it is used: in PyTorch's inference mode, with its fast path. Padding, of
    which the module takes no account elsewhere, is left out where the graph answers otherwise; a
    warning says so.
    """
    limits = limits_of(subject.graph.proto)
    pairs, warnings = _without_padding(subject, limits.difference)
    findings, compared = _differences(subject, pairs, limits)
    if findings:
        probes = zip(subject.probes, subject.answers, strict=True)
        plain = [(subject.reference(probe, plain=True), answer) for probe, (_, answer) in probes]
        if not _differences(subject, plain, limits)[0]:
            findings = [item.model_copy(update={"fix": _FIX_FAST_PATH}) for item in findings]
    return Record.of(
        RULE,
        [*findings, *warnings],
        fine=f"the graph answers as the module in eval mode, {_REFERENCE}",
        otherwise="the graph answers otherwise than the module",
        measured=f"{_measured(compared)}; {len(pairs)} shapes",
        limit=_limit(limits),
    )


def _differences(
    subject: Subject, pairs: _Pairs, limits: PrecisionLimits
) -> tuple[list[Finding], dict[str, _Compared]]:
    """What differs beyond the limits, and the figures of each output; no figures where shapes or
    types differ.
    """
    findings = list(dict.fromkeys(_mismatches(pairs)))
    if findings:
        return findings, {}
    with np.errstate(invalid="ignore"):  # answers that are not finite are compared too
        compared = {name: _compare(pairs, name) for name in pairs[0][0]}
    first = next(iter(compared), "")
    for name, figures in compared.items():
        labelled = subject.evidence.labelled and name == first
        findings += _beyond(name, figures, limits, labelled=labelled)
    return list(dict.fromkeys(findings)), compared


def limits_of(model: onnx.ModelProto) -> PrecisionLimits:
    """The limits for a model's precision, which its operators and the types of its weights tell."""
    if any(node.op_type in _INTEGER_OPS for node in model.graph.node):
        return INT8
    kinds = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims)]
    if any(kind in _HALF for kind in kinds):
        return FP16
    return FOURIER if any(node.op_type == "DFT" for node in model.graph.node) else FP32


def _without_padding(subject: Subject, limit: float) -> tuple[_Pairs, list[Finding]]:
    """The answers to compare, in which the graph's are the module's own at padding where they
    differ, and a warning for each output.
    """
    pairs: list[tuple[Tensors, Tensors]] = []
    # By output and mask: the positions that differ, all that were looked at, the largest difference
    seen: dict[tuple[str, str], tuple[int, int, float]] = {}
    spreads: dict[str, float] = {}
    for name in subject.answers[0][0]:
        references = [_rows(reference[name]).reshape(-1) for reference, _ in subject.answers]
        numbers = np.concatenate(references)
        numbers = numbers[np.isfinite(numbers)]
        spreads[name] = (float(numbers.std()) if numbers.size else 0.0) or 1.0
    for probe, (reference, answer) in zip(subject.probes, subject.answers, strict=True):
        compared = dict(answer)
        for name, right in reference.items():
            if right.shape != answer[name].shape or right.dtype != answer[name].dtype:
                continue
            for axis, differing, worst in _differing_positions(
                right, answer[name], probe, limit=limit, spread=spreads[name]
            ):
                padding = padding_at(subject.reference, probe, differing, limit)
                if padding is None:
                    continue
                mended = at_positions(answer[name].copy(), axis)
                mended[padding.positions] = at_positions(right, axis)[padding.positions]
                compared[name] = np.moveaxis(mended, 1, axis)
                count, total, largest = seen.get((name, padding.mask), (0, 0, 0.0))
                seen[name, padding.mask] = (
                    count + int(differing.sum()),
                    total + differing.size,
                    max(largest, worst),
                )
                break
        pairs.append((reference, compared))
    findings = [
        Finding(
            severity=Severity.WARNING,
            node=name,
            why=(
                f"at {count} of {total} positions, all of which {mask} marks as padding, the graph"
                f" answers otherwise than the module, by up to {worst:.2g} standard deviations"
            ),
            fix="take no account of what is answered at padding: the module itself takes none",
        )
        for (name, mask), (count, total, worst) in seen.items()
    ]
    return pairs, findings


def _differing_positions(
    right: _Array, answer: _Array, probe: Tensors, *, limit: float, spread: float
) -> Iterator[tuple[int, Positions, float]]:
    """The axis of positions, the positions (B, T) that differ, and by how much; for each reading of
    an output that differs in some places alone.
    """
    if right.dtype.kind not in "fiub" or not right.size:
        return
    with np.errstate(invalid="ignore"):
        difference = np.abs(answer.astype(np.float64) - right.astype(np.float64))
    differs = ~(difference <= limit * spread)
    if not differs.any():
        return
    worst = float(np.nan_to_num(difference, nan=np.inf).max()) / spread
    shapes = {array.shape[:2] for array in probe.values() if array.ndim > 1}
    shapes |= {(array.shape[0], array.shape[-2]) for array in probe.values() if array.ndim > 2}
    for shape in sorted(shapes):
        for axis in axes_of_positions(right.shape, np.zeros(shape, bool)):
            by_position = at_positions(differs, axis)
            positions = np.any(by_position.reshape(*by_position.shape[:2], -1), axis=-1)
            if not positions.all():
                yield axis, positions, worst


def _mismatches(pairs: _Pairs) -> Iterator[Finding]:
    for reference, answer in pairs:
        for name, right in reference.items():
            if right.shape != answer[name].shape:
                yield _error(
                    name, f"shape {list(answer[name].shape)}, the module's is {list(right.shape)}"
                )
            elif right.dtype != answer[name].dtype:
                yield _error(name, f"type {answer[name].dtype}, the module's is {right.dtype}")
            elif not np.issubdtype(right.dtype, np.inexact) and not np.array_equal(
                right, answer[name]
            ):
                yield _error(name, "whole numbers differ from the module's")


def _compare(pairs: _Pairs, name: str) -> _Compared:
    expected = np.concatenate([_rows(reference[name]) for reference, _ in pairs], axis=None)
    actual = np.concatenate([_rows(answer[name]) for _, answer in pairs], axis=None)
    equal = labels = sure = 0
    divergences = [0.0]
    for reference, answer in pairs:
        right, found = _rows(reference[name]), _rows(answer[name])
        if right.size == 0 or right.shape[-1] < 2:  # nothing to choose between
            continue
        equal += int(np.sum(right.argmax(-1) == found.argmax(-1)))
        labels += len(right)
        sure += int(np.sum(2 * np.abs(right - found).max(-1) < _margin(right)))
        divergences.append(float(np.mean(_divergence(right, found))))
    return _Compared(
        difference=relative_difference(actual, expected),
        equal=equal,
        labels=labels,
        divergence=max(divergences),
        sure=sure,
    )


def _beyond(
    name: str, one: _Compared, limits: PrecisionLimits, *, labelled: bool
) -> Iterator[Finding]:
    if not one.difference <= limits.difference:
        yield _error(
            name,
            f"it differs by {one.difference:.2e} standard deviations, {limits.difference:g} are"
            " allowed",
        )
    if not labelled:
        return
    flipped = one.labels - one.equal
    if flipped > (1 - limits.agreement) * one.labels:
        yield _error(name, f"{flipped} of {one.labels} labels flip")
    if not one.divergence <= limits.divergence:
        yield _error(
            name,
            f"the probabilities diverge by {one.divergence:.2e} nats, {limits.divergence:g} are"
            " allowed",
        )


def _rows(array: _Array) -> npt.NDArray[np.float64]:
    """An output as rows of float64 over its last axis."""
    values = array.astype(np.float64)
    return values.reshape(-1, values.shape[-1] if values.ndim and values.size else 1)


def _margin(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By how much the largest number of each row exceeds the second."""
    top = np.partition(rows, -2, axis=-1)[:, -2:]
    margin: npt.NDArray[np.float64] = np.nan_to_num(top[:, 1] - top[:, 0])
    return margin


def _divergence(
    right: npt.NDArray[np.float64], found: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """KL(softmax(right) || softmax(found)) of each row."""
    log_p, log_q = log_softmax(right, axis=-1), log_softmax(found, axis=-1)
    divergence: npt.NDArray[np.float64] = np.nansum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return divergence


def _measured(compared: dict[str, _Compared]) -> str:
    worst = max((one.difference for one in compared.values()), default=float("inf"))
    flipped = sum(one.labels - one.equal for one in compared.values())
    labels, sure = (
        sum(one.labels for one in compared.values()),
        sum(one.sure for one in compared.values()),
    )
    return f"{worst:.2e} standard deviations, {flipped} of {labels} labels flipped, {sure} cannot"


def _limit(limits: PrecisionLimits) -> str:
    flips = (
        "0 flipped"
        if limits.agreement == 1
        else f"{1 - limits.agreement:.1%} flipped, KL {limits.divergence:g}"
    )
    return f"{limits.precision}: {limits.difference:g}, {flips}"


def _error(node: str, why: str) -> Finding:
    return Finding(severity=Severity.ERROR, node=node, why=why, fix=_FIX)
