"""Small random graphs that compute with numbers of few bits, and two other ways to evaluate them.

`fractions_of` computes every tensor in exact rational arithmetic. `float32_of` computes in float32
with sums in a random order. Most graphs are exact; some round in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from evalmode.export.exact.limits import FloatRange

Array = np.ndarray[Any, Any]

VOCABULARY = 6
ROWS, POSITIONS = 2, 3
IDS = (ROWS, POSITIONS)
NUMBERS = 3
OPSET = 18

# Types of integers, each with the range from which limits are drawn.
_RANGES = [
    (TensorProto.UINT8, 0, 255),
    (TensorProto.INT8, -128, 127),
    (TensorProto.INT32, -(2**20), 2**20),
    (TensorProto.INT64, -(2**20), 2**20),
]


@dataclass
class RandomGraph:
    """A graph in the making; `pool` names float tensors, each (ROWS, POSITIONS, its channels).

    `numbers_range` is the range of a float input "numbers" of NUMBERS channels, if it has one.
    """

    rng: np.random.Generator
    numbers_range: FloatRange | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    pool: dict[str, int] = field(default_factory=dict)

    def constant(self, array: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [name], name=f"{op}_{len(self.nodes)}", **attributes)
        )
        return name

    def numbers(self, *shape: int) -> Array:
        """Integers of a few bits times powers of two; sometimes spoilt in one place."""
        bits = int(self.rng.integers(1, 12))
        array = self.rng.integers(-(2**bits), 2**bits + 1, shape).astype(np.float32)
        exponents = self.rng.integers(-6, 7, shape[-1:] if self.rng.random() < 0.5 else ())
        array = np.asarray(array * np.exp2(exponents).astype(np.float32))
        if array.size:
            position = tuple(int(self.rng.integers(size)) for size in shape)
            match self.rng.integers(30):
                case 0:
                    array[position] = 0.1
                case 1:
                    array[position] = -0.0
                case 2:
                    array[position] = np.nextafter(array[position], np.float32(np.inf))
                case 3:
                    array[position] = 2.0**30
                case 4:
                    array[position] = 1e-39
                case 5:
                    array = np.zeros_like(array)
                case 6:
                    array = np.abs(array)
        return array

    def pick(self) -> tuple[str, int]:
        names = list(self.pool)
        # Later tensors are more interesting.
        name = names[-1 - int(len(names) * self.rng.random() ** 2)]
        return name, self.pool[name]


def random_graph(rng: np.random.Generator) -> RandomGraph:
    graph = RandomGraph(rng)
    for _ in range(int(rng.integers(1, 3))):
        channels = int(rng.integers(1, 5))
        table = graph.constant(graph.numbers(VOCABULARY, channels))
        graph.pool[graph.node("Gather", table, "ids", axis=0)] = channels
    if rng.random() < 0.3:
        grid = int(rng.integers(-9, 4))
        low, high = sorted(rng.integers(-40, 400, 2).tolist())
        graph.numbers_range = FloatRange(low=low * 2.0**grid, high=high * 2.0**grid, grid=grid)
        graph.pool["numbers"] = NUMBERS
    steps = [step for step, weight in _STEPS.items() for _ in range(weight)]
    for _ in range(int(rng.integers(1, 9))):
        steps[int(rng.integers(len(steps)))](graph)
    return graph


def model_of(graph: RandomGraph) -> onnx.ModelProto:
    """The model, whose output is the last tensor."""
    last = graph.nodes[-1].output[0]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, IDS)]
    if graph.numbers_range is not None:
        shape = (*IDS, NUMBERS)
        inputs.append(helper.make_tensor_value_info("numbers", TensorProto.FLOAT, shape))
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "random",
            inputs,
            [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,
    )


def inputs_of(graph: RandomGraph, rng: np.random.Generator) -> dict[str, Array]:
    """Random inputs; a zero among the numbers is sometimes -0.0."""
    inputs = {"ids": rng.integers(0, VOCABULARY, IDS)}
    numbers = graph.numbers_range
    if numbers is not None:
        step = 2.0**numbers.grid
        steps = rng.integers(numbers.low / step, numbers.high / step + 1, (*IDS, NUMBERS))
        steps[rng.random(steps.shape) < 0.2] = np.clip(0, numbers.low / step, numbers.high / step)
        array = (steps * step).astype(np.float32)
        is_negative = (array == 0) & (rng.random(array.shape) < 0.5)
        inputs["numbers"] = np.where(is_negative, np.float32(-0.0), array)
    return inputs


def _binary(graph: RandomGraph) -> None:
    op = str(graph.rng.choice(["Add", "Sub", "Mul", "Max", "Min", "Add", "Mul"]))
    x, channels = graph.pick()
    same = [name for name, size in graph.pool.items() if size == channels]
    if graph.rng.random() < 0.3:
        other = str(graph.rng.choice(same))
    else:
        shape = [(), (1,), (channels,)][int(graph.rng.integers(3))]
        other = graph.constant(graph.numbers(*shape) if shape else graph.numbers(1).reshape(()))
    inputs = (x, other) if graph.rng.random() < 0.7 else (other, x)
    graph.pool[graph.node(op, *inputs)] = channels


def _unary(graph: RandomGraph) -> None:
    op = str(graph.rng.choice(["Floor", "Ceil", "Round", "Relu", "Neg", "Abs", "Floor", "Sign"]))
    x, channels = graph.pick()
    graph.pool[graph.node(op, x)] = channels


def _clip(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    low = float(graph.rng.choice([-128, -5.5, -1, 0, 3, -np.inf]))
    high = low + float(graph.rng.choice([0.5, 16, 255, -1, np.inf]))
    if np.isnan(high):
        high = np.inf
    limits = [graph.constant(np.asarray(limit, np.float32)) for limit in (low, high)]
    if graph.rng.random() < 0.2:
        limits[int(graph.rng.integers(2))] = ""
    graph.pool[graph.node("Clip", x, *limits)] = channels


def _matrix_product(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    columns = int(graph.rng.integers(1, 5))
    weights = graph.constant(graph.numbers(channels, columns))
    graph.pool[graph.node("MatMul", x, weights)] = columns


def _scores(graph: RandomGraph) -> None:
    a, channels = graph.pick()
    same = [name for name, size in graph.pool.items() if size == channels]
    b = graph.node("Transpose", str(graph.rng.choice(same)), perm=[0, 2, 1])
    graph.pool[graph.node("MatMul", a, b)] = POSITIONS


def _reduce(graph: RandomGraph) -> None:
    op = str(graph.rng.choice(["ReduceSum", "ReduceSumSquare", "ReduceMax", "ReduceMin"]))
    if graph.rng.random() < 0.2:
        op = "ReduceMean"
    x, channels = graph.pick()
    axis = int(graph.rng.choice([1, 2]))
    axes = graph.constant(np.asarray([axis], np.int64))
    reduced = graph.node(op, x, axes, keepdims=1)
    if axis == 2:
        graph.pool[reduced] = 1
        return
    graph.pool[graph.node("Sub" if graph.rng.random() < 0.5 else "Max", reduced, x)] = channels


def _where(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    same = [name for name, size in graph.pool.items() if size == channels]
    other = str(graph.rng.choice(same))
    limit = graph.constant(graph.numbers(1))
    condition = graph.node(str(graph.rng.choice(["Greater", "LessOrEqual"])), x, limit)
    graph.pool[graph.node("Where", condition, x, other)] = channels


def _lookup(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    size = int(graph.rng.choice([4, 16, 64]))
    limits = [graph.constant(np.asarray(limit, np.float32)) for limit in (0, size - 1)]
    # A cast to integers needs no Floor before it: it drops the fraction.
    if graph.rng.random() < 0.5:
        x = graph.node("Floor", x)
    clipped = graph.node("Clip", x, *limits)
    index = graph.node("Cast", clipped, to=TensorProto.INT64)
    graph.pool[graph.node("Gather", graph.constant(graph.numbers(size)), index, axis=0)] = channels


def _integers(graph: RandomGraph) -> None:
    """To integers and back: fractions are dropped, also those of negative numbers."""
    x, channels = graph.pick()
    to, low, high = _RANGES[int(graph.rng.integers(len(_RANGES)))]
    low, high = int(graph.rng.integers(low, high)), int(graph.rng.integers(low, high + 1))
    # Now and then a limit is half a unit beyond the type, or the number is not clipped at all.
    edge = float(graph.rng.choice([0.0, 0.0, 0.0, 0.5]))
    limits = sorted([low - edge, high + edge])
    if graph.rng.random() < 0.9:
        names = [graph.constant(np.asarray(limit, np.float32)) for limit in limits]
        x = graph.node("Clip", x, *names)
    integers = graph.node("Cast", x, to=to)
    graph.pool[graph.node("Cast", integers, to=TensorProto.FLOAT)] = channels


def _concat(graph: RandomGraph) -> None:
    (a, first), (b, second) = graph.pick(), graph.pick()
    graph.pool[graph.node("Concat", a, b, axis=-1)] = first + second


def _slice(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    start = int(graph.rng.integers(channels))
    bounds = [graph.constant(np.asarray([value], np.int64)) for value in (start, channels, -1)]
    graph.pool[graph.node("Slice", x, *bounds)] = channels - start


def _reshape(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    if channels % 2:
        return
    wide = graph.constant(np.asarray([ROWS, POSITIONS, channels // 2, 2], np.int64))
    back = graph.constant(np.asarray([0, 0, -1], np.int64))
    perm = [0, 1, 3, 2] if graph.rng.random() < 0.5 else [0, 1, 2, 3]
    turned = graph.node("Transpose", graph.node("Reshape", x, wide), perm=perm)
    graph.pool[graph.node("Reshape", turned, back)] = channels


def _rounding(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    if graph.rng.random() < 0.5:
        other = graph.constant(np.asarray(3.0, np.float32))
        graph.pool[graph.node("Div", x, other)] = channels
    else:
        graph.pool[graph.node("Sigmoid", x)] = channels


def _cumulate(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    axis = graph.constant(np.asarray(int(graph.rng.choice([1, 2])), np.int64))
    graph.pool[graph.node("CumSum", x, axis)] = channels


def _gemm(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    columns = int(graph.rng.integers(1, 5))
    flat = graph.node("Reshape", x, graph.constant(np.asarray([-1, channels], np.int64)))
    transposed = int(graph.rng.integers(2))
    shape = (columns, channels) if transposed else (channels, columns)
    inputs = [flat, graph.constant(graph.numbers(*shape))]
    if graph.rng.random() < 0.7:
        inputs.append(graph.constant(graph.numbers(*[(columns,), (1,)][graph.rng.integers(2)])))
    product = graph.node("Gemm", *inputs, transB=transposed)
    back = graph.constant(np.asarray([ROWS, POSITIONS, columns], np.int64))
    graph.pool[graph.node("Reshape", product, back)] = columns


def _convolve(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    columns = int(graph.rng.integers(1, 5))
    turned = graph.node("Transpose", x, perm=[0, 2, 1])
    inputs = [turned, graph.constant(graph.numbers(columns, channels)[..., None])]
    if graph.rng.random() < 0.7:
        inputs.append(graph.constant(graph.numbers(columns)))
    graph.pool[graph.node("Transpose", graph.node("Conv", *inputs), perm=[0, 2, 1])] = columns


def _einsum(graph: RandomGraph) -> None:
    a, channels = graph.pick()
    b = str(graph.rng.choice([name for name, size in graph.pool.items() if size == channels]))
    graph.pool[graph.node("Einsum", a, b, equation="bpc,bqc->bpq")] = POSITIONS


def _pad(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    pads = graph.constant(np.asarray([0, 0, 1, 0, 0, 1], np.int64))
    graph.pool[graph.node("Pad", x, pads, graph.constant(graph.numbers(1).reshape(())))] = (
        channels + 2
    )


def _one_hot(graph: RandomGraph) -> None:
    depth = int(graph.rng.integers(1, 5))
    inputs = [graph.constant(np.asarray(depth, np.int64)), graph.constant(graph.numbers(2))]
    graph.pool[graph.node("OneHot", "ids", *inputs)] = depth


def _arg_max(graph: RandomGraph) -> None:
    x, _ = graph.pick()
    index = graph.node("ArgMax", x, axis=-1, keepdims=1)
    graph.pool[graph.node("Cast", index, to=TensorProto.FLOAT)] = 1


def _integers_and_back(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    integers = graph.node("Cast", graph.node("Floor", x), to=TensorProto.INT32)
    graph.pool[graph.node("Cast", integers, to=TensorProto.FLOAT)] = channels


def _if(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    largest = graph.node("ReduceMax", "ids", keepdims=0)
    limit = graph.constant(np.asarray(VOCABULARY - 2, np.int64))
    condition = graph.node("Greater", largest, limit)
    branches = {}
    for name in ("then_branch", "else_branch"):
        op = str(graph.rng.choice(["Floor", "Abs", "Relu", "Neg", "Identity", "Floor"]))
        result = f"{name}_{len(graph.nodes)}"
        branches[name] = helper.make_graph(
            [helper.make_node(op, [x], [result], name=f"{op}_{result}")],
            name,
            [],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        )
    graph.pool[graph.node("If", condition, **branches)] = channels


BYTES = {TensorProto.UINT8: (np.uint8, 0, 255), TensorProto.INT8: (np.int8, -128, 127)}


def _bytes(graph: RandomGraph) -> tuple[str, int, int]:
    """A tensor of bytes, its channels and its type."""
    x, channels = graph.pick()
    kind = int(graph.rng.choice(list(BYTES)))
    limits = [graph.constant(np.asarray(limit, np.float32)) for limit in BYTES[kind][1:]]
    clipped = graph.node("Clip", graph.node("Floor", x), *limits)
    return graph.node("Cast", clipped, to=kind), channels, kind


def _scale(graph: RandomGraph) -> str:
    scale = 0.3 if graph.rng.random() < 0.1 else 2.0 ** int(graph.rng.integers(-9, 3))
    return graph.constant(np.asarray(scale, np.float32))


def _zero_point(graph: RandomGraph, kind: int) -> str:
    dtype, low, high = BYTES[kind]
    return graph.constant(np.asarray(graph.rng.integers(low, high + 1), dtype))


def _dequantize(graph: RandomGraph) -> None:
    x, channels, kind = _bytes(graph)
    inputs = [x, _scale(graph)]
    if graph.rng.random() < 0.5:
        inputs.append(_zero_point(graph, kind))
    graph.pool[graph.node("DequantizeLinear", *inputs)] = channels


def _byte_weights(graph: RandomGraph, channels: int) -> tuple[str, int]:
    columns = int(graph.rng.integers(1, 5))
    return graph.constant(
        graph.rng.integers(-127, 128, (channels, columns)).astype(np.int8)
    ), columns


def _integer_product(graph: RandomGraph) -> None:
    x, channels, kind = _bytes(graph)
    weights, columns = _byte_weights(graph, channels)
    inputs = [x, weights]
    if graph.rng.random() < 0.5:
        inputs += [_zero_point(graph, kind), _zero_point(graph, TensorProto.INT8)]
    sums = graph.node("MatMulInteger", *inputs)
    if graph.rng.random() < 0.5:
        graph.pool[graph.node("DequantizeLinear", sums, _scale(graph))] = columns
    else:
        graph.pool[graph.node("Cast", sums, to=TensorProto.FLOAT)] = columns


def _dequantized_weights(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    weights, columns = _byte_weights(graph, channels)
    matrix = graph.node("DequantizeLinear", weights, _scale(graph))
    graph.pool[graph.node("MatMul", x, matrix)] = columns


def _quantize(graph: RandomGraph) -> None:
    x, channels = graph.pick()
    scale, zero = _scale(graph), _zero_point(graph, TensorProto.INT8)
    quantized = graph.node("QuantizeLinear", x, scale, zero)
    graph.pool[graph.node("DequantizeLinear", quantized, scale, zero)] = channels


_STEPS: dict[Callable[[RandomGraph], None], int] = {
    _binary: 10,
    _unary: 5,
    _clip: 4,
    _matrix_product: 5,
    _scores: 2,
    _reduce: 4,
    _where: 2,
    _lookup: 2,
    _integers: 3,
    _concat: 1,
    _slice: 1,
    _reshape: 1,
    _rounding: 1,
    _cumulate: 1,
    _dequantize: 2,
    _integer_product: 2,
    _dequantized_weights: 1,
    _quantize: 1,
    _gemm: 2,
    _convolve: 1,
    _einsum: 1,
    _pad: 1,
    _one_hot: 1,
    _arg_max: 1,
    _integers_and_back: 1,
    _if: 1,
}

# The exact value of these is not a number of few bits, or not defined.
_NOT_EXACT = ("Div", "Sigmoid", "QuantizeLinear")


_fractions = np.frompyfunc(lambda value: Fraction(float(value)), 1, 1)


def fractions_of(graph: RandomGraph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor in exact rational arithmetic; those behind a rounding operator are left out."""
    tensors: dict[str, Array] = {}
    for name, array in {**inputs, **graph.constants}.items():
        if array.dtype == np.float32 and np.isfinite(array).all():
            tensors[name] = np.asarray(_fractions(array), object)
        else:
            tensors[name] = array
    for node in graph.nodes:
        is_known = all(
            name in tensors for name in [*node.input, *names_read_by_branches(node)] if name
        )
        if node.op_type not in _NOT_EXACT and is_known:
            tensors[node.output[0]] = _evaluate(node, tensors, _in_order)
    return tensors


