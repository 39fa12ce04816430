"""Random moves of tensors whose sizes vary: shapes, channels and bounds are those of ONNX Runtime.

Set SHAPE_GRAPHS to run more of them than the suite does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.exact.prove import Proof, prove
from evalmode.export.graph import graph_of

Array = np.ndarray[Any, Any]

COUNT = int(os.environ.get("SHAPE_GRAPHS", "400"))
PARTS = 2
LARGEST = {"n": 5, "m": 4}
LOW, HIGH = -4, 9
MOST_AXES = 4
# What a Slice may start from, and end at.
STARTS = (-6, -5, -2, -1, 0, 1, 2, 5, 2**62, -(2**62))
ENDS = (-6, -3, -1, 0, 1, 2, 3, 5, 2**62, -(2**62), 2**63 - 1)


@dataclass
class Moves:
    """A graph in the making: `ranks` has the rank of each float tensor."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def constant(self, *values: int) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values, np.int64)
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=op + name, **attributes))
        return name

    def pick(self) -> tuple[str, int]:
        """A tensor and its rank."""
        names = list(self.ranks)
        name = names[int(self.rng.integers(len(names)))]
        return name, self.ranks[name]

    def axis(self, rank: int) -> int:
        return int(self.rng.integers(rank))


def _concat(graph: Moves, x: str, rank: int) -> None:
    graph.ranks[graph.node("Concat", x, x, axis=graph.axis(rank))] = rank


def _slice(graph: Moves, x: str, rank: int) -> None:
    start, end = int(graph.rng.choice(STARTS)), int(graph.rng.choice(ENDS))
    step = int(graph.rng.choice([1, 1, 1, 2, -1, -2]))
    limits = [graph.constant(value) for value in (start, end, graph.axis(rank), step)]
    graph.ranks[graph.node("Slice", x, *limits)] = rank


def _slice_by_another_size(graph: Moves, x: str, rank: int) -> None:
    other, other_rank = graph.pick()
    end = graph.node("Shape", other, start=0, end=1) if other_rank else graph.constant(2)
    if graph.rng.random() < 0.5:
        end = graph.node("Div", end, graph.constant(2))
    limits = [graph.constant(0), end, graph.constant(graph.axis(rank))]
    graph.ranks[graph.node("Slice", x, *limits)] = rank


def _transpose(graph: Moves, x: str, rank: int) -> None:
    graph.ranks[graph.node("Transpose", x, perm=graph.rng.permutation(rank).tolist())] = rank


def _unsqueeze(graph: Moves, x: str, rank: int) -> None:
    if rank < MOST_AXES:
        axis = graph.constant(int(graph.rng.integers(-rank - 1, rank + 1)))
        graph.ranks[graph.node("Unsqueeze", x, axis)] = rank + 1


def _tile(graph: Moves, x: str, rank: int) -> None:
    repeats = graph.constant(*graph.rng.choice([0, 1, 1, 2, 3], rank).tolist())
    graph.ranks[graph.node("Tile", x, repeats)] = rank


def _pad(graph: Moves, x: str, rank: int) -> None:
    pads = graph.constant(*graph.rng.integers(0, 3, 2 * rank).tolist())
    graph.ranks[graph.node("Pad", x, pads)] = rank


def _reduce(graph: Moves, x: str, rank: int) -> None:
    op, keep = str(graph.rng.choice(["ReduceSum", "ReduceMax"])), int(graph.rng.integers(2))
    axis = graph.constant(graph.axis(rank))
    graph.ranks[graph.node(op, x, axis, keepdims=keep)] = rank if keep else rank - 1


def _reshape(graph: Moves, x: str, rank: int) -> None:
    shape = graph.node("Shape", x)
    match graph.rng.integers(3):
        case 0:
            order = graph.constant(*graph.rng.permutation(rank).tolist())
            sizes, new_rank = graph.node("Gather", shape, order, axis=0), rank
        case 1:
            size = graph.node("Gather", shape, graph.constant(graph.axis(rank)), axis=0)
            parts = [size, graph.constant(-1)]
            graph.rng.shuffle(parts)
            sizes, new_rank = graph.node("Concat", *parts, axis=0), 2
        case _:
            sizes, new_rank = graph.constant(0, -1), 2
    graph.ranks[graph.node("Reshape", x, sizes)] = new_rank


