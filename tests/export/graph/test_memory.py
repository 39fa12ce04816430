"""A small file takes little memory and time to verify, even if its constants would expand to
gigabytes or its functions repeat thousands of nodes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
MOST_MB = 300  # above the memory for a trivial file
MOST_S = 30

# Prints the peak memory of this process plus that of its largest child, in MiB.
VERIFY = """
import resource, sys
from pathlib import Path
from evalmode.export.graph import runtime
from evalmode.export.verify.targets import Target
from evalmode.export.verify.verify import examine

examine(Target(path=Path(sys.argv[1])))
runtime._child.close()
kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
print(sum(resource.getrusage(kind).ru_maxrss for kind in kinds) >> 10)
"""


def node(op: str, inputs: Sequence[str], output: str, **attributes: object) -> onnx.NodeProto:
    domain = "my" if op.islower() else ""
    return helper.make_node(op, inputs, [output], domain=domain, **attributes)


def model_of(
    nodes: Iterable[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    opsets: Sequence[onnx.OperatorSetIdProto] = (),
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", [X], [Y], tensors)
    imports = [*OPSETS, *opsets]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def function(
    name: str, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str] = ("x",)
) -> onnx.FunctionProto:
    return helper.make_function("my", name, inputs, ["y"], nodes, OPSETS)


def chain(op: str, count: int) -> list[onnx.NodeProto]:
    names = ["x", *(f"v{index}" for index in range(count - 1)), "y"]
    return [node(op, [names[index]], names[index + 1]) for index in range(count)]


def drop_with_mode_of_largest(parts: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The parts, then a Dropout whose mode is the largest element of all parts."""
    return [
        *parts,
        node("Concat", [part.output[0] for part in parts], "all", axis=0),
        node("ReduceMax", ["all"], "largest", keepdims=0),
        node("Cast", ["largest"], "mode", to=TensorProto.BOOL),
        node("Dropout", ["x", "", "mode"], "y"),
    ]


def expanded_constants() -> onnx.ModelProto:
    parts = [node("Expand", ["a", "s"], f"e{index}") for index in range(400)]
    constants = {"a": np.zeros((), np.int64), "s": np.array([10_000_000])}
    return model_of(drop_with_mode_of_largest(parts), constants)


def shapes_of_a_large_weight() -> onnx.ModelProto:
    parts = [node("Shape", ["w"], f"s{index}") for index in range(800)]
    return model_of(drop_with_mode_of_largest(parts), {"w": np.zeros(900_000, np.bool_)})


def repeated_concatenation() -> onnx.ModelProto:
    parts = [node("Concat", ["a"] * 8, "c0", axis=0)]
    parts += [node("Concat", [f"c{depth - 1}"] * 8, f"c{depth}", axis=0) for depth in range(1, 500)]
    result = [node("Identity", ["c499"], "last")]
    return model_of([*parts, *drop_with_mode_of_largest(result)], {"a": np.zeros(2, np.int64)})


def long_names_around_many_nodes() -> onnx.ModelProto:
    outer = [
        function(f"f{depth}", [node(f"f{depth + 1}", ["x"], "y", name="n" * 10_000)])
        for depth in range(40)
    ]
    inner = function("f40", chain("Relu", 20_000))
    return model_of([node("f0", ["x"], "y")], functions=[*outer, inner])


def many_calls_under_many_opsets() -> onnx.ModelProto:
    opsets = [helper.make_opsetid(f"d{index}", 1) for index in range(15_000)]
    functions = [function("f", [node("Relu", ["x"], "y")])]
    return model_of(chain("f", 15_000), functions=functions, opsets=opsets)


def many_calls_of_many_inputs() -> onnx.ModelProto:
    inputs = ["x", *(f"i{index}" for index in range(15_000))]
    functions = [function("f", [node("Relu", ["x"], "y")], inputs)]
    return model_of(chain("f", 15_000), functions=functions)


def undecided_after_many_inputs() -> onnx.ModelProto:
    nodes = [
        node("Cast", ["x"], "z", to=TensorProto.INT64),
        node("Concat", ["z"] * 200_000, "wide", axis=0),
        node("Concat", ["wide"] * 1000, "wider", axis=0),
        node("Cast", ["wider"], "mode", to=TensorProto.BOOL),
        node("Dropout", ["x", "", "mode"], "y"),
    ]
    return model_of(nodes)


def peak_megabytes(model: onnx.ModelProto, path: Path) -> int:
    path.write_bytes(model.SerializeToString())
    process = subprocess.run(
        [sys.executable, "-c", VERIFY, path], capture_output=True, text=True, check=True
    )
    return int(process.stdout)


@pytest.fixture(scope="module")
def trivial_mb(tmp_path_factory: pytest.TempPathFactory) -> int:
    return peak_megabytes(
        model_of(chain("Relu", 1)), tmp_path_factory.mktemp("trivial") / "any.onnx"
    )


@pytest.mark.parametrize(
    "make",
    [
        expanded_constants,
        shapes_of_a_large_weight,
        repeated_concatenation,
        long_names_around_many_nodes,
        many_calls_under_many_opsets,
        many_calls_of_many_inputs,
        undecided_after_many_inputs,
    ],
)
def test_a_small_file_takes_little_memory(
    make: Callable[[], onnx.ModelProto], trivial_mb: int, tmp_path: Path
) -> None:
    model, started = make(), time.monotonic()
    file_mb = model.ByteSize() >> 20
    assert peak_megabytes(model, tmp_path / "any.onnx") < trivial_mb + file_mb + MOST_MB
    assert time.monotonic() - started < MOST_S
