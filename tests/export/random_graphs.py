"""Random ONNX graphs with and without hidden randomness, and the truth about each, which no
verifier was asked for.

The truth is kept while a graph is built: what a node does to it is a function of what its function
is called with.
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
"""On: random for certain. None: only the caller, or nobody, knows. Off: nothing is random."""

DEEPEST = 4


@dataclass
class Place:
    """A graph or function body that is being written: its nodes, and the modes that can be read in
    it.
    """

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


def constantly(value: Mode) -> Truth:
    return lambda call: value


def together(truths: list[Truth] | tuple[Truth, ...], call: Call) -> Mode:
    found = [truth(call) for truth in truths]
    return True if True in found else None if None in found else False


class Writer:
    """Writes one random model. `chance` decides everything."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])]
        self.functions: list[Function] = []
        self.protos: list[onnx.FunctionProto] = []
        self.names = 0
        self.called: set[str] = set()
        self.needs_a_mode = False  # whether the function that is being written computes with its m

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def model(self) -> tuple[onnx.ModelProto, Verdict]:
        """A model, and what a verifier that is never wrong says about it."""
        main = Place(depth=0, opset=20)
        for _ in range(self.chance.randrange(3)):
            self.function()
        self.overridable: list[onnx.TensorProto] = []
        self.steps(main)
        uncalled = [item for item in self.functions if item.name not in self.called]
        nobody_knows = [
            constantly(together(item.truths, {"m": None, "flag": None})) for item in uncalled
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
        truth = together([*main.truths, *nobody_knows], {})
        return model, {True: Verdict.FAIL, None: Verdict.UNPROVEN, False: Verdict.PASS}[truth]

    def function(self) -> None:
        """A function that may call those before it."""
        self.needs_a_mode = False
        name, opset = self.name("f"), self.chance.choice([14, 20])
        body = Place(depth=1, opset=opset, in_function=True, flags=["flag"])
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

    def steps(self, place: Place) -> None:
        kinds = (
            [self.plain] * 5
            + [self.dropout] * 4
            + [self.batch_normalization, self.lookalike, self.call, self.call]
        )
        if place.depth < DEEPEST:
            kinds += [self.branch, self.loop, self.scan] * 2
        if self.chance.random() < 0.15:
            kinds += [self.random, self.opaque]
        for _ in range(self.chance.randrange(1, 4)):
            self.chance.choice(kinds)(place)
        self.plain(place)

    def node(
        self, place: Place, op: str, inputs: list[str], outputs: int = 1, **attributes: object
    ) -> list[str]:
        names = [self.name("v") for _ in range(outputs)]
        named = self.chance.choice(["", self.name("node")])
        place.nodes.append(helper.make_node(op, inputs, names, name=named, **attributes))
        return names

    def plain(self, place: Place) -> None:
        (place.flow,) = self.node(
            place, self.chance.choice(["Relu", "Identity", "Tanh"]), [place.flow]
        )

    def random(self, place: Place) -> None:
        op, domain = self.chance.choice(
            [
                *(("RandomUniformLike", ""), ("RandomNormalLike", ""), ("Multinomial", "")),
                *(("Bernoulli", ""), ("Bernoulli", "ai.onnx"), ("Sampling", "com.microsoft")),
            ]
        )
        (drawn,) = self.node(place, op, [place.flow], domain=domain)
        place.truths.append(constantly(True))
        if self.chance.random() < 0.5:  # or else nothing reads it
            (place.flow,) = self.node(place, "Mul", [place.flow, drawn])

    def opaque(self, place: Place) -> None:
        op = self.chance.choice(["Relu", "RandomUniformLike", "Dropout", "ATen"])
        domain = self.chance.choice(["unheard.of", "org.pytorch.aten"])
        (place.flow,) = self.node(place, op, [place.flow], domain=domain)
        place.truths.append(constantly(None))

    def lookalike(self, place: Place) -> None:
        """`my::Dropout` and its like are functions that do nothing."""
        op = self.chance.choice(["Dropout", "RandomUniformLike", "Bernoulli"])
        if op not in {item.name for item in self.protos}:
            identity = helper.make_node("Identity", ["x"], ["y"])
            self.protos.append(
                helper.make_function(
                    "my", op, ["x"], ["y"], [identity], [helper.make_opsetid("", 20)]
                )
            )
        (place.flow,) = self.node(place, op, [place.flow], domain="my")

    def dropout(self, place: Place) -> None:
        if self.chance.random() < 0.2:
            (place.flow,) = self.node(place, "Dropout", [place.flow])
            return
        mode, truth = self.mode(place, may_be_absent=True)
        ratio, drops = self.chance.choice([("", True), ("", True), (0.5, True), (0.0, False)])
        if ratio != "":
            ratio = self.constant(place, np.float32(ratio))
        op, inputs, domain = self.chance.choice(
            [("Dropout", [place.flow, ratio, mode], "")] * 4
            + [("BitmaskDropout", [place.flow, ratio, mode], "com.microsoft")]
            + [("BiasDropout", [place.flow, place.flow, "", ratio, mode], "com.microsoft")]
        )
        (place.flow,) = self.node(place, op, inputs, domain=domain)
        place.truths.append(truth if drops else constantly(False))

    def batch_normalization(self, place: Place) -> None:
        node = helper.make_node("BatchNormalization", [place.flow] * 5, [self.name("v")])
        place.nodes.append(node)
        place.flow = node.output[0]
        kind = self.chance.choice(["on", "off", "absent", *["caller's"] * 4 * bool(place.flags)])
        if kind == "caller's":
            node.attribute.add(
                name="training_mode", ref_attr_name="flag", type=onnx.AttributeProto.INT
            )
            place.truths.append(lambda call: call["flag"])
        elif kind != "absent":
            node.attribute.append(helper.make_attribute("training_mode", int(kind == "on")))
            place.truths.append(constantly(kind == "on"))

    def constant(self, place: Place, value: np.generic) -> str:
        """A constant by one of the ways to write one."""
        tensor = numpy_helper.from_array(np.asarray(value))
        if place.in_function or self.chance.random() < 0.5:
            return self.node(place, "Constant", [], value=tensor)[0]
        tensor.name = self.name("w")
        place.initializers.append(tensor)
        return tensor.name

    def mode(self, place: Place, *, may_be_absent: bool = False) -> tuple[str, Truth]:
        """A mode that can be read here, after some operators that change it, or do not."""
        known = self.chance.random()
        if place.modes and known < 0.5:
            name, truth = self.chance.choice(place.modes)
        elif known < 0.85 or place.in_function:
            value = self.chance.random() < 0.3
            name, truth = self.constant(place, np.bool_(value)), constantly(value)
        else:
            name, truth = self.callers(), constantly(None)
        changes = self.chance.randrange(4)
        self.needs_a_mode |= name == "m" and (changes > 0 or not may_be_absent)
        for _ in range(changes):
            name, truth = self.changed(place, name, truth)
        return name, truth

    def callers(self) -> str:
        """A graph input, with or without a default."""
        name = self.name("mode")
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.BOOL, []))
        if self.chance.random() < 0.5:
            self.overridable.append(numpy_helper.from_array(np.asarray(False), name))
        return name

    def changed(self, place: Place, name: str, truth: Truth) -> tuple[str, Truth]:
        kind = self.chance.choice(
            ["Not", "Identity", "Cast", "Equal", "And", "Where", "If", "Unsqueeze"]
        )
        if kind == "Not":
            return self.node(place, "Not", [name])[
                0
            ], lambda call: None if truth(call) is None else not truth(call)
        if kind == "Identity":
            return self.node(place, "Identity", [name])[0], truth
        if kind == "Cast":
            kind = self.chance.choice([TensorProto.INT64, TensorProto.FLOAT])
            (number,) = self.node(place, "Cast", [name], to=kind)
            if kind == TensorProto.FLOAT:  # execution providers differ on such numbers
                truth = constantly(None)
            return self.node(place, "Cast", [number], to=TensorProto.BOOL)[0], truth
        if kind == "Unsqueeze":
            (wide,) = self.node(place, "Unsqueeze", [name, self.constant(place, np.int64([0]))])
            (number,) = self.node(place, "Cast", [wide], to=TensorProto.INT32)
            (largest,) = self.node(place, "ReduceMax", [number])
            return self.node(place, "Cast", [largest], to=TensorProto.BOOL)[0], truth
        true = self.constant(place, np.bool_(True))
        if kind == "If":
            return self.chosen(place, name), truth
        if kind == "Where":
            return self.node(place, "Where", [name, true, self.constant(place, np.bool_(False))])[
                0
            ], truth
        return self.node(place, kind, [name, true])[0], truth

    def chosen(self, place: Place, condition: str) -> str:
        """What a branch of constants answers: the condition itself."""
        branches = {}
        for key, value in (("then_branch", True), ("else_branch", False)):
            node = helper.make_node(
                "Constant", [], [self.name("v")], value=numpy_helper.from_array(np.asarray(value))
            )
            output = helper.make_tensor_value_info(node.output[0], TensorProto.BOOL, [])
            branches[key] = helper.make_graph([node], key, [], [output])
        return self.node(place, "If", [condition], **branches)[0]

    def call(self, place: Place) -> None:
        if not self.functions:
            return
        function = self.chance.choice(self.functions)
        if not function.needs_a_mode and self.chance.random() < 0.5:
            mode, truth = "", constantly(False)
        else:
            mode, truth = self.mode(place, may_be_absent=not function.needs_a_mode)
        flag, given = self.chance.choice([("absent", False), ("off", False), ("on", True)])
        (place.flow,) = self.node(place, function.name, [place.flow, mode], domain="my")
        passes_on = place.flags and self.chance.random() < 0.5
        if passes_on:
            place.nodes[-1].attribute.add(
                name="flag", ref_attr_name="flag", type=onnx.AttributeProto.INT
            )
        elif flag != "absent":
            place.nodes[-1].attribute.append(helper.make_attribute("flag", int(given)))
        self.called.add(function.name)

        def of_call(call: Call) -> Mode:
            return together(
                function.truths, {"m": truth(call), "flag": call["flag"] if passes_on else given}
            )

        place.truths.append(of_call)

    def body(
        self, place: Place, *extra: onnx.ValueInfoProto, unknown: str = ""
    ) -> tuple[Place, str]:
        inner = Place(
            place.depth + 1,
            place.opset,
            [*place.modes],
            [*place.flags],
            in_function=place.in_function,
        )
        inner.flow = place.flow
        if unknown:
            inner.modes.append((unknown, constantly(None)))
        self.steps(inner)
        place.truths += inner.truths
        return inner, inner.flow

    def graph(
        self, inner: Place, inputs: list[onnx.ValueInfoProto], outputs: list[tuple[str, int]]
    ) -> onnx.GraphProto:
        infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        return helper.make_graph(inner.nodes, "body", inputs, infos, inner.initializers)

    def branch(self, place: Place) -> None:
        condition, _ = self.mode(place)
        graphs = {}
        for key in ("then_branch", "else_branch"):
            inner, flow = self.body(place)
            graphs[key] = self.graph(inner, [], [(flow, TensorProto.FLOAT)])
        (place.flow,) = self.node(place, "If", [condition], **graphs)

    def loop(self, place: Place) -> None:
        step, carried, value = self.name("i"), self.name("c"), self.name("x")
        inner, flow = self.body(place, unknown=carried)
        inputs = [helper.make_tensor_value_info(step, TensorProto.INT64, [])]
        inputs.append(helper.make_tensor_value_info(carried, TensorProto.BOOL, []))
        inputs.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, [4]))
        graph = self.graph(inner, inputs, [(carried, TensorProto.BOOL), (flow, TensorProto.FLOAT)])
        trips = self.constant(place, np.int64(2))
        (place.flow,) = self.node(place, "Loop", [trips, "", place.flow], body=graph)

    def scan(self, place: Place) -> None:
        state, item = self.name("s"), self.name("x")
        inner, flow = self.body(place)
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (state, item)
        ]
        graph = self.graph(inner, inputs, [(state, TensorProto.FLOAT), (flow, TensorProto.FLOAT)])
        _, place.flow = self.node(
            place, "Scan", [place.flow, place.flow], 2, num_scan_inputs=1, body=graph
        )
