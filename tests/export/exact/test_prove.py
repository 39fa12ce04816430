"""The proof of whole graphs: a network that is exact, and what happens when it is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from evalmode.errors import EvalmodeError
from evalmode.export.exact.limits import FloatRange
from evalmode.export.exact.prove import Proof, prove
from evalmode.export.graph import graph_of, open_graph, read_graph
from tests.export.exact.small_exact_graphs import (
    LENGTH,
    VOCABULARY,
    ExactNetwork,
    model,
    node,
)

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def proof_of(network: ExactNetwork, *, length: int = LENGTH) -> Proof:
    return prove(
        graph_of(network.model()),
        ranges={"ids": (0, VOCABULARY - 1)},
        largest={"length": length},
    )


def proof_of_nodes(
    *nodes: onnx.NodeProto,
    ranges: dict[str, tuple[int, int]] | None = None,
    largest: dict[str, int] | None = None,
    **arguments: Any,
) -> Proof:
    return prove(graph_of(model(nodes, **arguments)), ranges=ranges, largest=largest)


def ids_of(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def test_a_network_of_integers_times_powers_of_two_is_proved() -> None:
    proof = proof_of(ExactNetwork())
    assert proof.proved, str(proof)
    assert str(proof) == "proved"
    assert proof.reasons == ()
    assert 20 < proof.widest.bits <= 24
    assert proof.widest_operand.bits <= 11


def numbers_within(network: ExactNetwork, proof: Proof) -> int:
    """Assert that the numbers of real rows are on their grids and within their bounds."""
    evaluator = ReferenceEvaluator(network.model())
    count = 0
    for length in range(1, LENGTH + 1):
        results = evaluator.run(None, {"ids": ids_of(16, length, seed=length)}, intermediate=True)
        for name, array in results.items():
            tensor = proof.tensors.get(name)
            if tensor is None or name in network.arrays:
                continue
            numbers = np.asarray(array, np.float64)
            steps = numbers / np.exp2(tensor.bounds.grid.astype(np.float64))
            assert (steps == np.rint(steps)).all(), name
            assert (numbers >= tensor.bounds.low).all(), name
            assert (numbers <= tensor.bounds.high).all(), name
            count += numbers.size
    return count


def test_the_numbers_of_real_rows_are_on_their_grid_and_within_their_bounds() -> None:
    network = ExactNetwork()
    assert numbers_within(network, proof_of(network)) > 10_000


@pytest.mark.parametrize("clip", ["hidden", "x", "near"])
def test_without_a_clip_the_proof_is_refused_or_still_right(clip: str) -> None:
    network = ExactNetwork()
    _without(clip)(network)
    proof = proof_of(network)
    if proof.proved:
        numbers_within(network, proof)
    assert proof.proved == (clip != "near")


def test_a_proved_network_has_the_same_bits_at_every_setting_of_the_runtime() -> None:
    data = ExactNetwork().model().SerializeToString()
    ids = ids_of(33, LENGTH)
    answers = set()
    for level in (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        for threads in (1, 2):
            options = ort.SessionOptions()
            options.graph_optimization_level = level
            options.intra_op_num_threads = threads
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            for size in (1, 7, 33):
                rows = [
                    session.run(None, {"ids": ids[start : start + size]})[0]
                    for start in range(0, len(ids), size)
                ]
                answers.add(np.concatenate(rows).tobytes())
    assert len(answers) == 1


def _replace(name: str, change: Callable[[Any], None]) -> Callable[[ExactNetwork], None]:
    def spoil(network: ExactNetwork) -> None:
        array = np.array(network.arrays[name])
        change(array)
        network.arrays[name] = array

    return spoil


def _without(clip: str) -> Callable[[ExactNetwork], None]:
    def spoil(network: ExactNetwork) -> None:
        removed = network.node_named(clip)
        network.nodes.remove(removed)
        for item in network.nodes:
            for index, name in enumerate(item.input):
                if name == clip:
                    item.input[index] = removed.input[0]

    return spoil


def _divide(network: ExactNetwork) -> None:
    network.node_named("product").op_type = "Div"


def _set(*index: int, value: float) -> Callable[[Any], None]:
    return lambda array: array.__setitem__(index, value)


MUTATIONS: dict[str, tuple[Callable[[ExactNetwork], None], str]] = {
    "one weight is off by an ulp": (
        _replace("up", lambda array: array.__setitem__((2, 3), np.nextafter(array[2, 3], 9))),
        "at_raised",
    ),
    "a column is large": (
        _replace("up", lambda array: array.__setitem__((slice(None), 5), array[:, 5] + 2**17)),
        "at_raised",
    ),
    "a Mul is a Div": (_divide, "at_product"),
    "a table entry is 0.1": (_replace("table", _set(7, 3, value=0.1)), "at_raised"),
    "a bias is a NaN": (_replace("up_bias", _set(1, value=np.nan)), "at_shifted"),
    "a bias is infinite": (_replace("up_bias", _set(1, value=np.inf)), "at_shifted"),
    "a weight is subnormal": (_replace("down", _set(1, 1, value=1e-40)), "at_lowered"),
    "a share is too fine": (
        _replace("shares", lambda array: array.__iadd__(np.float32(2.0**-7))),
        "at_product",
    ),
    "the head's bias is -0.0": (
        _replace("head_bias", lambda array: array.fill(-0.0)),
        "logits",
    ),
    "the index is not bounded": (_without("near"), "at_weight"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_change_that_rounds_is_refused_with_the_name_of_the_node(mutation: str) -> None:
    spoil, name = MUTATIONS[mutation]
    network = ExactNetwork()
    spoil(network)
    proof = proof_of(network)
    assert not proof.proved
    assert proof.reasons[0].node == name, str(proof)
    assert str(proof).startswith(f"not proved: {name}, ")


def test_a_longer_length_is_refused_where_its_sums_have_no_entry_in_a_table() -> None:
    proof = proof_of(ExactNetwork(), length=LENGTH + 1)
    assert proof.reasons[0].node == "at_share"


def test_the_reason_says_how_many_terms_and_bits() -> None:
    proof = proof_of_nodes(
        node("Gather", ["table", "ids"], "x"),
        node("MatMul", ["x", "w"]),
        inputs={"ids": (INT64, ["n"])},
        constants={
            "table": np.full((4, 16), 4095, np.float32),
            "w": np.full((16, 2), 4097, np.float32),
        },
        ranges={"ids": (0, 3)},
    )
    assert str(proof) == (
        "not proved: at_y, a partial sum of 16 products may need 28.0 bits, and float32 has 24"
    )


def test_what_is_computed_from_a_loss_adds_no_reason_and_a_second_loss_does() -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node("Exp", ["x"], "e"),
        node("Add", ["e", "e"], "f"),
        node("Sqrt", ["x"], "s"),
        node("Add", ["s", "f"]),
        inputs={"ids": (INT64, [4])},
        ranges={"ids": (0, 9)},
    )
    assert [reason.node for reason in proof.reasons] == ["at_e", "at_s"]
    assert proof.reasons[0].op == "Exp"


def test_a_loss_that_no_output_depends_on_is_no_reason() -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], "y", to=FLOAT),
        node("Exp", ["y"], "unused"),
        inputs={"ids": (INT64, [4])},
        ranges={"ids": (0, 9)},
    )
    assert proof.proved


def test_a_float_input_may_hold_anything() -> None:
    proof = proof_of_nodes(node("Floor", ["x"]), inputs={"x": (FLOAT, [4])})
    assert proof.reasons[0].node == "at_y"
    assert "'x'" in proof.reasons[0].why


def test_a_float_input_with_a_range_is_a_grid_of_numbers() -> None:
    nodes = (node("Mul", ["x", "x"], "squares"), node("ReduceSum", ["squares", "axes"]))
    arguments: dict[str, Any] = {
        "inputs": {"x": (FLOAT, [4, 16])},
        "constants": {"axes": np.asarray([1])},
    }
    assert "--range x=LOW:HIGH/STEP" in str(proof_of_nodes(*nodes, **arguments))
    # An integer's range has no step, and says nothing of a float.
    assert not proof_of_nodes(*nodes, ranges={"x": (0, 1)}, **arguments).proved
    pixels = FloatRange(low=0, high=1, grid=-8)
    proof = proof_of_nodes(*nodes, ranges={"x": pixels}, **arguments)
    assert proof.proved
    assert proof.tensors["y"].bounds.high == 16
    assert proof.tensors["y"].bounds.grid == -16
    # 16 squares of 12 bits have 28.
    finer = FloatRange(low=0, high=1, grid=-12)
    assert not proof_of_nodes(*nodes, ranges={"x": finer}, **arguments).proved


def test_a_float_input_may_hold_negative_zeros() -> None:
    floor = node("Floor", ["x"])
    inputs = {"x": (FLOAT, [4])}
    zero, positive = (FloatRange(low=low, high=9, grid=-1) for low in (0, 0.5))
    assert "-0.0" in str(proof_of_nodes(floor, inputs=inputs, ranges={"x": zero}))
    assert proof_of_nodes(node("Neg", ["x"]), inputs=inputs, ranges={"x": positive}).proved


def test_a_wide_range_of_floats_has_24_bits() -> None:
    wide = FloatRange(low=0.25, high=2.0**30, grid=-2)
    inputs = {"x": (FLOAT, [4])}
    proof = proof_of_nodes(
        node("Mul", ["x", "c"]), inputs=inputs, constants={"c": np.float32(0.5)}, ranges={"x": wide}
    )
    assert proof.proved
    assert proof.tensors["x"].bounds.bits == 24
    assert not proof_of_nodes(node("Add", ["x", "x"]), inputs=inputs, ranges={"x": wide}).proved


def test_a_range_of_floats_for_integers_has_the_integers_in_it() -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], to=FLOAT),
        inputs={"ids": (INT64, [4])},
        ranges={"ids": FloatRange(low=-1.5, high=2.5, grid=-1)},
    )
    assert (proof.tensors["y"].bounds.low, proof.tensors["y"].bounds.high) == (-1, 2)


@pytest.mark.parametrize(
    ("low", "high", "grid", "why"),
    [
        (1, 0, 0, "must not be empty, got 1 to 0"),
        (float("nan"), 0, 0, "must not be empty"),
        (0, 1, -41, r"must be from 2\^-40 to 2\^40, got 2\^-41"),
        (0, 2.0**41, 0, r"must lie within 2\^40"),
    ],
)
def test_a_range_of_floats_that_the_proof_cannot_follow_is_refused(
    low: float, high: float, grid: int, why: str
) -> None:
    with pytest.raises(EvalmodeError, match=why):
        FloatRange(low=low, high=high, grid=grid)


def test_a_float_input_that_is_an_output_is_not_proved() -> None:
    proof = proof_of_nodes(node("Identity", ["x"]), inputs={"x": (FLOAT, [4])})
    assert not proof.proved


def test_an_integer_without_a_range_may_lie_outside_a_table() -> None:
    arguments: dict[str, Any] = {
        "inputs": {"ids": (INT64, ["n"])},
        "constants": {"table": np.ones((4, 2), np.float32)},
    }
    gather = node("Gather", ["table", "ids"])
    proof = proof_of_nodes(gather, **arguments)
    assert "--range" in str(proof)
    assert proof_of_nodes(gather, ranges={"ids": (-4, 3)}, **arguments).proved
    assert not proof_of_nodes(gather, ranges={"ids": (-5, 3)}, **arguments).proved
    assert not proof_of_nodes(gather, ranges={"ids": (0, 4)}, **arguments).proved


def test_a_sum_over_an_axis_of_any_length_needs_its_largest() -> None:
    nodes = (
        node("Cast", ["ids"], "x", to=FLOAT),
        node("ReduceSum", ["x", "axes"], keepdims=0),
    )
    arguments: dict[str, Any] = {
        "inputs": {"ids": (INT64, ["batch", "length"])},
        "constants": {"axes": np.asarray([1])},
        "ranges": {"ids": (0, 255)},
    }
    assert "--largest length=N" in str(proof_of_nodes(*nodes, **arguments))
    assert proof_of_nodes(*nodes, largest={"length": 65_793}, **arguments).proved
    assert not proof_of_nodes(*nodes, largest={"length": 65_794}, **arguments).proved
    assert proof_of_nodes(*nodes, largest={"ids:1": 100}, **arguments).proved


def test_two_inputs_with_the_same_axis_name_need_not_have_the_same_size() -> None:
    # The runtime accepts sizes 1 and 5 here, so the product's sums have up to 5 terms.
    proof = proof_of_nodes(
        node("Cast", ["a"], "x", to=FLOAT),
        node("Cast", ["b"], "z", to=FLOAT),
        node("Add", ["x", "z"], "sum"),
        node("ReduceSum", ["sum", "axes"]),
        inputs={"a": (INT64, ["n"]), "b": (INT64, ["n"])},
        constants={"axes": np.asarray([0])},
        ranges={"a": (0, 2**20), "b": (0, 2**20)},
        largest={"a:0": 1, "b:0": 9},
    )
    assert not proof.proved


def test_an_unknown_name_of_a_limit_is_refused_with_the_names_that_there_are() -> None:
    graph = graph_of(ExactNetwork().model())
    with pytest.raises(EvalmodeError, match=r"--range names id, .* it has ids"):
        prove(graph, ranges={"id": (0, 1)})
    with pytest.raises(EvalmodeError, match=r"--largest names len.*batch, ids:0, ids:1, length"):
        prove(graph, largest={"len": 1})
    with pytest.raises(EvalmodeError, match="range of ids is empty: 3 to 2 for int64"):
        prove(graph, ranges={"ids": (3, 2)})


def test_a_range_outside_of_the_type_is_empty() -> None:
    arguments: dict[str, Any] = {"inputs": {"ids": (TensorProto.UINT8, [4])}}
    with pytest.raises(EvalmodeError, match="is empty: -5 to -1 for uint8"):
        proof_of_nodes(node("Cast", ["ids"], to=FLOAT), ranges={"ids": (-5, -1)}, **arguments)


def test_an_axis_that_is_called_like_the_axis_of_an_input_is_another_one() -> None:
    # The limit of the second axis is not that of the first, whatever the file calls it.
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node("ReduceSum", ["x", "axes"]),
        inputs={"ids": (INT64, ["ids:1", "length"])},
        constants={"axes": np.asarray([0])},
        ranges={"ids": (0, 255)},
        largest={"ids:1": 32},
    )
    assert "may have any size" in str(proof)


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_other_float_types_are_not_followed(dtype: int) -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=dtype),
        node("Cast", ["x"], to=FLOAT),
        inputs={"ids": (INT64, [4])},
        ranges={"ids": (0, 1)},
    )
    assert proof.reasons[0].node == "at_x"
    assert "only float32 and integers" in proof.reasons[0].why


def test_an_operator_of_another_domain_or_opset_is_not_followed() -> None:
    arguments: dict[str, Any] = {"inputs": {"ids": (INT64, [4])}, "ranges": {"ids": (0, 1)}}
    assert "com.microsoft" in str(
        proof_of_nodes(node("Cast", ["ids"], to=FLOAT, domain="com.microsoft"), **arguments)
    )
    assert "opset 12" in str(proof_of_nodes(node("Cast", ["ids"], to=FLOAT), opset=12, **arguments))
    assert "opset 999" in str(
        proof_of_nodes(node("Cast", ["ids"], to=FLOAT), opset=999, **arguments)
    )
    assert "does not follow this operator" in str(
        proof_of_nodes(node("BitShift", ["ids", "ids"], direction="LEFT"), **arguments)
    )


def test_an_initializer_that_the_caller_may_override_is_not_known() -> None:
    proof = proof_of_nodes(
        node("Add", ["x", "w"]),
        inputs={"ids": (INT64, [4]), "w": (FLOAT, [4])},
        constants={"x": np.ones(4, np.float32), "w": np.ones(4, np.float32)},
    )
    assert proof.reasons[0].node == "w"
    assert "the caller may override it" in proof.reasons[0].why


def _function(op: str, domain: str = "mine") -> onnx.FunctionProto:
    return helper.make_function(
        domain,
        "Block",
        ["a"],
        ["b"],
        [helper.make_node(op, ["a"], ["b"], name="inner")],
        [helper.make_opsetid("", 20)],
    )


def _with_function(function: onnx.FunctionProto) -> onnx.ModelProto:
    proto = model(
        [
            node("Cast", ["ids"], "x", to=FLOAT),
            node("Block", ["x"], domain=function.domain),
        ],
        inputs={"ids": (INT64, [4])},
        functions=[function],
    )
    proto.opset_import.append(helper.make_opsetid(function.domain, 1))
    return proto


def test_a_function_is_followed_into_its_nodes() -> None:
    limits = {"ids": (0, 9)}
    assert prove(graph_of(_with_function(_function("Floor"))), ranges=limits).proved
    proof = prove(graph_of(_with_function(_function("Exp"))), ranges=limits)
    assert proof.reasons[0].node == "at_y/mine:Block/inner"


def test_a_function_of_a_runtimes_domain_is_not_followed() -> None:
    graph = graph_of(_with_function(_function("Floor", domain="com.microsoft")))
    proof = prove(graph, ranges={"ids": (0, 9)})
    assert "a runtime may have an operator of the name" in str(proof)


def _branch(name: str, op: str) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node(op, ["x"], [name], name=f"at_{name}")],
        name,
        [],
        [helper.make_tensor_value_info(name, FLOAT, [4])],
    )


def _if(first: str, second: str) -> Proof:
    branches = {"then_branch": _branch("a", first), "else_branch": _branch("b", second)}
    return proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node("Cast", ["switch"], "condition", to=TensorProto.BOOL),
        node("If", ["condition"], **branches),
        inputs={"ids": (INT64, [4]), "switch": (INT64, [])},
        ranges={"ids": (0, 9)},
    )


def test_both_branches_of_an_if_must_be_exact() -> None:
    assert _if("Floor", "Abs").proved
    proof = _if("Floor", "Sqrt")
    assert proof.reasons[0].node == "at_y/else_branch/at_b"
    assert "-0.0" in str(_if("Floor", "Neg"))


def test_a_loop_is_not_followed() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["again"]),
            helper.make_node("Add", ["state", "state"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [4]),
        ],
    )
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node("Loop", ["count", "", "x"], body=body),
        inputs={"ids": (INT64, [4])},
        constants={"count": np.asarray(2)},
        ranges={"ids": (0, 9)},
    )
    assert "a loop" in str(proof)


def test_a_comparison_of_what_rounds_is_not_known_either() -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node("Exp", ["x"], "e"),
        node("Greater", ["e", "x"], "mask"),
        node("Cast", ["mask"], to=FLOAT),
        inputs={"ids": (INT64, [4])},
        ranges={"ids": (0, 9)},
    )
    assert [reason.node for reason in proof.reasons] == ["at_e"]


def test_the_shape_of_what_rounds_is_known() -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node("Exp", ["x"], "e"),
        node("Shape", ["e"], "shape"),
        node("Cast", ["shape"], to=FLOAT),
        inputs={"ids": (INT64, [4, 7])},
    )
    assert proof.proved
    assert proof.tensors["shape"].bounds.high.tolist() == [4, 7]


def test_weights_in_a_file_and_in_memory_have_the_same_proof(tmp_path: Path) -> None:
    proto = ExactNetwork().model()
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    limits: dict[str, Any] = {
        "ranges": {"ids": (0, VOCABULARY - 1)},
        "largest": {"length": LENGTH},
    }
    for graph in (open_graph(path), read_graph(path.read_bytes(), name="model")):
        proof = prove(graph, **limits)
        assert proof.proved
        assert proof.widest == proof_of(ExactNetwork()).widest


def test_a_model_in_memory_whose_weights_are_elsewhere_is_not_proved() -> None:
    proto = ExactNetwork().model()
    weight = next(item for item in proto.graph.initializer if item.name == "down")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    proof = prove(graph_of(proto), ranges={"ids": (0, VOCABULARY - 1)}, largest={"length": LENGTH})
    assert proof.reasons[0].node == "at_lowered"
    assert "external file" in proof.reasons[0].why


def test_inputs_that_do_not_fit_one_another_are_a_reason_and_no_crash() -> None:
    proof = proof_of_nodes(
        node("Gather", ["table", "ids"], "x"),
        node("MatMul", ["x", "w"]),
        inputs={"ids": (INT64, [4])},
        constants={"table": np.ones((4, 3), np.float32), "w": np.ones((5, 2), np.float32)},
        ranges={"ids": (0, 3)},
    )
    assert not proof.proved


@pytest.mark.parametrize(
    ("op", "inputs"), [("ConstantOfShape", [""]), ("Sum", ["", "x"]), ("Gemm", ["", "x"])]
)
def test_a_node_without_its_first_input_is_a_reason_and_no_crash(
    op: str, inputs: list[str]
) -> None:
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        node(op, inputs),
        inputs={"ids": (INT64, [4, 4])},
        ranges={"ids": (0, 3)},
    )
    assert proof.reasons[0].node == "at_y"


def test_a_constant_node_is_read() -> None:
    value = numpy_helper.from_array(np.float32([0.5, 0.25]))
    proof = proof_of_nodes(
        node("Cast", ["ids"], "x", to=FLOAT),
        helper.make_node("Constant", [], ["c"], value=value),
        node("Mul", ["x", "c"]),
        inputs={"ids": (INT64, [4, 2])},
        ranges={"ids": (0, 9)},
    )
    assert proof.proved
    assert proof.tensors["y"].bounds.high.tolist() == [4.5, 2.25]
