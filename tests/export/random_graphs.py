"""Random ONNX graphs with and without hidden randomness, and the true verdict on each.

The truth is recorded while a graph is built, and not computed by a verifier. The truth about a node
in a function depends on the inputs and attributes of the call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.certificate import Verdict

# What a mode is under a call: on, off, or for someone else to say.
Mode = bool | None
Call = Mapping[str, Mode]
Truth = Callable[[Call], Mode]
"""True: certainly random. None: undecided, or decided by the caller. False: not random."""

DEEPEST = 4


@dataclass
class Scope:
    """A graph or function body under construction: its nodes, and the modes visible in it."""

    depth: int
    opset: int
    modes: list[tuple[str, Truth]] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)
    in_function: bool = False
    flow: str = "x"


@dataclass(frozen=True)
class Function:
    """A local function (x, m) -> y with an attribute `flag`, and the truth about its body."""

    name: str
    truths: tuple[Truth, ...]
    needs_a_mode: bool


def constant_truth(value: Mode) -> Truth:
    return lambda call: value


def combine(truths: list[Truth] | tuple[Truth, ...], call: Call) -> Mode:
    modes = [truth(call) for truth in truths]
    return True if True in modes else None if None in modes else False


class Writer:
    """Builds one random model from the draws of `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])]
        self.functions: list[Function] = []
        self.protos: list[onnx.FunctionProto] = []
        self.names = 0
        self.called: set[str] = set()
        # Whether the function under construction computes with its input `m`.
        self.needs_a_mode = False

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def model(self) -> tuple[onnx.ModelProto, Verdict]:
        """A model, and the verdict of a perfect verifier on it."""
        main = Scope(depth=0, opset=20)
        for _ in range(self.chance.randrange(3)):
            self.function()
        self.overridable: list[onnx.TensorProto] = []
        self.steps(main)
        uncalled_functions = [item for item in self.functions if item.name not in self.called]
        uncalled_truths = [
            constant_truth(combine(item.truths, {"m": None, "flag": None}))
            for item in uncalled_functions
        ]
        graph = helper.make_graph(
            main.nodes,
            "main",
            self.inputs,
            [helper.make_tensor_value_info(main.flow, TensorProto.FLOAT, [4])],
            [*main.initializers, *self.overridable],
        )
        opsets = [
            helper.make_opsetid(domain, version)
            for domain, version in (("", 20), ("my", 1), ("com.microsoft", 1))
        ]
        model = helper.make_model(graph, opset_imports=opsets, functions=self.protos, ir_version=10)
        truth = combine([*main.truths, *uncalled_truths], {})
        return model, {True: Verdict.FAIL, None: Verdict.UNPROVEN, False: Verdict.PASS}[truth]

    def function(self) -> None:
        """Define a function, which may call the functions before it."""
        self.needs_a_mode = False
        name, opset = self.name("f"), self.chance.choice([14, 20])
        body = Scope(depth=1, opset=opset, in_function=True, flags=["flag"])
        body.modes.append(("m", lambda call: call["m"]))
        self.steps(body)
        imports = [
            helper.make_opsetid("", opset),
            helper.make_opsetid("my", 1),
            helper.make_opsetid("com.microsoft", 1),
        ]
        defaults = [helper.make_attribute("flag", 0)]
        self.protos.append(
            helper.make_function(
                "my", name, ["x", "m"], [body.flow], body.nodes, imports, attribute_protos=defaults
            )
        )
        self.functions.append(Function(name, tuple(body.truths), self.needs_a_mode))

    def steps(self, scope: Scope) -> None:
        kinds = (
            [self.plain] * 5
            + [self.dropout] * 4
            + [self.batch_normalization, self.lookalike, self.call, self.call]
        )
        if scope.depth < DEEPEST:
            kinds += [self.branch, self.loop, self.scan] * 2
        if self.chance.random() < 0.15:
            kinds += [self.random, self.opaque]
        for _ in range(self.chance.randrange(1, 4)):
            self.chance.choice(kinds)(scope)
        self.plain(scope)

    def node(
        self, scope: Scope, op: str, inputs: list[str], outputs: int = 1, **attributes: object
    ) -> list[str]:
        names = [self.name("v") for _ in range(outputs)]
        node_name = self.chance.choice(["", self.name("node")])
        scope.nodes.append(helper.make_node(op, inputs, names, name=node_name, **attributes))
        return names

    def plain(self, scope: Scope) -> None:
        (scope.flow,) = self.node(
            scope, self.chance.choice(["Relu", "Identity", "Tanh"]), [scope.flow]
        )

    def random(self, scope: Scope) -> None:
        op, domain = self.chance.choice(
            [
                *(("RandomUniformLike", ""), ("RandomNormalLike", ""), ("Multinomial", "")),
                *(("Bernoulli", ""), ("Bernoulli", "ai.onnx"), ("Sampling", "com.microsoft")),
            ]
        )
        (drawn,) = self.node(scope, op, [scope.flow], domain=domain)
        scope.truths.append(constant_truth(True))
        if self.chance.random() < 0.5:  # otherwise the drawn numbers are unused
            (scope.flow,) = self.node(scope, "Mul", [scope.flow, drawn])

    def opaque(self, scope: Scope) -> None:
        op = self.chance.choice(["Relu", "RandomUniformLike", "Dropout", "ATen"])
        domain = self.chance.choice(["unheard.of", "org.pytorch.aten"])
        (scope.flow,) = self.node(scope, op, [scope.flow], domain=domain)
        scope.truths.append(constant_truth(None))

    def lookalike(self, scope: Scope) -> None:
        """Call a function such as `my::Dropout` that does nothing."""
        op = self.chance.choice(["Dropout", "RandomUniformLike", "Bernoulli"])
        if op not in {item.name for item in self.protos}:
            identity = helper.make_node("Identity", ["x"], ["y"])
            self.protos.append(
                helper.make_function(
                    "my", op, ["x"], ["y"], [identity], [helper.make_opsetid("", 20)]
                )
            )
        (scope.flow,) = self.node(scope, op, [scope.flow], domain="my")

    def dropout(self, scope: Scope) -> None:
        if self.chance.random() < 0.2:
            (scope.flow,) = self.node(scope, "Dropout", [scope.flow])
            return
        mode, truth = self.mode(scope, may_be_absent=True)
        ratio, drops = self.chance.choice([("", True), ("", True), (0.5, True), (0.0, False)])
        if ratio != "":
            ratio = self.constant(scope, np.float32(ratio))
        op, inputs, domain = self.chance.choice(
            [("Dropout", [scope.flow, ratio, mode], "")] * 4
            + [("BitmaskDropout", [scope.flow, ratio, mode], "com.microsoft")]
            + [("BiasDropout", [scope.flow, scope.flow, "", ratio, mode], "com.microsoft")]
        )
        (scope.flow,) = self.node(scope, op, inputs, domain=domain)
        scope.truths.append(truth if drops else constant_truth(False))

    def batch_normalization(self, scope: Scope) -> None:
        node = helper.make_node("BatchNormalization", [scope.flow] * 5, [self.name("v")])
        scope.nodes.append(node)
        scope.flow = node.output[0]
        kind = self.chance.choice(["on", "off", "absent", *["caller's"] * 4 * bool(scope.flags)])
        if kind == "caller's":
            node.attribute.add(
                name="training_mode", ref_attr_name="flag", type=onnx.AttributeProto.INT
            )
            scope.truths.append(lambda call: call["flag"])
        elif kind != "absent":
            node.attribute.append(helper.make_attribute("training_mode", int(kind == "on")))
            scope.truths.append(constant_truth(kind == "on"))

    def constant(self, scope: Scope, value: np.generic) -> str:
        """A constant, as a node or as an initializer."""
        tensor = numpy_helper.from_array(np.asarray(value))
        if scope.in_function or self.chance.random() < 0.5:
            return self.node(scope, "Constant", [], value=tensor)[0]
        tensor.name = self.name("w")
        scope.initializers.append(tensor)
        return tensor.name

    def mode(self, scope: Scope, *, may_be_absent: bool = False) -> tuple[str, Truth]:
        """A mode that is visible here, after up to three operators that may change it."""
        choice = self.chance.random()
        if scope.modes and choice < 0.5:
            name, truth = self.chance.choice(scope.modes)
        elif choice < 0.85 or scope.in_function:
            value = self.chance.random() < 0.3
            name, truth = self.constant(scope, np.bool_(value)), constant_truth(value)
        else:
            name, truth = self.input_mode(), constant_truth(None)
        changes = self.chance.randrange(4)
        self.needs_a_mode |= name == "m" and (changes > 0 or not may_be_absent)
        for _ in range(changes):
            name, truth = self.change_mode(scope, name, truth)
        return name, truth

    def input_mode(self) -> str:
        """A graph input, with or without a default."""
        name = self.name("mode")
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.BOOL, []))
        if self.chance.random() < 0.5:
            self.overridable.append(numpy_helper.from_array(np.asarray(False), name))
        return name

    def change_mode(self, scope: Scope, name: str, truth: Truth) -> tuple[str, Truth]:
        kind = self.chance.choice(
            ["Not", "Identity", "Cast", "Equal", "And", "Where", "If", "Unsqueeze"]
        )
        if kind == "Not":
            return self.node(scope, "Not", [name])[
                0
            ], lambda call: None if truth(call) is None else not truth(call)
        if kind == "Identity":
            return self.node(scope, "Identity", [name])[0], truth
        if kind == "Cast":
            kind = self.chance.choice([TensorProto.INT64, TensorProto.FLOAT])
            (number,) = self.node(scope, "Cast", [name], to=kind)
            if kind == TensorProto.FLOAT:  # execution providers may differ on floats
                truth = constant_truth(None)
            return self.node(scope, "Cast", [number], to=TensorProto.BOOL)[0], truth
        if kind == "Unsqueeze":
            (wide,) = self.node(scope, "Unsqueeze", [name, self.constant(scope, np.int64([0]))])
            (number,) = self.node(scope, "Cast", [wide], to=TensorProto.INT32)
            (largest,) = self.node(scope, "ReduceMax", [number])
            return self.node(scope, "Cast", [largest], to=TensorProto.BOOL)[0], truth
        true = self.constant(scope, np.bool_(True))
        if kind == "If":
            return self.constant_if(scope, name), truth
        if kind == "Where":
            return self.node(scope, "Where", [name, true, self.constant(scope, np.bool_(False))])[
                0
            ], truth
        return self.node(scope, kind, [name, true])[0], truth

    def constant_if(self, scope: Scope, condition: str) -> str:
        """An If with a constant in each branch, so that its output equals the condition."""
        branches = {}
        for key, value in (("then_branch", True), ("else_branch", False)):
            node = helper.make_node(
                "Constant", [], [self.name("v")], value=numpy_helper.from_array(np.asarray(value))
            )
            output = helper.make_tensor_value_info(node.output[0], TensorProto.BOOL, [])
            branches[key] = helper.make_graph([node], key, [], [output])
        return self.node(scope, "If", [condition], **branches)[0]

    def call(self, scope: Scope) -> None:
        if not self.functions:
            return
        function = self.chance.choice(self.functions)
        if not function.needs_a_mode and self.chance.random() < 0.5:
            mode, truth = "", constant_truth(False)
        else:
            mode, truth = self.mode(scope, may_be_absent=not function.needs_a_mode)
        flag, is_on = self.chance.choice([("absent", False), ("off", False), ("on", True)])
        (scope.flow,) = self.node(scope, function.name, [scope.flow, mode], domain="my")
        passes_on = scope.flags and self.chance.random() < 0.5
        if passes_on:
            scope.nodes[-1].attribute.add(
                name="flag", ref_attr_name="flag", type=onnx.AttributeProto.INT
            )
        elif flag != "absent":
            scope.nodes[-1].attribute.append(helper.make_attribute("flag", int(is_on)))
        self.called.add(function.name)

        def truth_of_call(call: Call) -> Mode:
            return combine(
                function.truths, {"m": truth(call), "flag": call["flag"] if passes_on else is_on}
            )

        scope.truths.append(truth_of_call)

    def body(
        self, scope: Scope, *extra: onnx.ValueInfoProto, unknown: str = ""
    ) -> tuple[Scope, str]:
        inner = Scope(
            scope.depth + 1,
            scope.opset,
            [*scope.modes],
            [*scope.flags],
            in_function=scope.in_function,
        )
        inner.flow = scope.flow
        if unknown:
            inner.modes.append((unknown, constant_truth(None)))
        self.steps(inner)
        scope.truths += inner.truths
        return inner, inner.flow

    def graph(
        self, inner: Scope, inputs: list[onnx.ValueInfoProto], outputs: list[tuple[str, int]]
    ) -> onnx.GraphProto:
        infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        return helper.make_graph(inner.nodes, "body", inputs, infos, inner.initializers)

    def branch(self, scope: Scope) -> None:
        condition, _ = self.mode(scope)
        graphs = {}
        for key in ("then_branch", "else_branch"):
            inner, flow = self.body(scope)
            graphs[key] = self.graph(inner, [], [(flow, TensorProto.FLOAT)])
        (scope.flow,) = self.node(scope, "If", [condition], **graphs)

    def loop(self, scope: Scope) -> None:
        step, carried, value = self.name("i"), self.name("c"), self.name("x")
        inner, flow = self.body(scope, unknown=carried)
        inputs = [helper.make_tensor_value_info(step, TensorProto.INT64, [])]
        inputs.append(helper.make_tensor_value_info(carried, TensorProto.BOOL, []))
        inputs.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, [4]))
        graph = self.graph(inner, inputs, [(carried, TensorProto.BOOL), (flow, TensorProto.FLOAT)])
        trips = self.constant(scope, np.int64(2))
        (scope.flow,) = self.node(scope, "Loop", [trips, "", scope.flow], body=graph)

    def scan(self, scope: Scope) -> None:
        state, item = self.name("s"), self.name("x")
        inner, flow = self.body(scope)
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (state, item)
        ]
        graph = self.graph(inner, inputs, [(state, TensorProto.FLOAT), (flow, TensorProto.FLOAT)])
        _, scope.flow = self.node(
            scope, "Scan", [scope.flow, scope.flow], 2, num_scan_inputs=1, body=graph
        )
