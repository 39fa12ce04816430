"""Rule training-mode: no operator trains (Dropout, BatchNormalization and their kin), and none
normalises by the statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.graph import Graph, NodeAt
from evalmode.export.graph.batch_statistics import BatchAxes, computed_over_batch
from evalmode.export.graph.scope import value_fields
from evalmode.export.rules.subject import Subject

RULE = "training-mode"

_OFF = (
    "export the module in eval mode: call .eval() on all of it, and pass training=self.training to"
    " functions"
)
_STATISTICS = "give the normalisation running statistics, and let it use them in eval mode"
_DECIDE = (
    "make the mode a constant of the graph: export in eval mode, and take the input out of the"
    " model's inputs"
)


@dataclass(frozen=True)
class _Mode:
    """What was found out about one node's mode: an error, or unproven, and why."""

    severity: Severity
    why: str


def check(subject: Subject) -> Record:
    """Fail where a node trains; unproven where the caller, or a value computed in the graph,
    decides about it.

    A normalisation whose mean and variance are computed over the batch trains as well, whatever its
    mode says.
    """
    found = findings_in(subject.graph)
    judged = sum((at.domain, at.node.op_type) in _JUDGES for at in subject.graph.nodes)
    on = sum(finding.severity is Severity.ERROR for finding in found)
    return Record.of(
        RULE,
        found,
        fine="every operator that has a training mode has it off",
        otherwise=(
            "operators run in training mode"
            if on
            else "the mode of an operator is not decided by the graph"
        ),
        measured=f"{on} on, {len(found) - on} undecided, of {judged}",
        limit="0",
    )


def findings_in(graph: Graph) -> list[Finding]:
    """An error for every node of the graph that trains, and what is unproven about the others."""
    findings = []
    axes = BatchAxes(graph.proto.graph.input)
    for at in graph.nodes:
        judge = _JUDGES.get((at.domain, at.node.op_type))
        mode = None if judge is None else judge(at)
        if mode is not None:
            fix = _OFF if mode.severity is Severity.ERROR else _DECIDE
            op = f"{at.op}-{at.opset}"
            findings.append(
                Finding(severity=mode.severity, node=at.path, op=op, why=mode.why, fix=fix)
            )
        elif axes.are_normalised(at):
            why = (
                "it completes a normalisation by the mean and variance of the batch, as in training"
            )
            findings.append(
                Finding(severity=Severity.ERROR, node=at.path, op=at.op, why=why, fix=_STATISTICS)
            )
    return findings


_NO_OPSET = _Mode(
    Severity.UNPROVEN,
    "its opset is not known: the model imports its domain not at all, or twice",
)


def _on(why: str) -> _Mode:
    return _Mode(Severity.ERROR, why)


def _dropout(at: NodeAt) -> _Mode | None:
    """ONNX Dropout: 1 and 6 by `is_test`, whose default is to train; 7 and 10 never train; 12 and
    later by input 2.
    """
    if at.opset == 0:
        return _NO_OPSET
    if at.opset < 7:
        ratio = at.attribute("ratio")
        if (
            isinstance(ratio, onnx.AttributeProto)
            and ratio.type == onnx.AttributeProto.FLOAT
            and ratio.f == 0
        ):
            return None
        return _by_is_test(at)
    if at.opset < 12:
        return None
    return _by_input(at, 2)


def _by_input(at: NodeAt, index: int) -> _Mode | None:
    """A mode that is an input: absent means off, and a ratio (input 1 before it) of 0 drops
    nothing.
    """
    if not at.has_input(index):
        return None
    mode, ratio = at.constant(index), at.constant(index - 1)
    if ratio is not None and ratio.size == 1 and not ratio.any():
        return None
    if mode is not None and (mode.size != 1 or mode.dtype != np.bool_):
        why = f"its mode is not one boolean but {mode.dtype} of shape {list(mode.shape)}"
        return _Mode(Severity.UNPROVEN, why)
    if mode is not None and not mode.any():
        return None
    if mode is None:
        return _Mode(
            Severity.UNPROVEN, f"nothing in the graph decides its mode: it is {at.decider(index)}"
        )
    rate = (
        f" at a rate of {float(ratio.reshape(-1)[0]):g}"
        if ratio is not None and ratio.size == 1
        else ""
    )
    return _on(f"its training mode is on: it drops{rate}")