def names_read_by_branches(node: onnx.NodeProto) -> list[str]:
    """What the branches of an If read from outside."""
    return [name for branch in _branches(node).values() for name in branch.input]


def _branches(node: onnx.NodeProto) -> dict[str, onnx.NodeProto]:
    """The one node of each branch of an If."""
    if node.op_type != "If":
        return {}
    return {attribute.name: attribute.g.node[0] for attribute in node.attribute}


def float32_of(
    graph: RandomGraph, inputs: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, Array]:
    """Every tensor in float32, with each sum in a random order and from either kind of start."""

    def shuffled(terms: Array) -> Array:
        order = rng.permutation(len(terms))
        total = np.zeros(terms.shape[1:], terms.dtype)
        if len(terms) and rng.random() < 0.5:
            total, order = terms[order[0]].copy(), order[1:]
        if rng.random() < 0.5 and len(order) > 2:  # in two parts
            half = len(order) // 2
            other = terms[order[half]].copy()
            for index in order[half + 1 :]:
                other = other + terms[index]
            for index in order[:half]:
                total = total + terms[index]
            return np.asarray(total + other)
        for index in order:
            total = total + terms[index]
        return np.asarray(total)

    tensors: dict[str, Array] = {**inputs, **graph.constants}
    for node in graph.nodes:
        tensors[node.output[0]] = _evaluate(node, tensors, shuffled)
    return tensors


