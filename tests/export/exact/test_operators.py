"""Each operator by itself: the bounds that it gives, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.defs
import pytest
from onnx import TensorProto

from evalmode.export.exact.operators import OPERATORS, ROUNDING
from evalmode.export.exact.prove import Proof, prove
from evalmode.export.exact.shapes import SHAPES
from evalmode.export.graph import graph_of
from tests.export.exact.small_exact_graphs import Array, model, node

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def proof_of(
    *nodes: onnx.NodeProto, x: Any = None, ids: tuple[int, int] = (0, 3), **constants: Any
) -> Proof:
    """The proof of nodes that read `x`, the rows of a table at some ids, and constants."""
    before = []
    if x is not None:
        before = [node("Gather", ["table", "ids"], "x")]
        constants["table"] = np.asarray(x, np.float32)
        ids = (0, len(constants["table"]) - 1)
    proto = model(
        [*before, *nodes],
        inputs={"ids": (INT64, [2, 3])},
        constants={name: np.asarray(value) for name, value in constants.items()},
    )
    return prove(graph_of(proto), ranges={"ids": ids})


def bounds_of(proof: Proof, name: str = "y") -> tuple[Any, Any, Any]:
    """Grid, low and high of a tensor. Fails with the reason if nothing is known of it."""
    tensor = proof.tensors[name]
    assert tensor.is_known, str(proof)
    return tuple(
        part.tolist() for part in (tensor.bounds.grid, tensor.bounds.low, tensor.bounds.high)
    )


F32 = np.float32
TABLE = F32([[-1.5, 0.25], [3, 0.5]])


@pytest.mark.parametrize(
    ("op", "other", "grid", "low", "high"),
    [
        ("Add", [1.0, 8.0], [-1, -2], [-0.5, 8.25], [4.0, 8.5]),
        ("Sub", [1.0, 8.0], [-1, -2], [-2.5, -7.75], [2.0, -7.5]),
        ("Mul", [-2.0, 3.0], [0, -2], [-6.0, 0.75], [3.0, 1.5]),
        ("Max", [0.0, 0.375], [-1, -3], [0.0, 0.375], [3.0, 0.5]),
        ("Min", [0.0, 0.375], [-1, -3], [-1.5, 0.25], [0.0, 0.375]),
        ("Add", 4.0, [-1, -2], [2.5, 4.25], [7.0, 4.5]),
    ],
)
def test_elementwise_arithmetic_has_bounds_for_each_channel(
    op: str, other: Any, grid: Any, low: Any, high: Any
) -> None:
    proof = proof_of(node(op, ["x", "c"]), x=TABLE, c=F32(other))
    assert bounds_of(proof) == (grid, low, high)


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        ("Floor", [-2.0, 0.0], [3.0, 0.0]),
        ("Ceil", [-1.0, 1.0], [3.0, 1.0]),
        ("Round", [-2.0, 0.0], [3.0, 0.0]),
        ("Relu", [0.0, 0.25], [3.0, 0.5]),
        ("Neg", [-3.0, -0.5], [1.5, -0.25]),
        ("Abs", [0.0, 0.25], [3.0, 0.5]),
        ("Sign", [-1.0, 1.0], [1.0, 1.0]),
    ],
)
def test_functions_of_one_number_have_bounds_for_each_channel(op: str, low: Any, high: Any) -> None:
    assert bounds_of(proof_of(node(op, ["x"]), x=TABLE))[1:] == (low, high)


def test_a_matrix_product_has_the_sums_of_each_column() -> None:
    proof = proof_of(node("MatMul", ["x", "w"]), x=TABLE, w=F32([[2, -1], [4, 0.5]]))
    # Column 0: -3 to 6, and 1 to 2, of which a partial sum may have none; column 1: -3 to 1.5, ...
    assert bounds_of(proof) == ([0, -3], [-3.0, -3.0], [8.0, 1.75])


def test_a_product_of_two_computed_tensors_takes_the_largest_of_both() -> None:
    proof = proof_of(
        node("Transpose", ["x"], "t", perm=[0, 2, 1]),
        node("MatMul", ["x", "t"]),
        x=TABLE,
    )
    assert bounds_of(proof) == (-4, -9.0, 18.0)


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        ("ReduceSum", -1.5, 3.5),
        ("ReduceSumSquare", 0.0, 9.25),
        ("ReduceL1", 0.0, 3.5),
        ("ReduceMean", -0.75, 1.75),
        ("ReduceMax", -1.5, 3.0),
        ("ReduceMin", -1.5, 3.0),
    ],
)
def test_reductions_over_the_channels(op: str, low: float, high: float) -> None:
    proof = proof_of(node(op, ["x", "axes"]), x=TABLE, axes=[-1])
    assert bounds_of(proof)[1:] == (low, high)


def test_a_sum_over_another_axis_keeps_the_channels() -> None:
    proof = proof_of(node("ReduceSum", ["x", "axes"]), x=TABLE, axes=[1])
    assert bounds_of(proof)[1:] == ([-4.5, 0.0], [9.0, 1.5])


def test_a_mean_of_three_numbers_rounds() -> None:
    proof = proof_of(node("ReduceMean", ["x", "axes"]), x=TABLE, axes=[1])
    assert "it divides by 3 numbers, which is no power of two" in str(proof)


def test_a_square_is_not_negative() -> None:
    assert bounds_of(proof_of(node("Mul", ["x", "x"]), x=TABLE))[1:] == ([0.0, 0.0], [9.0, 0.25])


@pytest.mark.parametrize("value", [2**24, 2**24 + 2])
def test_numbers_of_24_bits_are_the_limit(value: int) -> None:
    half = F32(value // 2)
    proof = proof_of(node("Add", ["x", "c"]), x=[[half], [1.0]], c=half)
    assert proof.proved == (value == 2**24)
    assert proof.proved or "may need 24.1 bits, and float32 has 24" in str(proof)


def test_significands_multiply_and_powers_of_two_change_the_exponent() -> None:
    wide = F32([[2**23 + 1], [1.5 * 2.0**-10]])
    assert proof_of(node("Mul", ["x", "c"]), x=[[2.0**12 + 1]], c=F32(2**11 + 1)).proved
    assert not proof_of(node("Mul", ["x", "c"]), x=[[2.0**13 + 1]], c=F32(2**12 + 1)).proved
    assert proof_of(node("Mul", ["x", "c"]), x=wide, c=F32(2.0**-20)).proved
    assert not proof_of(node("Add", ["x", "c"]), x=wide, c=F32(1)).proved


@pytest.mark.parametrize("exponent", [-41, 41])
def test_factors_outside_the_range_of_exponents_are_refused(exponent: int) -> None:
    proof = proof_of(node("Mul", ["x", "c"]), x=[[2.0**-exponent]], c=F32(2.0**exponent))
    assert not proof.proved


def test_subnormal_numbers_are_refused() -> None:
    proof = proof_of(node("Identity", ["x"]), x=[[1e-40]])
    assert "below 2^-126, where some machines read zero" in str(proof)


# Signs of zero.


def test_a_sum_is_negative_zero_only_if_all_its_terms_may_be() -> None:
    negative = F32([[-0.0], [1.0]])
    assert not proof_of(node("Identity", ["x"]), x=negative).proved
    assert proof_of(node("Add", ["x", "c"]), x=negative, c=F32(2)).proved
    assert not proof_of(node("Add", ["x", "x"]), x=negative).proved


def test_a_constant_zero_does_not_count_as_a_term() -> None:
    # ONNX Runtime removes the addition of a constant 0 and leaves -0.0.
    assert not proof_of(node("Add", ["x", "c"]), x=[[-0.0], [1.0]], c=F32(0)).proved


@pytest.mark.parametrize(
    ("x", "w", "proved"),
    [
        ([[0.0, 1.0]], [[1.0], [2.0]], True),
        ([[0.0, 1.0]], [[-1.0], [2.0]], False),
        ([[-1.0, 1.0]], [[0.0], [2.0]], False),
        ([[3.0, 1.0]], [[-1.0], [2.0]], False),
    ],
)
def test_a_product_of_zero_and_a_negative_number_may_be_negative_zero(
    x: Any, w: Any, proved: bool
) -> None:
    proof = proof_of(node("MatMul", ["x", "w"]), x=x, w=F32(w))
    # The last result is between -3 and 2, and no term of it is a zero.
    is_ambiguous = proof.tensors["y"].bounds.negative_zero
    assert is_ambiguous == (not proved and x != [[3.0, 1.0]])


@pytest.mark.parametrize("op", ["Relu", "Abs", "Floor"])
def test_functions_keep_a_negative_zero(op: str) -> None:
    assert "-0.0" in str(proof_of(node(op, ["x"]), x=[[-0.0], [1.0]]))


@pytest.mark.parametrize(("op", "proved"), [("Ceil", False), ("Round", False), ("Floor", True)])
def test_rounding_up_a_negative_fraction_gives_negative_zero(op: str, proved: bool) -> None:
    assert proof_of(node(op, ["x"]), x=[[-0.25], [1.0]]).proved == proved


def test_a_negative_zero_outside_the_bounds_is_forgotten() -> None:
    clip = node("Clip", ["x", "low", ""])
    assert proof_of(clip, x=[[-0.0], [4.0]], low=F32(1)).proved
    assert not proof_of(clip, x=[[-0.0], [4.0]], low=F32(0)).proved
    assert not proof_of(clip, x=[[0.0], [4.0]], low=F32(-0.0)).proved


# Clip.


def test_a_clip_with_exchanged_limits_is_refused() -> None:
    arguments: dict[str, Any] = {"x": [[1.0], [2.0]]}
    clip = node("Clip", ["x", "low", "high"])
    assert "runtimes differ" in str(proof_of(clip, low=F32(3), high=F32(2), **arguments))
    assert proof_of(clip, low=F32(2), high=F32(2), **arguments).proved


def test_a_limit_that_is_never_reached_may_be_infinite_and_a_nan_may_not() -> None:
    clip = node("Clip", ["x", "low", "high"])
    x = [[1.0], [2.0]]
    assert bounds_of(proof_of(clip, x=x, low=F32(-np.inf), high=F32(1.5)))[1:] == (1.0, 1.5)
    assert not proof_of(clip, x=x, low=F32(np.nan), high=F32(1.5)).proved
    assert not proof_of(clip, x=x, low=F32(np.inf), high=F32(np.inf)).proved


# Integers and casts.


def _integers(op: str, other: int, ids: tuple[int, int], dtype: int = INT64) -> Proof:
    numpy_dtype = np.int64 if dtype == INT64 else np.int32
    return proof_of(
        node("Cast", ["ids"], "i", to=dtype),
        node(op, ["i", "c"], "j"),
        node("Cast", ["j"], to=FLOAT),
        ids=ids,
        c=numpy_dtype(other),
    )


@pytest.mark.parametrize(
    ("op", "other", "ids", "low", "high"),
    [
        ("Add", 3, (-2, 5), 1.0, 8.0),
        ("Mul", -3, (-2, 5), -15.0, 6.0),
        ("Div", 4, (0, 9), 0.0, 3.0),
        ("Mod", 4, (0, 9), 0.0, 3.0),
    ],
)
def test_integers_are_followed(
    op: str, other: int, ids: tuple[int, int], low: float, high: float
) -> None:
    assert bounds_of(_integers(op, other, ids))[1:] == (low, high)


@pytest.mark.parametrize(
    ("op", "other", "ids", "why"),
    [
        ("Mul", 2**20, (0, 2**12), "the product may reach 4.29497e+09, which may overflow int32"),
        ("Div", 0, (0, 9), "divide by zero"),
        ("Div", 2, (-1, 9), "negative integers"),
        ("Mod", -2, (0, 9), "negative"),
    ],
)
def test_integers_that_overflow_or_divide_otherwise_are_refused(
    op: str, other: int, ids: tuple[int, int], why: str
) -> None:
    assert why in str(_integers(op, other, ids, INT32))


@pytest.mark.parametrize(("factor", "proved"), [(-0.5, False), (0.5, True)])
def test_a_negative_number_before_a_product_may_be_moved_behind_it(
    factor: Any, proved: bool
) -> None:
    # ONNX Runtime then makes -0.0 of a sum that is 0.0, as here with weights of 0.
    nodes = [node("Mul", ["x", "factor"], "scaled"), node("MatMul", ["scaled", "w"])]
    proof = proof_of(*nodes, x=[[1.0, 2.0]], factor=F32(factor), w=F32([[0.0], [0.0]]))
    assert proof.proved == proved
    if not proved:
        assert "-0.0" in str(proof)


def test_a_cast_must_hold_every_number() -> None:
    def cast(to: int, x: Any) -> Proof:
        return proof_of(node("Cast", ["x"], "i", to=to), node("Cast", ["i"], to=FLOAT), x=x)

    assert cast(TensorProto.UINT8, [[0.0], [255.0]]).proved
    assert "do not all fit uint8" in str(cast(TensorProto.UINT8, [[0.0], [256.0]]))
    assert "do not all fit uint8" in str(cast(TensorProto.UINT8, [[-1.0], [25.0]]))
    # A fraction is dropped, but the number with its fraction must fit.
    assert cast(TensorProto.UINT8, [[0.5], [254.5]]).proved
    assert "do not all fit uint8" in str(cast(TensorProto.UINT8, [[0.5], [255.5]]))
    assert "do not all fit uint8" in str(cast(TensorProto.UINT8, [[-0.5], [25.0]]))
    assert cast(TensorProto.INT8, [[-127.5], [126.5]]).tensors["i"].bounds.low == -127
    assert cast(TensorProto.BOOL, [[0.5], [0.0]]).proved
    assert "may need 25.0 bits" in str(
        proof_of(node("Cast", ["ids"], to=FLOAT), ids=(0, 2**25 - 1))
    )


# Lookups and moves.


def test_a_lookup_takes_the_part_of_a_table_within_reach() -> None:
    proof = proof_of(node("Gather", ["t", "ids"]), ids=(1, 2), t=F32([99, 1, 2, 0.1]))
    assert bounds_of(proof)[1:] == (1.0, 2.0)
    assert not proof_of(node("Gather", ["t", "ids"]), ids=(1, 4), t=F32([99, 1, 2, 0.5])).proved


def test_the_largest_over_an_axis_that_may_be_empty_is_refused() -> None:
    proto = model(
        [
            node("Cast", ["ids"], "x", to=FLOAT),
            node("Slice", ["x", "one", "end", "axes"], "cut"),
            node("ReduceMax", ["cut", "axes"]),
        ],
        inputs={"ids": (INT64, ["batch", "length"])},
        constants={"one": [1], "end": [2**62], "axes": [1]},
    )
    proof = prove(graph_of(proto), ranges={"ids": (0, 9)}, largest={"length": 4})
    assert "may be empty" in str(proof)


CHANNELS = F32([[1, 2, 3, 4], [10, 20, 30, 40]])


@pytest.mark.parametrize(
    ("nodes", "constants", "high"),
    [
        ([node("Slice", ["x", "a", "b", "c"])], {"a": [1], "b": [3], "c": [2]}, [20.0, 30.0]),
        ([node("Concat", ["x", "x"], axis=-1)], {}, [10.0, 20.0, 30.0, 40.0] * 2),
        ([node("Concat", ["x", "x"], axis=0)], {}, [10.0, 20.0, 30.0, 40.0]),
        ([node("Gather", ["x", "a"], axis=2)], {"a": [3, 0]}, [40.0, 10.0]),
        ([node("Reshape", ["x", "a"])], {"a": [2, 3, 2, 2]}, [30.0, 40.0]),
        ([node("Reshape", ["x", "a"])], {"a": [2, -1]}, [10.0, 20.0, 30.0, 40.0] * 3),
        ([node("Reshape", ["x", "a"])], {"a": [-1, 8]}, [10.0, 20.0, 30.0, 40.0] * 2),
        ([node("Reshape", ["x", "a"])], {"a": [8, 3]}, 40.0),
        ([node("Transpose", ["x"], perm=[1, 0, 2])], {}, [10.0, 20.0, 30.0, 40.0]),
        ([node("Transpose", ["x"], perm=[0, 2, 1])], {}, 40.0),
        ([node("Unsqueeze", ["x", "a"])], {"a": [1]}, [10.0, 20.0, 30.0, 40.0]),
        ([node("Unsqueeze", ["x", "a"])], {"a": [-1]}, 40.0),
        ([node("Flatten", ["x"])], {}, [10.0, 20.0, 30.0, 40.0] * 3),
        ([node("Tile", ["x", "a"])], {"a": [1, 1, 2]}, 40.0),
        ([node("Pad", ["x", "a"])], {"a": [0, 1, 0, 0, 0, 0]}, [10.0, 20.0, 30.0, 40.0]),
        ([node("Expand", ["x", "a"])], {"a": [5, 2, 3, 4]}, [10.0, 20.0, 30.0, 40.0]),
    ],
)
def test_moves_keep_the_channels_where_they_are_the_same(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], high: Any
) -> None:
    assert bounds_of(proof_of(*nodes, x=CHANNELS, **constants))[2] == high


def test_a_split_has_the_channels_of_each_part() -> None:
    split = node("Split", ["x", "sizes"], axis=-1)
    split.output[:] = ["y", "z"]
    proof = proof_of(split, x=CHANNELS, sizes=[1, 3])
    assert bounds_of(proof)[2] == 10.0
    assert bounds_of(proof, "z")[2] == [20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    ("start", "end", "step", "proved"),
    [
        (-1, -(2**63), -2, True),
        (3, 0, -1, True),
        (2**62, -5, -1, True),
        (-9, 3, 1, True),
        (-4, -9, -1, True),
        (-5, -9, -1, False),
        (-1, 2**63 - 1, -1, False),
        (0, 3, 0, False),
    ],
)
def test_a_slice_that_runtimes_read_differently_is_refused(
    start: int, end: int, step: int, proved: bool
) -> None:
    # The last axis has four elements.
    limits = {"start": [start], "end": [end], "axes": [-1], "steps": [step]}
    proof = proof_of(node("Slice", ["x", *limits]), x=CHANNELS, **limits)
    assert proof.proved == proved
    if proved:
        expected = [10.0, 20.0, 30.0, 40.0][slice(start, end, step)]
        high = bounds_of(proof)[2]
        assert high == (expected if len(expected) > 1 else max(expected))


@pytest.mark.parametrize(
    ("sizes", "attributes"),
    [([1, 1], {}), ([5, -1], {}), (None, {"num_outputs": 3}), (None, {"num_outputs": 8})],
)
def test_a_split_that_does_not_cover_its_axis_is_refused(
    sizes: Any, attributes: dict[str, int]
) -> None:
    split = node("Split", ["x", "sizes"] if sizes else ["x"], axis=-1, **attributes)
    constants = {"sizes": sizes} if sizes else {}
    assert "it splits 4 elements into" in str(proof_of(split, x=CHANNELS, **constants))


@pytest.mark.parametrize(
    ("op", "proved"), [("ReduceSum", True), ("ReduceSumSquare", False), ("ReduceL1", False)]
)
def test_a_reduction_of_no_axis_is_followed_only_where_all_opsets_mean_the_same(
    op: str, proved: bool
) -> None:
    proof = proof_of(node(op, ["x"], noop_with_empty_axes=1), x=CHANNELS)
    assert proof.proved == proved
    assert proved or "reduces no axis" in str(proof)


def test_shapes_that_are_computed_are_followed() -> None:
    proto = model(
        [
            node("Cast", ["ids"], "x", to=FLOAT),
            node("Shape", ["x"], "shape", start=0, end=2),
            node("Concat", ["shape", "tail"], "sizes", axis=0),
            node("Reshape", ["x", "sizes"], "heads"),
            node("Transpose", ["heads"], "turned", perm=[0, 1, 3, 2]),
            node("MatMul", ["turned", "heads"]),
        ],
        inputs={"ids": (INT64, ["batch", "length", 6])},
        constants={"tail": [2, -1]},
    )
    proof = prove(graph_of(proto), ranges={"ids": (0, 9)})
    assert proof.proved, str(proof)
    assert [extent.exact for extent in proof.tensors["heads"].shape or ()] == [None, None, 2, 3]
    assert proof.tensors["y"].bounds.high == 2 * 81


def test_a_range_of_positions_has_the_length_of_its_axis() -> None:
    proto = model(
        [
            node("Shape", ["ids"], "size", start=1, end=2),
            node("Squeeze", ["size"], "length"),
            node("Range", ["zero", "length", "one"], "positions"),
            node("Gather", ["table", "positions"]),
        ],
        inputs={"ids": (INT64, ["batch", "length"])},
        constants={"zero": 0, "one": 1, "table": np.ones((8, 2), np.float32)},
    )
    assert prove(graph_of(proto), largest={"length": 8}).proved
    assert not prove(graph_of(proto), largest={"length": 9}).proved
    assert not prove(graph_of(proto)).proved


# Products.


def test_gemm_adds_the_bias_and_reads_transposed_weights() -> None:
    arguments: dict[str, Any] = {"a": [6, 2], "w": F32([[2, 4], [-1, 0.5]]), "c": F32([1, -8])}
    flat = node("Reshape", ["x", "a"], "rows")
    proof = proof_of(flat, node("Gemm", ["rows", "w", "c"], transB=1), x=TABLE, **arguments)
    assert bounds_of(proof) == ([0, -3], [-3.0, -11.0], [9.0, 1.75])
    gemm = node("Gemm", ["rows", "w", "c"], alpha=0.5, transB=1)
    assert "alpha" in str(proof_of(flat, gemm, x=TABLE, **arguments))


def test_an_einsum_of_one_tensor_is_a_sum() -> None:
    proof = proof_of(node("Einsum", ["x"], equation="bik->b"), x=TABLE)
    assert bounds_of(proof) == (-2, -9.0, 18.0)


def test_an_einsum_of_two_tensors_counts_its_terms() -> None:
    proof = proof_of(node("Einsum", ["x", "x"], equation="bik,bjk->bij"), x=TABLE)
    assert bounds_of(proof) == (-4, -9.0, 18.0)
    assert not proof_of(
        node("Einsum", ["x", "x", "x"], equation="bik,bjk,bik->bij"), x=TABLE
    ).proved


@pytest.mark.parametrize(("off", "proved"), [(2.0**23, True), (2.0**30, False)])
def test_the_difference_of_the_values_of_a_one_hot_is_exact(off: float, proved: bool) -> None:
    # The reference implementation computes off + (on - off), which for 2^30 is -256 and not -320.
    proof = proof_of(node("OneHot", ["ids", "depth", "c"]), depth=4, c=F32([off, -321]))
    assert proof.proved == proved
    assert proved or "the difference of its two values may need" in str(proof)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_is_followed_if_its_kernel_has_one_element(kernel: int) -> None:
    weights = np.ones((4, 3, kernel), np.float32)
    proof = proof_of(node("Conv", ["x", "w"]), x=CHANNELS, w=weights)
    if kernel == 1:
        assert bounds_of(proof)[2] == 120.0
    else:
        assert "Winograd" in str(proof)


def test_an_integer_product_is_summed_in_int32() -> None:
    nodes = (
        node("Cast", ["x"], "bytes", to=TensorProto.UINT8),
        node("MatMulInteger", ["bytes", "w"], "sums"),
        node("Cast", ["sums"], to=FLOAT),
    )
    proof = proof_of(*nodes, x=[[0.0, 3.0], [255.0, 4.0]], w=np.int8([[2, -3], [-128, 127]]))
    assert bounds_of(proof, "sums")[1:] == ([-512.0, -765.0], [510.0, 508.0])
    proof = proof_of(
        nodes[0],
        node("MatMulInteger", ["bytes", "w", "zero"], "sums"),
        nodes[2],
        x=[[0.0, 3.0], [255.0, 4.0]],
        w=np.int8([[2], [1]]),
        zero=np.uint8(128),
    )
    assert bounds_of(proof, "sums")[1:] == ([-381.0], [254.0])


@pytest.mark.parametrize(
    ("op", "inputs", "domain", "why"),
    [
        ("DequantizeLinear", ["bytes", "scale"], "", "runtimes quantise anew what stands beside"),
        ("QuantizeLinear", ["x", "scale"], "", "it rounds, and runtimes make one of two"),
        ("DynamicQuantizeLinear", ["x"], "", "its results round"),
        ("QLinearMatMul", ["bytes", *"szwszsz"], "", "its results round"),
        ("QLinearConv", ["bytes", *"szwszsz"], "", "its results round"),
        ("ConvInteger", ["bytes", "w"], "", "the proof does not follow this operator"),
        ("MatMulIntegerToFloat", ["bytes", *"wss"], "com.microsoft", "of com.microsoft are not"),
        ("DynamicQuantizeMatMul", ["x", *"ws"], "com.microsoft", "of com.microsoft are not"),
        ("MatMulNBits", ["x", *"ws"], "com.microsoft", "of com.microsoft are not"),
    ],
)
def test_quantised_operators_that_a_runtime_computes_otherwise_are_refused_by_name(
    op: str, inputs: list[str], domain: str, why: str
) -> None:
    proof = proof_of(
        node("Cast", ["x"], "bytes", to=TensorProto.INT8),
        node(op, inputs, domain=domain),
        x=[[1.0], [3.0]],
        scale=F32(0.25),
        s=F32(0.25),
        z=np.int8(0),
        w=np.int8([[2]]),
    )
    assert proof.reasons[0].node == "at_y"
    assert proof.reasons[0].op == (f"{domain}::{op}" if domain else op)
    assert why in proof.reasons[0].why


@pytest.mark.parametrize(
    "op", sorted(ROUNDING & {schema.name for schema in onnx.defs.get_all_schemas()})
)
def test_an_operator_that_rounds_is_not_followed(op: str) -> None:
    assert op not in OPERATORS
    assert "round" in str(proof_of(node(op, ["x"]), x=TABLE))


def test_every_operator_that_is_followed_has_a_rule_for_its_shape_and_exists() -> None:
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert set(OPERATORS) <= set(SHAPES) & names
    assert not set(OPERATORS) & ROUNDING


def test_random_weights_have_the_grid_and_bits_of_rational_numbers() -> None:
    from fractions import Fraction

    from evalmode.export.exact.values import bounds_of_array

    rng = np.random.default_rng(0)
    weights: Array = rng.integers(-(2**12), 2**12, (200, 5)).astype(np.float32)
    weights *= np.exp2(rng.integers(-20, 20, (200, 5))).astype(np.float32)
    bounds = bounds_of_array(weights)
    for channel in range(5):
        column = [Fraction(float(value)) for value in weights[:, channel] if value]
        denominators = max(value.denominator for value in column)
        grid = -(denominators.bit_length() - 1)
        if denominators == 1:
            numerators = [abs(value.numerator) for value in column]
            grid = min((value & -value).bit_length() - 1 for value in numerators)
        assert bounds.grid[channel] == grid
        odd = [abs(value.numerator) for value in column]
        odd = [value // (value & -value) for value in odd]
        assert bounds.bits[channel] == max(value.bit_length() for value in odd)
        assert bounds.low[channel] == min(weights[:, channel])
        assert bounds.high[channel] == max(weights[:, channel])
