"""Weights: found and read wherever they lie, and only when asked; masks and NaN among them are told
by their values.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Severity
from evalmode.export.graph import Graph, ModelUnreadable, Weight, graph_of, open_graph, read_graph
from evalmode.export.graph.suspicious_weights import mask_like, non_finite_weights

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
TYPES = [
    number for name, number in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING")
]


def model_of(*weights: onnx.TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "main", [X], [Y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def with_values(values: object) -> Graph:
    return graph_of(model_of(numpy_helper.from_array(np.asarray(values), "w")))


def every_way(tensor: onnx.TensorProto, folder: Path) -> list[Weight]:
    """The weight of a model in memory, of its bytes, of its file, and of a file beside it."""
    model, path = model_of(tensor), folder / "whole.onnx"
    path.write_bytes(model.SerializeToString())
    found = [graph_of(model), read_graph(path.read_bytes(), name="bytes"), open_graph(path)]
    if tensor.HasField("raw_data"):
        outside = TensorProto(name="w", data_type=tensor.data_type, dims=tensor.dims)
        outside.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "w.bin"),
            ("offset", "3"),
            ("length", str(len(tensor.raw_data))),
        ):
            outside.external_data.add(key=key, value=value)
        (folder / "w.bin").write_bytes(b"abc" + tensor.raw_data)
        (folder / "outside.onnx").write_bytes(model_of(outside).SerializeToString())
        found.append(open_graph(folder / "outside.onnx"))
    return [graph.weights[0] for graph in found]


@pytest.mark.parametrize("size", [6, 3000])
@pytest.mark.parametrize("data_type", TYPES, ids=TensorProto.DataType.Name)
def test_a_weight_of_any_type_is_the_same_wherever_it_lies(
    data_type: int, size: int, tmp_path: Path
) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    values = (np.arange(size) % 2).astype(dtype).reshape(2, -1)
    tensor = numpy_helper.from_array(values, "w")
    for weight in every_way(tensor, tmp_path):
        assert (weight.name, weight.path, weight.dims, weight.size) == (
            "w",
            "w",
            (2, size // 2),
            size,
        )
        assert (weight.dtype, weight.nbytes) == (dtype, len(tensor.raw_data))
        assert weight.array().shape == values.shape
        assert weight.array().tobytes() == values.tobytes()
        assert np.concatenate(list(weight.chunks(700))).tobytes() == values.tobytes()
        assert weight.sample(10)[:10].tobytes() == values.reshape(-1)[:10].tobytes()
        assert weight.sample(10).size <= 6 + 24


@pytest.mark.parametrize("size", [6, 3000])
@pytest.mark.parametrize(
    "data_type",
    [
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.INT64,
        TensorProto.UINT64,
        TensorProto.BOOL,
        TensorProto.FLOAT16,
    ],
    ids=TensorProto.DataType.Name,
)
def test_a_weight_in_a_typed_field_is_the_same_wherever_it_lies(
    data_type: int, size: int, tmp_path: Path
) -> None:
    values = (np.arange(size) % 300).astype(helper.tensor_dtype_to_np_dtype(data_type))
    tensor = helper.make_tensor("w", data_type, [size], values)
    for weight in every_way(tensor, tmp_path):
        assert np.array_equal(weight.array(), values)
        assert np.array_equal(np.concatenate(list(weight.chunks(700))), values)


def test_a_large_weight_is_mapped_and_stays_out_of_the_model(tmp_path: Path) -> None:
    values = np.arange(300_000, dtype=np.float32)
    path = tmp_path / "some.onnx"
    path.write_bytes(model_of(numpy_helper.from_array(values, "w")).SerializeToString())
    graph = open_graph(path)
    assert graph.proto.ByteSize() < 500
    array = graph.weights[0].array()
    base: object = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    sample = graph.weights[0].sample(100)
    assert sample.size <= 202
    assert sample.max() > 290_000


def test_a_model_of_three_gigabytes_is_opened_without_reading_them(tmp_path: Path) -> None:
    size = 3 << 30
    tensor = (
        TensorProto(name="w", data_type=TensorProto.UINT8, dims=[size]).SerializeToString()
        + b"\x4a"
        + varint(size)
    )
    graph = model_of().graph.SerializeToString() + b"\x2a" + varint(len(tensor) + size) + tensor
    head = onnx.ModelProto(
        ir_version=10, opset_import=[helper.make_opsetid("", 20)]
    ).SerializeToString()
    path = tmp_path / "some.onnx"
    with path.open("wb") as file:
        file.write(head + b"\x3a" + varint(len(graph) + size) + graph)
        file.truncate(file.tell() + size)  # a hole
    tracemalloc.start()
    try:
        (weight,) = open_graph(path).weights
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert (weight.nbytes, weight.sample(10).size) == (size, 20)


def test_a_constant_node_keeps_its_large_value_in_the_file_too(tmp_path: Path) -> None:
    values = np.arange(5000, dtype=np.float32)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values))
    model = model_of()
    model.graph.node.insert(0, constant)
    graph = read_graph(model.SerializeToString(), name="some.onnx")
    assert graph.proto.ByteSize() < 500
    assert [(weight.name, weight.array().sum()) for weight in graph.weights] == [
        ("c", values.sum())
    ]


def test_a_weight_that_claims_to_have_been_left_in_the_file_is_not_believed() -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[1], raw_data=np.float32(1).tobytes())
    tensor.external_data.add(key="0" * 32, value="raw_data:0:4")
    assert read_graph(model_of(tensor).SerializeToString(), name="some.onnx").weights[
        0
    ].array().tolist() == [1]


def test_a_payload_in_two_pieces_is_put_together() -> None:
    first = TensorProto(name="w", data_type=1, dims=[2000], float_data=[1.0] * 1000)
    tensor = first.SerializeToString() + TensorProto(float_data=[2.0] * 1000).SerializeToString()
    graph = model_of().graph.SerializeToString() + b"\x2a" + varint(len(tensor)) + tensor
    rest = onnx.ModelProto(
        ir_version=10, opset_import=[helper.make_opsetid("", 20)]
    ).SerializeToString()
    (weight,) = read_graph(rest + b"\x3a" + varint(len(graph)) + graph, name="some.onnx").weights
    assert weight.array().tolist() == [1.0] * 1000 + [2.0] * 1000


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128, *varint(value >> 7)]) if value > 127 else bytes([value])


def test_a_file_that_went_away_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "some.onnx"
    path.write_bytes(
        model_of(numpy_helper.from_array(np.ones(9000, np.float32), "w")).SerializeToString()
    )
    graph = open_graph(path)
    path.unlink()
    with pytest.raises(
        ModelUnreadable,
        match=r"some\.onnx cannot be read: the tensor 'w' cannot be read: .*No such file",
    ):
        mask_like(graph)


def draw(shape: tuple[int, ...], p: float, seed: int = 0) -> npt.NDArray[np.float32]:
    kept = np.random.default_rng(seed).random(shape) >= p
    return (kept / (1 - p)).astype(np.float32)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400,), (16, 64), (4, 8, 9, 10)])
def test_a_dropout_mask_is_a_warning_that_names_the_weight_and_its_rate(
    p: float, shape: tuple[int, ...]
) -> None:
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        (finding,) = mask_like(with_values(draw(shape, p).astype(dtype)))
        assert finding.severity is Severity.WARNING
        assert finding.node == "w"
        assert abs(float(finding.why.partition("p = ")[2].partition(",")[0]) - p) < 0.01


def test_masks_are_missed_seldom() -> None:
    found = [mask_like(with_values(draw((20, 30), 0.2, seed))) for seed in range(300)]
    assert sum(map(bool, found)) == 300


def test_a_mask_of_channels_that_is_spread_over_an_image_is_found() -> None:
    assert mask_like(with_values(draw((4, 64, 1, 1), 0.2) * np.ones((1, 1, 7, 7), np.float32)))


def test_a_mask_that_is_a_constant_node_or_stands_in_a_body_is_found() -> None:
    mask = numpy_helper.from_array(draw((20, 20), 0.3), "mask")
    constant = helper.make_node("Constant", [], ["c"], value=mask)
    body = helper.make_graph(
        [helper.make_node("Identity", ["mask"], ["z"])],
        "body",
        [],
        [helper.make_empty_tensor_value_info("z")],
    )
    body.initializer.append(mask)
    model = model_of(numpy_helper.from_array(np.asarray(True), "c0"))
    branch = helper.make_node("If", ["c0"], ["z0"], name="if", then_branch=body, else_branch=body)
    model.graph.node.extend([constant, branch])
    found = {finding.node for finding in mask_like(graph_of(model))}
    assert found == {"c", "if/then_branch/mask", "if/else_branch/mask"}


R = np.random.default_rng(1)
ORDERLY = {
    "pruned": R.standard_normal((64, 64)) * (R.random((64, 64)) > 0.5),
    "pruning mask": R.random((64, 64)) > 0.5,
    "causal": np.tril(np.ones((64, 64))),
    "causal, scaled": np.tril(np.ones((16, 16))) * 2,
    "causal, -inf": np.where(np.tril(np.ones((64, 64))), 0, -np.inf),
    "causal, inf": np.where(np.tril(np.ones((64, 64))), 0, np.inf),
    "band": (np.abs(np.subtract.outer(np.arange(64), np.arange(64))) < 10) * 3.5,
    "identity": np.eye(10) * 10,
    "one-hot": np.eye(10)[R.integers(0, 10, 500)] * 10,
    "a few one-hots": np.eye(10)[R.integers(0, 10, 200)] * 10,
    "rows of all densities": (R.random((20, 20)) < np.linspace(0, 1, 20)[:, None]) * 2,
    "less than one": (R.random((64, 64)) > 0.5) * 0.5,
    "blocks": np.kron(np.eye(4), np.ones((8, 8))) * 4,
    "checkerboard": np.indices((16, 16)).sum(0) % 2 * 2,
    "periodic": np.tile([5, 0, 0, 0, 0], 100),
    "half": np.repeat([0, 2], 100),
    "two of four": np.asarray([R.permutation([2, 2, 0, 0]) for _ in range(1500)]),
    "constant": np.full((64, 64), 2),
    "zeros": np.zeros((64, 64)),
    "wrong share": (R.random((64, 64)) > 0.5) * 4,
    "negative": (R.random((64, 64)) > 0.5) * -2,
    "a third value far behind": np.append(draw((9000,), 0.5), 3),
    "few": draw((90,), 0.5),
}


@pytest.mark.parametrize("values", ORDERLY.values(), ids=ORDERLY)
def test_what_is_no_mask_raises_no_alarm(values: npt.NDArray[np.generic]) -> None:
    assert not mask_like(with_values(values.astype(np.float32)))


def test_what_is_not_a_float_is_no_mask() -> None:
    assert not mask_like(with_values((draw((30, 30), 0.5)).astype(np.int64)))


def test_ordinary_weights_are_told_by_their_first_elements(tmp_path: Path) -> None:
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[10**10], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="w.bin")
    with (tmp_path / "w.bin").open("wb") as file:
        file.write(R.standard_normal(1000).astype(np.float32).tobytes())
        file.truncate(4 * 10**10)  # a hole: forty gigabytes that nobody could read in time
    (tmp_path / "some.onnx").write_bytes(model_of(tensor).SerializeToString())
    graph = open_graph(tmp_path / "some.onnx")
    tracemalloc.start()
    try:
        assert not mask_like(graph)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=str)
def test_a_nan_is_an_error_and_an_infinity_is_none(dtype: npt.DTypeLike) -> None:
    values = np.ones((10, 10), dtype)
    values[0, :2] = np.inf, -np.inf
    assert not non_finite_weights(with_values(values))
    values[3, 3], values[4, 4] = np.nan, -np.asarray(np.nan, dtype)
    (finding,) = non_finite_weights(with_values(values))
    assert (finding.severity, finding.node) == (Severity.ERROR, "w")
    assert finding.why == "2 of its 100 values are not a number"


def test_a_nan_alone_is_a_value_like_any_other() -> None:
    assert not non_finite_weights(with_values(np.float32(np.nan)))


def test_a_nan_far_behind_is_found(tmp_path: Path) -> None:
    values = np.zeros(5_000_000, np.float32)
    values[-1] = np.nan
    path = tmp_path / "some.onnx"
    path.write_bytes(model_of(numpy_helper.from_array(values, "w")).SerializeToString())
    (finding,) = non_finite_weights(open_graph(path))
    assert finding.why == "1 of its 5000000 values is not a number"
