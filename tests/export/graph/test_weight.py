"""Weights are read on demand from every kind of storage; dropout masks and NaN are recognised by
their values.
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


def graph_with_weight(values: object) -> Graph:
    return graph_of(model_of(numpy_helper.from_array(np.asarray(values), "w")))


def weights_of_every_storage(tensor: onnx.TensorProto, folder: Path) -> list[Weight]:
    """The weight of a model in memory, of its bytes, of its file and of external data."""
    model, path = model_of(tensor), folder / "whole.onnx"
    path.write_bytes(model.SerializeToString())
    graphs = [graph_of(model), read_graph(path.read_bytes(), name="bytes"), open_graph(path)]
    if tensor.HasField("raw_data"):
        external = TensorProto(name="w", data_type=tensor.data_type, dims=tensor.dims)
        external.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "w.bin"),
            ("offset", "3"),
            ("length", str(len(tensor.raw_data))),
        ):
            external.external_data.add(key=key, value=value)
        (folder / "w.bin").write_bytes(b"abc" + tensor.raw_data)
        (folder / "outside.onnx").write_bytes(model_of(external).SerializeToString())
        graphs.append(open_graph(folder / "outside.onnx"))
    return [graph.weights[0] for graph in graphs]


@pytest.mark.parametrize("size", [6, 3000])
@pytest.mark.parametrize("data_type", TYPES, ids=TensorProto.DataType.Name)
def test_a_weight_of_any_type_is_the_same_in_every_storage(
    data_type: int, size: int, tmp_path: Path
) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    values = (np.arange(size) % 2).astype(dtype).reshape(2, -1)
    tensor = numpy_helper.from_array(values, "w")
    for weight in weights_of_every_storage(tensor, tmp_path):
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
def test_a_weight_in_a_typed_field_is_the_same_in_every_storage(
    data_type: int, size: int, tmp_path: Path
) -> None:
    values = (np.arange(size) % 300).astype(helper.tensor_dtype_to_np_dtype(data_type))
    tensor = helper.make_tensor("w", data_type, [size], values)
    for weight in weights_of_every_storage(tensor, tmp_path):
        assert np.array_equal(weight.array(), values)
        assert np.array_equal(np.concatenate(list(weight.chunks(700))), values)


def test_a_large_weight_is_memory_mapped_and_not_in_the_proto(tmp_path: Path) -> None:
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


def test_a_model_of_three_gigabytes_is_opened_without_reading_its_weight(tmp_path: Path) -> None:
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
        file.truncate(file.tell() + size)  # a sparse file
    tracemalloc.start()
    try:
        (weight,) = open_graph(path).weights
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert (weight.nbytes, weight.sample(10).size) == (size, 20)


def test_the_large_value_of_a_constant_node_stays_in_the_file_too(tmp_path: Path) -> None:
    values = np.arange(5000, dtype=np.float32)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values))
    model = model_of()
    model.graph.node.insert(0, constant)
    graph = read_graph(model.SerializeToString(), name="some.onnx")
    assert graph.proto.ByteSize() < 500
    assert [(weight.name, weight.array().sum()) for weight in graph.weights] == [
        ("c", values.sum())
    ]


def test_a_forged_reference_to_the_file_is_ignored() -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[1], raw_data=np.float32(1).tobytes())
    tensor.external_data.add(key="0" * 32, value="raw_data:0:4")
    assert read_graph(model_of(tensor).SerializeToString(), name="some.onnx").weights[
        0
    ].array().tolist() == [1]


def test_a_tensor_in_two_messages_is_merged() -> None:
    head = TensorProto(name="w", data_type=1, dims=[2000], float_data=[1.0] * 1000)
    tensor = head.SerializeToString() + TensorProto(float_data=[2.0] * 1000).SerializeToString()
    graph = model_of().graph.SerializeToString() + b"\x2a" + varint(len(tensor)) + tensor
    model = onnx.ModelProto(
        ir_version=10, opset_import=[helper.make_opsetid("", 20)]
    ).SerializeToString()
    (weight,) = read_graph(model + b"\x3a" + varint(len(graph)) + graph, name="some.onnx").weights
    assert weight.array().tolist() == [1.0] * 1000 + [2.0] * 1000


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128, *varint(value >> 7)]) if value > 127 else bytes([value])


def test_a_file_that_was_deleted_after_opening_is_one_sentence(tmp_path: Path) -> None:
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


def draw_mask(shape: tuple[int, ...], rate: float, seed: int = 0) -> npt.NDArray[np.float32]:
    keeps = np.random.default_rng(seed).random(shape) >= rate
    return (keeps / (1 - rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400,), (16, 64), (4, 8, 9, 10)])
def test_a_dropout_mask_is_a_warning_that_names_the_weight_and_its_rate(
    rate: float, shape: tuple[int, ...]
) -> None:
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        (finding,) = mask_like(graph_with_weight(draw_mask(shape, rate).astype(dtype)))
        assert finding.severity is Severity.WARNING
        assert finding.node == "w"
        assert abs(float(finding.why.partition("p = ")[2].partition(",")[0]) - rate) < 0.01


def test_no_mask_of_300_seeds_is_missed() -> None:
    findings = [mask_like(graph_with_weight(draw_mask((20, 30), 0.2, seed))) for seed in range(300)]
    assert sum(map(bool, findings)) == 300


def test_a_channel_mask_that_is_expanded_over_an_image_is_found() -> None:
    assert mask_like(
        graph_with_weight(draw_mask((4, 64, 1, 1), 0.2) * np.ones((1, 1, 7, 7), np.float32))
    )


def test_a_mask_in_a_constant_node_or_a_body_is_found() -> None:
    mask = numpy_helper.from_array(draw_mask((20, 20), 0.3), "mask")
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
    nodes = {finding.node for finding in mask_like(graph_of(model))}
    assert nodes == {"c", "if/then_branch/mask", "if/else_branch/mask"}


RNG = np.random.default_rng(1)
NOT_MASKS = {
    "pruned": RNG.standard_normal((64, 64)) * (RNG.random((64, 64)) > 0.5),
    "pruning mask": RNG.random((64, 64)) > 0.5,
    "causal": np.tril(np.ones((64, 64))),
    "causal, scaled": np.tril(np.ones((16, 16))) * 2,
    "causal, -inf": np.where(np.tril(np.ones((64, 64))), 0, -np.inf),
    "causal, inf": np.where(np.tril(np.ones((64, 64))), 0, np.inf),
    "band": (np.abs(np.subtract.outer(np.arange(64), np.arange(64))) < 10) * 3.5,
    "identity": np.eye(10) * 10,
    "one-hot": np.eye(10)[RNG.integers(0, 10, 500)] * 10,
    "a few one-hots": np.eye(10)[RNG.integers(0, 10, 200)] * 10,
    "rows of all densities": (RNG.random((20, 20)) < np.linspace(0, 1, 20)[:, None]) * 2,
    "less than one": (RNG.random((64, 64)) > 0.5) * 0.5,
    "blocks": np.kron(np.eye(4), np.ones((8, 8))) * 4,
    "checkerboard": np.indices((16, 16)).sum(0) % 2 * 2,
    "periodic": np.tile([5, 0, 0, 0, 0], 100),
    "half": np.repeat([0, 2], 100),
    "two of four": np.asarray([RNG.permutation([2, 2, 0, 0]) for _ in range(1500)]),
    "constant": np.full((64, 64), 2),
    "zeros": np.zeros((64, 64)),
    "wrong share": (RNG.random((64, 64)) > 0.5) * 4,
    "negative": (RNG.random((64, 64)) > 0.5) * -2,
    "a third value far behind": np.append(draw_mask((9000,), 0.5), 3),
    "few": draw_mask((90,), 0.5),
}


@pytest.mark.parametrize("values", NOT_MASKS.values(), ids=NOT_MASKS)
def test_a_weight_that_is_not_a_mask_has_no_warning(values: npt.NDArray[np.generic]) -> None:
    assert not mask_like(graph_with_weight(values.astype(np.float32)))


def test_an_integer_weight_is_never_a_mask() -> None:
    assert not mask_like(graph_with_weight((draw_mask((30, 30), 0.5)).astype(np.int64)))


def test_an_ordinary_weight_is_recognised_by_its_first_elements(tmp_path: Path) -> None:
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[10**10], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="w.bin")
    with (tmp_path / "w.bin").open("wb") as file:
        file.write(RNG.standard_normal(1000).astype(np.float32).tobytes())
        # A sparse file of forty gigabytes, which would take minutes to read.
        file.truncate(4 * 10**10)
    (tmp_path / "some.onnx").write_bytes(model_of(tensor).SerializeToString())
    graph = open_graph(tmp_path / "some.onnx")
    tracemalloc.start()
    try:
        assert not mask_like(graph)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=str)
def test_a_nan_is_an_error_and_an_infinity_is_not(dtype: npt.DTypeLike) -> None:
    values = np.ones((10, 10), dtype)
    values[0, :2] = np.inf, -np.inf
    assert not non_finite_weights(graph_with_weight(values))
    values[3, 3], values[4, 4] = np.nan, -np.asarray(np.nan, dtype)
    (finding,) = non_finite_weights(graph_with_weight(values))
    assert (finding.severity, finding.node) == (Severity.ERROR, "w")
    assert finding.why == "2 of its 100 values are not a number"


def test_a_scalar_nan_is_accepted() -> None:
    assert not non_finite_weights(graph_with_weight(np.float32(np.nan)))


def test_a_nan_at_the_end_of_a_large_weight_is_found(tmp_path: Path) -> None:
    values = np.zeros(5_000_000, np.float32)
    values[-1] = np.nan
    path = tmp_path / "some.onnx"
    path.write_bytes(model_of(numpy_helper.from_array(values, "w")).SerializeToString())
    (finding,) = non_finite_weights(open_graph(path))
    assert finding.why == "1 of its 5000000 values is not a number"
