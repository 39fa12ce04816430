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
def child() -> Iterator[None]:
    yield
    runtime._child.close()


def model(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """The nodes, whose outputs are all outputs of the model."""
    outputs = [onnx.ValueInfoProto(name=node.output[0]) for node in nodes]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, *inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


LARGEST = np.array([2**31 - 1, 2**31 - 1, 2], np.int32)
SUM = model(node("ReduceSum", "a", keepdims=0), a=LARGEST)
# The runtime's own assertion ends the process on some slices of nothing.
ABORTS = model(
    node("Slice", "a", "start", "end", "axis", "step"),
    a=np.zeros(0, np.int64),
    start=np.array([5]),
    end=np.array([-5]),
    axis=np.array([0]),
    step=np.array([-1]),
)


def test_the_answer_is_the_runtimes_own() -> None:
    answer = runtime.compute(SUM)
    assert answer is not None
    assert (answer.dtype, answer.shape, int(answer)) == (np.int32, (), 2**31 - 1), "it saturates"


@pytest.mark.parametrize(
    "refused",
    [
        model(node("NoSuchOperator", "a"), a=LARGEST),
        model(node("Add", "a", "b"), a=LARGEST, b=np.zeros(2, np.int32)),
        model(node("Cast", "a", to=1), a=LARGEST),
        model(node("Cast", "a", output="f", to=1), node("Cast", "f", to=9), a=LARGEST),
        model(node("Expand", "a", "s"), a=np.zeros(1, np.int64), s=np.array([2000])),
        model(node("Expand", "a", "s"), a=np.zeros(1, np.int64), s=np.array([2**40])),
    ],
    ids=["unknown", "shapes", "a float", "a float on the way", "large", "too large for memory"],
)
def test_what_the_runtime_refuses_or_rounds_is_undecided_and_the_child_goes_on(
    refused: onnx.ModelProto,
) -> None:
    assert runtime.compute(refused) is None
    assert runtime.compute(SUM) is not None


def test_a_child_that_ended_is_replaced() -> None:
    assert runtime.compute(SUM) is not None
    process = runtime._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert runtime.compute(SUM) is not None
    assert runtime._child._process is not process


def test_a_graph_on_which_the_runtime_aborts_is_undecided() -> None:
    runtime.compute(ABORTS)  # undecided, or empty where this runtime does not abort
    assert runtime.compute(SUM) is not None


def test_a_child_that_hangs_is_ended_by_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.compute(SUM) is not None
    process = runtime._child._process
    assert process is not None
    monkeypatch.setattr(runtime, "TIME_S", 0.2)
    os.kill(process.pid, signal.SIGSTOP)
    assert runtime.compute(SUM) is None
    assert process.returncode == -signal.SIGKILL
