"""Random graphs with a Dropout whose mode is computed from constants, and a runtime to run them.

The constants pass through element-wise operators, reductions, slices and shapes, in every type and
up to the limits of the integers. Some also pass through branches that shadow names, functions with
attribute references, overloads, and functions named like operators of the runtime. Some graphs are
not sorted.
"""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])
ONES = {"x": np.ones(64, np.float32)}
Typed = tuple[str, type[np.generic]]
# Twice the types that most operators of the runtime take.
DTYPES = (
    *(np.bool_, np.int32, np.int64) * 2,
    *(np.int8, np.uint8, np.float16, np.float32, np.float64),
)
SHAPES = ((), (1,), (0,), (3,), (2, 2), (1, 3), (150, 2))  # the last is mapped when it is read
INTEGERS = (0, 1, -1, 2, 3, 127, 128, 255, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63), 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-8, 2048.0, 65504.0, 1e30, -3.0, 1.0000001)


class Writer:
    """Builds one random model from the draws of `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.names = 0
        self.opset = chance.choice([12, 13, 17, 18, 20])

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def array(self, dtype: type[np.generic]) -> np.ndarray:
        shape = self.chance.choice(SHAPES)
        size = int(np.prod(shape))
        if np.dtype(dtype).kind == "f":
            values = [self.chance.choice(FLOATS) for _ in range(size)]
            with np.errstate(over="ignore"):
                return np.array(values, np.float64).astype(dtype).reshape(shape)
        if dtype is np.bool_:
            bits = [self.chance.random() < 0.5 for _ in range(size)]
            return np.array(bits, np.bool_).reshape(shape)
        width = 8 * np.dtype(dtype).itemsize
        words = [self.chance.choice(INTEGERS) % 2**width for _ in range(size)]
        return np.array(words, f"u{width // 8}").view(dtype).reshape(shape)

    def constant(self, array: np.ndarray) -> str:
        name, tensor = self.name(), numpy_helper.from_array(array)
        if self.chance.random() < 0.5:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            tensor.name = name
            self.initializers.append(tensor)
        return name

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def integers(self, *choices: int, count: int = 1) -> str:
        values = [self.chance.choice(choices) for _ in range(count)]
        return self.constant(np.array(values, np.int64))

    def value(self, pool: list[Typed], dtype: type[np.generic] | None = None) -> Typed:
        """A value of the pool or a new constant, of this type unless `dtype` is None."""
        fitting = [value for value in pool if dtype in (None, value[1])]
        if fitting and self.chance.random() < 0.7:
            return self.chance.choice(fitting)
        chosen = dtype or self.chance.choice(DTYPES)
        pool.append((self.constant(self.array(chosen)), chosen))
        return pool[-1]

    def step(self, pool: list[Typed]) -> Typed:
        """One more operator on values of the pool, mostly of types that the operator accepts."""
        pick = self.chance.choice
        first, dtype = self.value(pool)
        kind = pick(["binary", "unary", "compare", "logic", "cast", "reduce", "slice", "shape"])
        if kind == "binary":
            second, _ = self.value(pool, dtype)
            return self.node(pick(["Add", "Sub", "Mul", "Min", "Max"]), first, second), dtype
        if kind == "unary":
            ops = ["Not"] if dtype is np.bool_ else ["Neg", "Abs", "Sign", "Identity", "Floor"]
            return self.node(pick(ops), first), dtype
        if kind == "compare":
            second, _ = self.value(pool, dtype)
            return self.node(
                pick(["Equal", "Greater", "Less", "GreaterOrEqual"]), first, second
            ), np.bool_
        if kind == "logic":
            condition, _ = self.value(pool, np.bool_)
            second_condition, _ = self.value(pool, np.bool_)
            if self.chance.random() < 0.3:
                return self.node("Where", condition, first, self.value(pool, dtype)[0]), dtype
            return self.node(pick(["And", "Or", "Xor"]), condition, second_condition), np.bool_
        if kind == "cast":
            to = pick(DTYPES)
            code = int(helper.np_dtype_to_tensor_dtype(np.dtype(to)))
            return self.node("Cast", first, to=code), to
        if kind == "reduce":
            op, keep = pick(["ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin"]), pick([0, 1])
            if self.chance.random() < 0.5:
                return self.node(op, first, keepdims=keep), dtype
            if self.opset >= (13 if op == "ReduceSum" else 18):
                return self.node(op, first, self.integers(0, -1, 1), keepdims=keep), dtype
            return self.node(op, first, axes=[pick([0, -1, 1])], keepdims=keep), dtype
        if kind == "slice":
            sizes = (0, 1, -1, 2, -2, 5, -5, 2**62, -(2**62))
            start, end = self.integers(*sizes), self.integers(*sizes)
            axis, stride = self.integers(0, 0, -1, 1), self.integers(1, 1, -1, 2, -2)
            return self.node("Slice", first, start, end, axis, stride), dtype
        return self.shape_step(pool, first, dtype)

    def shape_step(self, pool: list[Typed], first: str, dtype: type[np.generic]) -> Typed:
        """One more operator on the shape or the layout of a value."""
        ops = ["Shape", "Size", "Squeeze", "Unsqueeze", "Gather", "Concat", "Reshape", "Expand"]
        op = self.chance.choice(ops)
        if op in ("Shape", "Size"):
            return self.node(op, first), np.int64
        if op == "Unsqueeze" and self.opset < 13:
            return self.node(op, first, axes=[0]), dtype
        if op == "Unsqueeze":
            return self.node(op, first, self.integers(0, -1)), dtype
        if op == "Gather":
            return self.node(op, first, self.integers(0, 1, -1)), dtype
        if op == "Concat":
            return self.node(op, first, self.value(pool, dtype)[0], axis=0), dtype
        if op in ("Reshape", "Expand"):
            count = self.chance.randrange(1, 3)
            return self.node(op, first, self.integers(1, 2, 3, -1, 0, count=count)), dtype
        return self.node(op, first), dtype

    def mode(self) -> str:
        """A boolean at the end of a random chain of operators."""
        pool: list[Typed] = []
        value = self.value(pool)
        for _ in range(self.chance.randrange(1, 6)):
            value = self.step(pool)
            pool.append(value)
        number = self.node("Cast", value[0], to=TensorProto.INT32)
        if self.chance.random() < 0.8:
            number = self.node("ReduceMax", number, keepdims=0)
        return self.node("Cast", number, to=TensorProto.BOOL)

    def disguise(self, mode: str) -> str:
        """The mode, passed through a construct that runtimes may read differently, or unchanged."""
        kind = self.chance.choice(["plain", "plain", "branch", "reference", "namesake", "overload"])
        if kind == "branch":
            bodies = {}
            for key in ("then_branch", "else_branch"):
                # A name of its own, or one that the graph around has too.
                name = self.chance.choice([self.name(), mode])
                array = np.array(self.chance.random() < 0.5)
                value = numpy_helper.from_array(array)
                inner = helper.make_node("Constant", [], [name], value=value)
                output = helper.make_tensor_value_info(name, TensorProto.BOOL, [])
                bodies[key] = helper.make_graph([inner], key, [], [output])
            return self.node("If", mode, **bodies)
        if kind == "reference":
            constant = helper.make_node("Constant", [], ["n"])
            field = constant.attribute.add(
                name="value_int", ref_attr_name="k", type=onnx.AttributeProto.INT
            )
            if self.chance.random() < 0.3:
                field.i = self.chance.randrange(2)  # a reference and a value
            cast = helper.make_node("Cast", ["n"], ["b"], to=TensorProto.BOOL)
            both = helper.make_node("And", ["b", "m"], ["o"])
            self.function("my", "f", ["m"], ["o"], [constant, cast, both], ["k"])
            return self.node("f", mode, domain="my", k=self.chance.randrange(2))
        if kind == "namesake":
            name = self.chance.choice(["Not", "Identity", "Constant"])
            domain = self.chance.choice(["", "my"])
            body = helper.make_node("Not", ["m"], ["n"]), helper.make_node("Not", ["n"], ["o"])
            self.function(domain, name, ["m"], ["o"], list(body), [])
            return self.node(name, mode, domain=domain)
        if kind == "overload":
            for overload, op in (("", "Identity"), ("other", "Not")):
                body = [helper.make_node(op, ["m"], ["o"])]
                self.function("my", "g", ["m"], ["o"], body, [])
                self.functions[-1].overload = overload
            chosen = self.node("g", mode, domain="my")
            self.nodes[-1].overload = self.chance.choice(["", "other"])
            return chosen
        return mode

    def function(
        self,
        domain: str,
        name: str,
        inputs: list[str],
        outputs: list[str],
        nodes: list[onnx.NodeProto],
        attributes: list[str],
    ) -> None:
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("my", 1)]
        self.functions.append(
            helper.make_function(domain, name, inputs, outputs, nodes, opsets, attributes)
        )

    def model(self) -> onnx.ModelProto:
        ratio = self.constant(np.float32(0.5))
        mode = self.disguise(self.mode())
        self.nodes.append(helper.make_node("Dropout", ["x", ratio, mode], ["y"], name="drop"))
        if self.chance.random() < 0.3:
            self.chance.shuffle(self.nodes)
        graph = helper.make_graph(self.nodes, "main", [X], [Y], self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("my", 1)]
        return helper.make_model(
            graph, opset_imports=opsets, functions=self.functions, ir_version=10
        )


class Runtime:
    """ONNX Runtime in a child process, since it aborts on some graphs."""

    def __init__(self) -> None:
        self.pool = self.start()

    def start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def drops(self, model: onnx.ModelProto) -> set[bool]:
        """Whether the runtime drops, with optimisation off and on; empty for a refused model."""
        try:
            return self.pool.submit(drops, model.SerializeToString()).result()
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = self.start()
            return set()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_error: object) -> None:
        self.pool.shutdown()


def drops(model: bytes) -> set[bool]:
    """Whether an output differs from its input of 64 ones, at each level of optimisation.

    A dropout at rate 0.5 leaves all 64 unchanged in one of 2^64 runs.
    """
    results = set()
    for level in (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            (y,) = session.run(None, ONES)
        except Exception:  # a refused graph; the exceptions of ONNX Runtime share no base class
            continue
        results.add(bool((np.asarray(y) != 1).any()))
    return results