def _batch_normalization(at: NodeAt) -> _Mode | None:
    """ONNX BatchNormalization: 1 and 6 by `is_test`; 7 and 9 by asking for statistics; later by an
    attribute.
    """
    if at.opset == 0:
        return _NO_OPSET
    if at.opset < 7:
        return _by_is_test(at)
    if at.opset < 14:
        if any(at.has_output(index) for index in range(1, 5)):
            return _on("it is asked for the batch's statistics, which puts it into training mode")
        return _by_statistics(at)
    return _by_training_mode(at) or _by_statistics(at)


def _by_statistics(at: NodeAt) -> _Mode | None:
    """In inference mode too it trains where its mean and variance are those of the batch."""
    computed = [computed_over_batch(at, index) for index in (3, 4)]
    if True in computed:
        return _on(
            "its mean and variance are computed in the graph over the rows of the batch: it"
            " normalises by them, as in training"
        )
    if None in computed:
        return _Mode(
            Severity.UNPROVEN,
            "its mean and variance are computed from the model's inputs: it cannot be told whether"
            " other rows have a part in them",
        )
    return None


def _by_is_test(at: NodeAt) -> _Mode | None:
    flag = at.flag("is_test")
    if flag is None:
        return _undecided(at, "is_test")
    return None if flag else _on("is_test is not set, and unless it is this operator trains")


def _by_training_mode(at: NodeAt) -> _Mode | None:
    flag = at.flag("training_mode")
    if flag is None:
        return _undecided(at, "training_mode")
    return _on("training_mode is 1: it normalises by the statistics of the batch") if flag else None


def _undecided(at: NodeAt, name: str) -> _Mode:
    attribute = next(item for item in at.node.attribute if item.name == name)
    reference, calls = attribute.ref_attr_name, at.scope.attributes
    if not reference or value_fields(attribute):
        why = "it is written in a way on which readers differ, and not as one integer"
    elif calls is None or calls.get(reference, attribute) is None:
        why = f"it is what a call gives as {reference!r}, and there is no such call"
    else:
        why = f"the call of its function gives {reference!r}, and not as one integer"
    return _Mode(Severity.UNPROVEN, f"its attribute {name} is not known here: {why}")


def _always(at: NodeAt) -> _Mode:
    return _on("it is an operator of training alone")


# What only builds of ONNX Runtime for training have, and what only a training graph is made of.
_TRAINING_BUILDS = """
    AdamOptimizer AdamWOptimizer BatchNormalizationGrad BatchNormInternal BiasSoftmaxDropout
    BitmaskDropoutGrad DropoutGrad GRUGrad GRUTraining InPlaceAccumulator InPlaceAccumulatorV2
    LambOptimizer LSTMGrad LSTMTraining SGDOptimizer SGDOptimizerV2 SoftmaxDropoutGrad
    TrainableDropout ZeroGradient
"""
_OPTIMIZERS = ("Gradient", "Adam", "Adagrad", "Momentum")

_JUDGES: Mapping[tuple[str, str], Callable[[NodeAt], _Mode | None]] = {
    ("", "Dropout"): _dropout,
    ("", "BatchNormalization"): _batch_normalization,
    # The form in which ONNX Runtime saves a model that it has laid out anew; it has the attributes
    # of opset 15.
    ("com.ms.internal.nhwc", "BatchNormalization"): _by_training_mode,
    ("com.microsoft", "BitmaskDropout"): lambda at: _by_input(at, 2),
    ("com.microsoft", "BiasDropout"): lambda at: _by_input(at, 4),
    ("com.microsoft", "BitmaskBiasDropout"): lambda at: _by_input(at, 4),
    **{("com.microsoft", op): _always for op in _TRAINING_BUILDS.split()},
    **{("ai.onnx.preview.training", op): _always for op in _OPTIMIZERS},
}
JUDGED = frozenset(_JUDGES)
TRAINS = frozenset(operator for operator, judge in _JUDGES.items() if judge is _always)
