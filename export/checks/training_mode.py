"""Rule training-mode: no operator with a training mode (Dropout, BatchNormalization and their kin) runs in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.graph import NodeAt, walk

RULE = "training-mode"


def check(model: onnx.ModelProto) -> Record:
    """Fail where a node trains; unproven where the caller, or a value computed in the graph, decides about it."""
    verdicts = [(at, judge(at)) for at in walk(model) if (judge := _JUDGES.get((at.domain, at.node.op_type)))]
    trains = [_name(at) for at, verdict in verdicts if verdict is Verdict.FAIL]
    open_ended = [_name(at) for at, verdict in verdicts if verdict is Verdict.UNPROVEN]
    verdict, why = Verdict.PASS, "every operator that has a training mode has it off"
    if open_ended:
        verdict, why = Verdict.UNPROVEN, "the mode of an operator is not decided by the graph"
    if trains:
        verdict, why = Verdict.FAIL, "operators run in training mode"
    return Record(
        rule=RULE,
        verdict=verdict,
        why=why,
        measured=f"{len(trains)} on, {len(open_ended)} undecided, of {len(verdicts)}",
        limit="0",
        where=tuple(trains + open_ended),
    )


def _name(at: NodeAt) -> str:
    return f"{at.path} ({at.node.op_type}-{at.opset})"


def _dropout(at: NodeAt) -> Verdict:
    """ONNX Dropout: 1 and 6 by `is_test`, whose default is to train; 7 and 10 never train; 12 and later by input 2."""
    if at.opset < 7:
        return _by_flag(at, "is_test", trains_when=False)
    if at.opset < 12:
        return Verdict.PASS
    return _mode_input(at, 2)


def _mode_input(at: NodeAt, index: int) -> Verdict:
    """A mode that is an input: absent means off, and a ratio (input 1 before it) of 0 drops nothing."""
    if at.input_name(index) == "":
        return Verdict.PASS
    mode, ratio = at.constant(index), at.constant(index - 1)
    if (mode is not None and not mode.any()) or (ratio is not None and not ratio.any()):
        return Verdict.PASS
    return Verdict.UNPROVEN if mode is None else Verdict.FAIL


def _batch_normalization(at: NodeAt) -> Verdict:
    """ONNX BatchNormalization: 1 and 6 by `is_test`; 7 and 9 by asking for statistics; later by an attribute."""
    if at.opset < 7:
        return _by_flag(at, "is_test", trains_when=False)
    if at.opset < 14:
        return Verdict.FAIL if any(at.has_output(index) for index in range(1, 5)) else Verdict.PASS
    return _by_flag(at, "training_mode", trains_when=True)


def _by_flag(at: NodeAt, name: str, *, trains_when: bool) -> Verdict:
    flag = at.flag(name)
    if flag is None:
        return Verdict.UNPROVEN
    return Verdict.FAIL if flag is trains_when else Verdict.PASS


def _always(at: NodeAt) -> Verdict:
    return Verdict.FAIL


_TRAINING_BUILDS = (
    "DropoutGrad",
    "BitmaskDropoutGrad",
    "BiasSoftmaxDropout",
    "BatchNormInternal",
    "LSTMTraining",
    "GRUTraining",
)
_OPTIMIZERS = ("Gradient", "Adam", "Adagrad", "Momentum")

_JUDGES: Mapping[tuple[str, str], Callable[[NodeAt], Verdict]] = {
    ("", "Dropout"): _dropout,
    ("", "BatchNormalization"): _batch_normalization,
    ("com.microsoft", "BitmaskDropout"): lambda at: _mode_input(at, 2),
    ("com.microsoft", "BiasDropout"): lambda at: _mode_input(at, 4),
    ("com.microsoft", "BitmaskBiasDropout"): lambda at: _mode_input(at, 4),
    **{("com.microsoft", op): _always for op in _TRAINING_BUILDS},
    **{("ai.onnx.preview.training", op): _always for op in _OPTIMIZERS},
}
