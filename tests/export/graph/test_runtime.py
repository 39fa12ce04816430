"""Constants that ONNX Runtime computes in a child process: answers, refusals, aborts and limits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from evalmode.export.graph import runtime


@pytest.fixture(autouse=True)
def close_child() -> Iterator[None]:
    yield
    runtime._child.close()


def model_of(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A model of these nodes and constants, with the first output of each node as its outputs."""
    outputs = [onnx.ValueInfoProto(name=node.output[0]) for node in nodes]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, *inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


LARGEST = np.array([2**31 - 1, 2**31 - 1, 2], np.int32)
SUM = model_of(node("ReduceSum", "a", keepdims=0), a=LARGEST)
# An assertion in ONNX Runtime aborts the process on some slices of an empty tensor.
ABORTS = model_of(
    node("Slice", "a", "start", "end", "axis", "step"),
    a=np.zeros(0, np.int64),
    start=np.array([5]),
    end=np.array([-5]),
    axis=np.array([0]),
    step=np.array([-1]),
)


def test_an_integer_sum_saturates_as_in_the_runtime() -> None:
    answer = runtime.compute(SUM)
    assert answer is not None
    assert (answer.dtype, answer.shape, int(answer)) == (np.int32, (), 2**31 - 1), "it saturates"


@pytest.mark.parametrize(
    "model",
    [
        model_of(node("NoSuchOperator", "a"), a=LARGEST),
        model_of(node("Add", "a", "b"), a=LARGEST, b=np.zeros(2, np.int32)),
        model_of(node("Cast", "a", to=1), a=LARGEST),
        model_of(node("Cast", "a", output="f", to=1), node("Cast", "f", to=9), a=LARGEST),
        model_of(node("Expand", "a", "s"), a=np.zeros(1, np.int64), s=np.array([2000])),
        model_of(node("Expand", "a", "s"), a=np.zeros(1, np.int64), s=np.array([2**40])),
    ],
    ids=["unknown", "shapes", "a float", "a float on the way", "large", "too large for memory"],
)
def test_a_refused_or_rounded_computation_is_undecided_and_the_child_continues(
    model: onnx.ModelProto,
) -> None:
    assert runtime.compute(model) is None
    assert runtime.compute(SUM) is not None


def test_a_killed_child_is_replaced() -> None:
    assert runtime.compute(SUM) is not None
    process = runtime._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert runtime.compute(SUM) is not None
    assert runtime._child._process is not process


def test_a_graph_on_which_the_runtime_aborts_is_undecided() -> None:
    # Versions of the runtime without the assertion compute an empty tensor.
    runtime.compute(ABORTS)
    assert runtime.compute(SUM) is not None


def test_a_child_that_hangs_is_killed_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.compute(SUM) is not None
    process = runtime._child._process
    assert process is not None
    monkeypatch.setattr(runtime, "TIME_S", 0.2)
    os.kill(process.pid, signal.SIGSTOP)
    assert runtime.compute(SUM) is None
    assert process.returncode == -signal.SIGKILL
