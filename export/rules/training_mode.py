"""Rule training-mode: no operator trains (Dropout, BatchNormalization and their kin), and none
normalises by the statistics of the batch.

What decides whether an operator trains:

    Dropout               opset 1 and 6: the attribute `is_test`, by default 0 (it trains);
                          7 and 10: it never trains; 12 and later: input 2
    BatchNormalization    opset 1 and 6: `is_test`; 7 and 9: whether statistics are outputs;
                          14 and later: the attribute `training_mode`
    com.microsoft         BitmaskDropout, BiasDropout and BitmaskBiasDropout: their last input;
                          the operators of training builds always train

A normalisation by the mean and variance of the batch trains as well, whatever its mode is.
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

_FIX_TRAINS = (
    "export the module in eval mode: call .eval() on all of it, and pass training=self.training to"
    " functions"
)
_FIX_STATISTICS = "give the normalisation running statistics, and let it use them in eval mode"
_FIX_UNDECIDED = (
    "make the mode a constant of the graph: export in eval mode, and remove the mode from the"
    " model's inputs"
)


@dataclass(frozen=True)
class _Problem:
    """A node that trains (an error), or whose mode the graph does not decide (unproven)."""

    severity: Severity
    why: str


def check(subject: Subject) -> Record:
    """Fail where a node trains, or normalises by the statistics of the batch.

    Unproven where the caller, or a value computed in the graph, decides the mode.
    """
    findings = findings_in(subject.graph)
    judged = sum((at.domain, at.node.op_type) in JUDGED for at in subject.graph.nodes)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    otherwise = "the mode of an operator is not decided by the graph"
    if errors:
        otherwise = "operators run in training mode"
    return Record.of(
        RULE,
        findings,
        fine="every operator that has a training mode has it off",
        otherwise=otherwise,
        measured=f"{errors} on, {len(findings) - errors} undecided, of {judged}",
        limit="0",
    )


def findings_in(graph: Graph) -> list[Finding]:
    """An error for every node that trains, and an unproven for every node that may train."""
    findings = []
    batch_axes = BatchAxes(graph.proto.graph.input)
    for at in graph.nodes:
        judge = _JUDGES.get((at.domain, at.node.op_type))
        problem = None if judge is None else judge(at)
        if problem is not None:
            fix = _FIX_TRAINS if problem.severity is Severity.ERROR else _FIX_UNDECIDED
            op = f"{at.op}-{at.opset}"
            findings.append(
                Finding(severity=problem.severity, node=at.path, op=op, why=problem.why, fix=fix)
            )
        elif batch_axes.are_normalised(at):
            why = (
                "it completes a normalisation by the mean and variance of the batch, as in training"
            )
            findings.append(
                Finding(
                    severity=Severity.ERROR, node=at.path, op=at.op, why=why, fix=_FIX_STATISTICS
                )
            )
    return findings


def _error(why: str) -> _Problem:
    return _Problem(Severity.ERROR, why)


def _unproven(why: str) -> _Problem:
    return _Problem(Severity.UNPROVEN, why)


_NO_OPSET = _unproven("its opset is not known: the model imports no opset of its domain, or two")


def _judge_dropout(at: NodeAt) -> _Problem | None:
    if at.opset == 0:
        return _NO_OPSET
    if at.opset >= 12:
        return _judge_mode_input(at, 2)
    if at.opset >= 7:
        return None
    ratio = at.attribute("ratio")
    if (
        isinstance(ratio, onnx.AttributeProto)
        and ratio.type == onnx.AttributeProto.FLOAT
        and ratio.f == 0
    ):
        return None
    return _judge_is_test(at)


def _judge_mode_input(at: NodeAt, index: int) -> _Problem | None:
    """Judge a dropout by its mode, the input `index`; the input before it is the rate.

    1. Without a mode it is off.
    2. A rate of 0 drops nothing, whatever the mode is.
    3. A mode that is a constant must be one boolean, and decides.
    4. Any other mode is unproven.
    """
    if not at.has_input(index):
        return None
    mode, rate = at.constant(index), at.constant(index - 1)
    if rate is not None and rate.size != 1:
        rate = None
    if rate is not None and not rate.any():
        return None
    if mode is None:
        return _unproven(f"nothing in the graph decides its mode: it is {at.decider(index)}")
    if mode.size != 1 or mode.dtype != np.bool_:
        return _unproven(
            f"its mode is not one boolean but {mode.dtype} of shape {list(mode.shape)}"
        )
    if not mode.any():
        return None
    why = "its training mode is on: it drops"
    if rate is not None:
        why += f" at a rate of {float(rate.reshape(-1)[0]):g}"
    return _error(why)


def _judge_batch_normalization(at: NodeAt) -> _Problem | None:
    if at.opset == 0:
        return _NO_OPSET
    if at.opset < 7:
        return _judge_is_test(at)
    if at.opset >= 14:
        return _judge_training_mode(at) or _judge_statistics(at)
    # Outputs 1 to 4 are the mean and variance of the batch, running and saved.
    if any(at.has_output(index) for index in range(1, 5)):
        return _error("it returns the statistics of the batch, which puts it into training mode")
    return _judge_statistics(at)


def _judge_statistics(at: NodeAt) -> _Problem | None:
    """Judge a normalisation by where its mean and variance, inputs 3 and 4, come from."""
    computed = [computed_over_batch(at, index) for index in (3, 4)]
    if True in computed:
        return _error(
            "its mean and variance are computed in the graph over the rows of the batch, as in"
            " training"
        )
    if None in computed:
        return _unproven(
            "its mean and variance are computed from the model's inputs: whether they depend on"
            " other rows is not known"
        )
    return None


def _judge_is_test(at: NodeAt) -> _Problem | None:
    flag = at.flag("is_test")
    if flag is None:
        return _unknown_attribute(at, "is_test")
    return None if flag else _error("its attribute is_test is not set: it trains by default")


def _judge_training_mode(at: NodeAt) -> _Problem | None:
    flag = at.flag("training_mode")
    if flag is None:
        return _unknown_attribute(at, "training_mode")
    if not flag:
        return None
    return _error("training_mode is 1: it normalises by the statistics of the batch")


def _unknown_attribute(at: NodeAt, name: str) -> _Problem:
    """Why the attribute of a node, or of a call that passes it on, is not an integer."""
    attribute = next(item for item in at.node.attribute if item.name == name)
    reference, calls = attribute.ref_attr_name, at.scope.attributes
    if not reference or value_fields(attribute):
        why = "it is not written as one integer, and programs read it differently"
    elif calls is None or calls.get(reference, attribute) is None:
        why = f"a call must pass it as {reference!r}, and there is no such call"
    else:
        why = f"the call of its function does not pass {reference!r} as one integer"
    return _unproven(f"its attribute {name} is not known here: {why}")


def _always_trains(_: NodeAt) -> _Problem:
    return _error("only training graphs have this operator")


# Operators that only a training graph has; ONNX Runtime runs the first group only if it was built
# for training.
_TRAINING_BUILDS = """
    AdamOptimizer AdamWOptimizer BatchNormalizationGrad BatchNormInternal BiasSoftmaxDropout
    BitmaskDropoutGrad DropoutGrad GRUGrad GRUTraining InPlaceAccumulator InPlaceAccumulatorV2
    LambOptimizer LSTMGrad LSTMTraining SGDOptimizer SGDOptimizerV2 SoftmaxDropoutGrad
    TrainableDropout ZeroGradient
"""
_OPTIMIZERS = ("Gradient", "Adam", "Adagrad", "Momentum")

_JUDGES: Mapping[tuple[str, str], Callable[[NodeAt], _Problem | None]] = {
    ("", "Dropout"): _judge_dropout,
    ("", "BatchNormalization"): _judge_batch_normalization,
    # ONNX Runtime saves an optimised model with this operator, whose attributes are those of
    # opset 15.
    ("com.ms.internal.nhwc", "BatchNormalization"): _judge_training_mode,
    ("com.microsoft", "BitmaskDropout"): lambda at: _judge_mode_input(at, 2),
    ("com.microsoft", "BiasDropout"): lambda at: _judge_mode_input(at, 4),
    ("com.microsoft", "BitmaskBiasDropout"): lambda at: _judge_mode_input(at, 4),
    **{("com.microsoft", op): _always_trains for op in _TRAINING_BUILDS.split()},
    **{("ai.onnx.preview.training", op): _always_trains for op in _OPTIMIZERS},
}

# Domain and name: of all operators that this rule judges, and of those that always train.
JUDGED = frozenset(_JUDGES)
TRAINS = frozenset(operator for operator, judge in _JUDGES.items() if judge is _always_trains)