def _expand(graph: Moves, x: str, rank: int) -> None:
    if rank < MOST_AXES:
        first = graph.constant(int(graph.rng.integers(1, 3)))
        sizes = graph.node("Concat", first, graph.node("Shape", x), axis=0)
        graph.ranks[graph.node("Expand", x, sizes)] = rank + 1


def _gather(graph: Moves, x: str, rank: int) -> None:
    positions = graph.constant(*[0, -1, 0][: int(graph.rng.integers(1, 4))])
    graph.ranks[graph.node("Gather", x, positions, axis=graph.axis(rank))] = rank


def _flatten(graph: Moves, x: str, rank: int) -> None:
    graph.ranks[graph.node("Flatten", x, axis=int(graph.rng.integers(rank + 1)))] = 2


def _broadcast(graph: Moves, x: str, rank: int) -> None:
    other, other_rank = graph.pick()
    op = str(graph.rng.choice(["Add", "Max"]))
    graph.ranks[graph.node(op, x, other)] = max(rank, other_rank)


STEPS: tuple[Callable[[Moves, str, int], None], ...] = (
    _concat,
    _slice,
    _slice,
    _slice_by_another_size,
    _transpose,
    _unsqueeze,
    _tile,
    _pad,
    _reduce,
    _reshape,
    _reshape,
    _expand,
    _gather,
    _flatten,
    _broadcast,
)


def random_model(rng: np.random.Generator) -> tuple[onnx.ModelProto, int | None]:
    """A model of which all float tensors are outputs, and the size of the second axis if fixed."""
    graph = Moves(rng)
    graph.ranks[graph.node("Cast", "ids", to=TensorProto.FLOAT)] = 2
    for _ in range(int(rng.integers(2, 9))):
        x, rank = graph.pick()
        if rank:
            STEPS[int(rng.integers(len(STEPS)))](graph, x, rank)
    fixed = 4 if rng.random() < 0.5 else None
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "moves",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", fixed or "m"])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in graph.ranks],
            [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    return proto, fixed


def require_described(proof: Proof, name: str, answer: Array, sizes: dict[str, int]) -> None:
    """Assert that a tensor is as the proof says; `sizes` are those of the input's axes."""
    tensor = proof.tensors[name]
    if tensor.shape is not None:
        assert len(tensor.shape) == answer.ndim, f"{name} has the shape {answer.shape}"
        for extent, size in zip(tensor.shape, answer.shape, strict=True):
            assert extent.lowest <= size, f"{name} has the shape {answer.shape}"
            assert extent.largest is None or size <= extent.largest
            assert not extent.symbol or sizes[extent.symbol] == size
    if tensor.is_known and answer.size:
        bounds = tensor.bounds
        # Bounds of channels are compared with the channels: others do not broadcast.
        assert (answer >= bounds.low).all(), f"{name} is below its bounds"
        assert (answer <= bounds.high).all(), f"{name} is above its bounds"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.timeout(3600)
def test_shapes_and_bounds_of_channels_are_those_of_the_runtime(part: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(part)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    compared = 0
    for number in range(COUNT // PARTS):
        proto, fixed = random_model(rng)
        largest = {"n": LARGEST["n"]} if fixed else LARGEST
        proof = prove(graph_of(proto), ranges={"ids": (LOW, HIGH)}, largest=largest)
        try:
            session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # sizes that cannot fit one another
            continue
        for _ in range(4):
            rows = int(rng.integers(1, LARGEST["n"] + 1))
            columns = fixed or int(rng.integers(1, LARGEST["m"] + 1))
            ids = rng.integers(LOW, HIGH + 1, (rows, columns))
            if rng.random() < 0.5:
                ids[:] = rng.choice([LOW, HIGH])
            try:
                answers = session.run(None, {"ids": ids})
            except Exception:  # sizes that do not fit one another this time
                continue
            for output, answer in zip(proto.graph.output, answers, strict=True):
                compared += 1
                try:
                    require_described(proof, output.name, answer, {"ids:0": rows, "ids:1": columns})
                except AssertionError as error:
                    onnx.save(proto, tmp_path / "wrong.onnx")
                    raise AssertionError(f"graph {number}: {tmp_path / 'wrong.onnx'}") from error
    assert compared > 10 * COUNT // PARTS