def _in_order(terms: Array) -> Array:
    return np.asarray(terms.sum(axis=0))


def _evaluate(
    node: onnx.NodeProto, tensors: Mapping[str, Array], total: Callable[[Array], Array]
) -> Array:
    """One node; `total` adds up the first axis of an array."""
    if node.op_type == "If":
        branch = "then_branch" if tensors[node.input[0]] else "else_branch"
        return _evaluate(_branches(node)[branch], tensors, total)
    inputs: list[Any] = [tensors.get(name) for name in node.input]
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    x = inputs[0]
    is_float = getattr(x, "dtype", None) == np.float32

    def rounded(function: Callable[[Any], Any]) -> Array:
        kind = np.float32 if is_float else object
        return np.asarray(np.frompyfunc(function, 1, 1)(x), kind)

    match node.op_type:
        case "Gather":
            return np.take(x, np.asarray(inputs[1], np.int64), axis=attributes["axis"])
        case "Add":
            return np.asarray(x + inputs[1])
        case "Sub":
            return np.asarray(x - inputs[1])
        case "Mul":
            return np.asarray(x * inputs[1])
        case "Div":
            return np.asarray(x / inputs[1])
        case "Sigmoid":
            with np.errstate(over="ignore"):
                return np.asarray(1 / (1 + np.exp(-x)))
        case "Max":
            return np.asarray(np.maximum(x, inputs[1]))
        case "Min":
            return np.asarray(np.minimum(x, inputs[1]))
        case "Floor":
            return np.floor(x) if is_float else rounded(lambda value: Fraction(value // 1))
        case "Ceil":
            return np.ceil(x) if is_float else rounded(lambda value: Fraction(-(-value // 1)))
        case "Round":
            return np.rint(x) if is_float else rounded(lambda value: Fraction(round(value)))
        case "Relu":
            return np.asarray(np.maximum(x, x.dtype.type(0) if is_float else Fraction(0)))
        case "Neg":
            return np.asarray(-x)
        case "Abs":
            return np.asarray(np.abs(x))
        case "Sign":
            return np.sign(x) if is_float else rounded(lambda v: Fraction((v > 0) - (v < 0)))
        case "Clip":
            result = x
            for limit, function in zip(inputs[1:], (np.maximum, np.minimum), strict=True):
                if limit is not None and np.all(np.abs(np.asarray(limit, float)) != np.inf):
                    result = function(result, limit)
            return np.asarray(result)
        case "MatMul":
            products = x[..., :, None] * inputs[1][..., None, :, :]  # (..., M, K, N)
            return total(np.moveaxis(products, -2, 0))
        case "Gemm":
            weights = inputs[1].T if attributes["transB"] else inputs[1]
            result = total(np.moveaxis(x[:, :, None] * weights[None], 1, 0))
            return result if len(inputs) < 3 else np.asarray(result + inputs[2])
        case "Conv":
            products = x[:, None] * inputs[1][None]  # (B, N, K, T)
            result = total(np.moveaxis(products, 2, 0))
            return result if len(inputs) < 3 else np.asarray(result + inputs[2][:, None])
        case "Einsum":
            products = x[:, :, None] * inputs[1][:, None]  # (B, P, Q, C)
            return total(np.moveaxis(products, -1, 0))
        case "Pad":
            side = np.full((*x.shape[:2], 1), inputs[2])
            return np.concatenate([side, x, side], axis=-1)
        case "OneHot":
            is_hot = np.asarray(x)[..., None] == np.arange(int(inputs[1]))
            return np.asarray(np.where(is_hot, inputs[2][1], inputs[2][0]))
        case "ArgMax":
            return np.asarray(np.argmax(x, axis=-1)[..., None])
        case "Identity":
            return np.asarray(x)
        case "Transpose":
            return np.transpose(x, attributes["perm"])
        case "ReduceSum":
            return np.expand_dims(total(np.moveaxis(x, inputs[1][0], 0)), inputs[1][0])
        case "ReduceSumSquare":
            return np.expand_dims(total(np.moveaxis(x * x, inputs[1][0], 0)), inputs[1][0])
        case "ReduceMean":
            count = x.shape[inputs[1][0]]
            divisor = np.float32(count) if is_float else Fraction(count)
            result = total(np.moveaxis(x, inputs[1][0], 0)) / divisor
            return np.expand_dims(np.asarray(result), inputs[1][0])
        case "ReduceMax":
            if len(inputs) == 1:
                return np.asarray(x.max())
            return np.asarray(x.max(axis=inputs[1][0], keepdims=True))
        case "ReduceMin":
            return np.asarray(x.min(axis=inputs[1][0], keepdims=True))
        case "CumSum":
            return np.asarray(np.cumsum(x, axis=int(inputs[1])))
        case "Greater":
            return np.asarray(x > inputs[1], bool)
        case "LessOrEqual":
            return np.asarray(x <= inputs[1], bool)
        case "Where":
            return np.asarray(np.where(x, inputs[1], inputs[2]))
        case "Cast" if attributes["to"] == TensorProto.FLOAT:
            return np.asarray(x, np.float32) if total is not _in_order else _fractions(x)
        case "Cast":
            # No proof follows larger numbers, and NumPy does not convert them.
            return np.asarray(np.clip(x, -(2**62), 2**62), np.int64)
        case "DequantizeLinear":
            zero = inputs[2] if len(inputs) > 2 else 0
            integers = np.asarray(x, np.int64) - np.asarray(zero, np.int64)
            if inputs[1].dtype == object:
                return np.asarray(_fractions(integers) * inputs[1], object)
            return np.asarray(integers.astype(np.float32) * inputs[1])
        case "QuantizeLinear":
            integers = np.nan_to_num(np.rint(x / inputs[1])) + np.float32(inputs[2])
            return np.clip(integers, -128, 127).astype(np.int64)
        case "MatMulInteger":
            a, b = (np.asarray(part, np.int64) for part in inputs[:2])
            if len(inputs) > 2:
                a, b = a - np.int64(inputs[2]), b - np.int64(inputs[3])
            return np.asarray(a @ b)
        case "Concat":
            return np.concatenate(inputs, axis=-1)
        case "Slice":
            return np.asarray(x[..., inputs[1][0] : inputs[2][0]])
        case "Reshape":
            sizes = [x.shape[i] if size == 0 else int(size) for i, size in enumerate(inputs[1])]
            return np.asarray(x.reshape(sizes))
    raise AssertionError(f"no evaluation of {node.op_type}")
