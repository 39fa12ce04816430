"""Rule parity: the graph answers as the eval module does, to rounding, over both ends of every
dynamic axis.
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
from evalmode.export.rules.subject import Subject

RULE = "parity"

_FIX = (
    "compare the answers layer by layer: the exporter computes another function, or the module is"
    " not in eval mode"
)

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
    """
    limits = limits_of(subject.graph.proto)
    pairs = subject.answers
    findings = dict.fromkeys(_mismatches(pairs))
    with np.errstate(invalid="ignore"):  # answers that are not finite are compared too
        compared = {name: _compare(pairs, name) for name in pairs[0][0]} if not findings else {}
    first = next(iter(compared), "")
    for name, one in compared.items():
        findings |= dict.fromkeys(
            _beyond(name, one, limits, labelled=subject.evidence.labelled and name == first)
        )
    return Record.of(
        RULE,
        findings,
        fine="the graph answers as the module in eval mode",
        otherwise="the graph answers otherwise than the module",
        measured=f"{_measured(compared)}; {len(pairs)} shapes",
        limit=_limit(limits),
    )


def limits_of(model: onnx.ModelProto) -> PrecisionLimits:
    """The limits for a model's precision, which its operators and the types of its weights tell."""
    if any(node.op_type in _INTEGER_OPS for node in model.graph.node):
        return INT8
    kinds = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims)]
    return FP16 if any(kind in _HALF for kind in kinds) else FP32


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
