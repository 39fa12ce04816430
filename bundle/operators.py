"""Whether a serialised model can draw or train, read from the very bytes that ONNX Runtime gets.

A certificate says what an export measured, and its seal is no secret: it can be computed anew for
another model. So a model is read again before it is served: every node of the graph, of the bodies
in it, and of its local functions. It must be an operator of the table of those that neither draw
nor train, or a local function. Dropout and BatchNormalization must have their training mode off in
plain sight: by leaving it out, or by a constant. Nothing is computed, and what is unusual is
refused: two readers could understand it differently.

It cannot see that weights were exchanged: only a signature could.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from evalmode.bundle.errors import BundleNotCertified
from evalmode.bundle.manifest import MODEL_FILE
from evalmode.bundle.operator_table import DRAWS, NEWEST_OPSETS, QUIET, TRAINS
from evalmode.bundle.wire import BYTES, FIXED32, FIXED64, VARINT, Malformed, fields, varint


class Message(NamedTuple):
    """The fields of one of ONNX's messages by their numbers, each with the wire types that it may
    have: numbers in a list may be packed into one field.
    """

    name: str
    singular: Mapping[int, tuple[int, ...]]
    repeated: Mapping[int, tuple[int, ...]]


def _message(name: str, *, one: Mapping[int, str], many: Mapping[int, str]) -> Message:
    wires = {"number": VARINT, "float": FIXED32, "double": FIXED64, "bytes": BYTES}
    return Message(
        name,
        {number: (wires[kind],) for number, kind in one.items()},
        {number: tuple({wires[kind], BYTES}) for number, kind in many.items()},
    )


# onnx.proto3 as of onnx 1.23; a test compares these with onnx's own descriptors.
# fmt: off
MODEL = _message(
    "ModelProto",
    one={1: "number", 2: "bytes", 3: "bytes", 4: "bytes", 5: "number", 6: "bytes", 7: "bytes"},
    many={8: "bytes", 14: "bytes", 20: "bytes", 25: "bytes", 26: "bytes"},
)
GRAPH = _message(
    "GraphProto",
    one={2: "bytes", 10: "bytes"},
    many={1: "bytes", 5: "bytes", 11: "bytes", 12: "bytes", 13: "bytes", 14: "bytes", 15: "bytes",
          16: "bytes"},
)
NODE = _message(
    "NodeProto",
    one={3: "bytes", 4: "bytes", 6: "bytes", 7: "bytes", 8: "bytes"},
    many={1: "bytes", 2: "bytes", 5: "bytes", 9: "bytes", 10: "bytes"},
)
ATTRIBUTE = _message(
    "AttributeProto",
    one={1: "bytes", 2: "float", 3: "number", 4: "bytes", 5: "bytes", 6: "bytes", 13: "bytes",
         14: "bytes", 20: "number", 21: "bytes", 22: "bytes"},
    many={7: "float", 8: "number", 9: "bytes", 10: "bytes", 11: "bytes", 15: "bytes", 23: "bytes"},
)
FUNCTION = _message(
    "FunctionProto",
    one={1: "bytes", 8: "bytes", 10: "bytes", 13: "bytes"},
    many={4: "bytes", 5: "bytes", 6: "bytes", 7: "bytes", 9: "bytes", 11: "bytes", 12: "bytes",
          14: "bytes"},
)
OPSET = _message("OperatorSetIdProto", one={1: "bytes", 2: "number"}, many={})
TENSOR = _message(
    "TensorProto",
    one={2: "number", 3: "bytes", 8: "bytes", 9: "bytes", 12: "bytes", 14: "number"},
    many={1: "number", 4: "float", 5: "number", 6: "bytes", 7: "number", 10: "double",
          11: "number", 13: "bytes", 16: "bytes"},
)
SPARSE = _message("SparseTensorProto", one={1: "bytes", 2: "bytes"}, many={3: "number"})
VALUE = _message("ValueInfoProto", one={1: "bytes", 2: "bytes", 3: "bytes"}, many={4: "bytes"})
# fmt: on
MESSAGES = (MODEL, GRAPH, NODE, ATTRIBUTE, FUNCTION, OPSET, TENSOR, SPARSE, VALUE)

Place = tuple[int, int]
"""Where the value of a field begins and ends."""

Operator = tuple[str, str]
"""Domain, with ONNX's own spelled as the empty string, and name."""

_INT, _TENSOR, _BOOL = 2, 4, 9  # of AttributeProto.type and TensorProto.data_type
_DEEPEST = 100  # bodies inside one another; protobuf reads no more messages
_ORT_FORMAT = b"ORTM"  # at byte 4: ONNX Runtime then reads its own format, and not protobuf


def _set_of(names_by_domain: Mapping[str, str]) -> frozenset[Operator]:
    return frozenset(
        (domain, name) for domain, names in names_by_domain.items() for name in names.split()
    )


_QUIET, _DRAWS, _TRAINS = _set_of(QUIET), _set_of(DRAWS), _set_of(TRAINS)
# The domains in which ONNX Runtime has operators of its own: it takes these, whatever functions of
# the same name the model has. In any other domain it has none.
_RUNTIMES_DOMAINS = frozenset({domain for domain, _ in _QUIET | _DRAWS | _TRAINS})

_WAY_OUT = "export the module again, in eval mode"


@dataclass(eq=False)
class _Scope:
    """The names of one graph or function body; what they stand for is read when a mode is one of
    them.

    `around` is None for the main graph and for a function. A `detached` body is given to a function
    as an attribute: what it reads from around is bound where the function uses it.
    """

    inputs: Sequence[Place]
    input_kind: Message | None  # None: plain names, as a function has them
    initializers: Sequence[Place]
    sparse: Sequence[Place]
    nodes: Sequence[Place]
    opsets: Sequence[Mapping[str, int]]
    around: _Scope | None = None
    detached: bool = False
    sources: dict[str, list[tuple[Message, Place]]] | None = field(default=None)


@dataclass(frozen=True)
class _Node:
    """A node, as the judge of its operator reads it."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Mapping[int, list[Place]]]
    scope: _Scope
    opsets: frozenset[int]  # those that its domain may have there; 0: none is imported


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """Why a model is not served: what follows the file's name."""


def check_operators(model: bytes) -> None:
    """Raise BundleNotCertified, naming the node, for a model that can draw or train, or that cannot
    be read beyond doubt.
    """
    try:
        _Reader(model).model()
    except Malformed as error:
        raise BundleNotCertified(
            f"{MODEL_FILE} must not be served: it is not an ONNX model: {error}"
        ) from error
    except _Refused as error:
        raise BundleNotCertified(f"{MODEL_FILE} must not be served: {error}") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._functions: set[Operator] = set()

    def model(self) -> None:
        data = self._data
        if data[4:8] == _ORT_FORMAT:
            raise _Refused("it is in ONNX Runtime's own format: a bundle holds an ONNX model")
        model = self._read((0, len(data)), MODEL)
        if 7 not in model:
            raise _Refused("it holds no graph")
        opsets = self._opsets(model.get(8, []), "the model")
        functions = [(self._read(place, FUNCTION), place) for place in model.get(25, [])]
        for function, _ in functions:
            operator = self._domain(function, 10), self._text(function, 1)
            self._functions.add(operator)
        self._graph(model[7][0], "", [opsets], None, depth=0)
        for function, _ in functions:
            name = f"{self._domain(function, 10)}:{self._text(function, 1)}"
            scope = _Scope(
                inputs=function.get(4, []),
                input_kind=None,
                initializers=[],
                sparse=[],
                nodes=function.get(7, []),
                # ONNX Runtime puts a function's body into the graph that calls it.
                opsets=[opsets, self._opsets(function.get(9, []), f"the function {name}")],
            )
            for place in function.get(11, []):
                self._attribute(self._read(place, ATTRIBUTE), f"{name}/", scope, True, 0)
            self._nodes(scope, f"{name}/", 0)

    def _graph(
        self,
        place: Place,
        path: str,
        opsets: Sequence[Mapping[str, int]],
        around: _Scope | None,
        *,
        depth: int,
        detached: bool = False,
    ) -> None:
        if depth > _DEEPEST:
            raise _Refused(f"its graphs stand more than {_DEEPEST} deep inside one another")
        graph = self._read(place, GRAPH)
        scope = _Scope(
            inputs=graph.get(11, []),
            input_kind=VALUE,
            initializers=graph.get(5, []),
            sparse=graph.get(15, []),
            nodes=graph.get(1, []),
            opsets=opsets,
            around=around,
            detached=detached,
        )
        for tensor in scope.initializers:
            self._is_inside(tensor, path)
        for sparse in scope.sparse:
            self._sparse_is_inside(sparse, path)
        self._nodes(scope, path, depth)

    def _nodes(self, scope: _Scope, path: str, depth: int) -> None:
        for index, place in enumerate(scope.nodes):
            node = self._read(place, NODE)
            operator = domain, name = self._domain(node, 7), self._text(node, 4)
            node_path = f"{path}{self._text(node, 3) or f'{name}_{index}'}"
            attributes: dict[str, Mapping[int, list[Place]]] = {}
            for attribute_place in node.get(5, []):
                attribute = self._read(attribute_place, ATTRIBUTE)
                attribute_name = self._text(attribute, 1)
                if attribute_name in attributes:
                    raise _Refused(f"the node {node_path!r} has {attribute_name!r} twice")
                attributes[attribute_name] = attribute
                self._attribute(
                    attribute, f"{node_path}/", scope, operator in self._functions, depth
                )
            if operator in _QUIET:
                continue
            op = f"{domain}::{name}" if domain else name
            what = f"the node {node_path!r} is {op}, which"
            if operator in _DRAWS:
                raise _Refused(f"{what} draws random numbers: {_WAY_OUT}")
            if operator in _TRAINS:
                raise _Refused(f"{what} trains: {_WAY_OUT}")
            if (judge := _JUDGES.get(operator)) is not None:
                if not judge(self, self._judged(node, attributes, scope, domain)):
                    raise _Refused(
                        f"{what} has a training mode, and neither leaves it out nor has a constant"
                        f" that switches it off: {_WAY_OUT}"
                    )
            elif operator not in self._functions or domain in _RUNTIMES_DOMAINS:
                raise _Refused(
                    f"{what} is not known here and might draw random numbers: export the module"
                    " again as standard operators"
                )

    def _attribute(
        self,
        attribute: Mapping[int, list[Place]],
        path: str,
        scope: _Scope,
        is_call: bool,
        depth: int,
    ) -> None:
        """The graphs and tensors in an attribute."""
        for body in (*attribute.get(6, []), *attribute.get(11, [])):
            body_path = f"{path}{self._text(attribute, 1)}/"
            self._graph(body, body_path, scope.opsets, scope, depth=depth + 1, detached=is_call)
        for tensor in (*attribute.get(5, []), *attribute.get(10, [])):
            self._is_inside(tensor, path)
        for sparse in (*attribute.get(22, []), *attribute.get(23, [])):
            self._sparse_is_inside(sparse, path)

    def _is_inside(self, place: Place, path: str) -> None:
        """Refuse a tensor whose values are in another file: no hash covers it."""
        tensor = self._read(place, TENSOR)
        if 13 in tensor or (14 in tensor and self._number(tensor, 14) != 0):
            name = path + self._text(tensor, 8)
            raise _Refused(
                f"the values of the tensor {name!r} are in another file, which the bundle's"
                " digest does not cover"
            )

    def _sparse_is_inside(self, place: Place, path: str) -> None:
        sparse = self._read(place, SPARSE)
        for tensor in (*sparse.get(1, []), *sparse.get(2, [])):
            self._is_inside(tensor, path)

    def _opsets(self, imports: Sequence[Place], where: str) -> dict[str, int]:
        """The opset of each domain. Two of one domain are refused: readers take the first, the last
        or the highest.
        """
        opsets: dict[str, int] = {}
        for place in imports:
            opset = self._read(place, OPSET)
            domain, version = self._domain(opset, 1), self._number(opset, 2)
            if opsets.setdefault(domain, version) != version:
                raise _Refused(
                    f"{where} imports opsets {opsets[domain]} and {version} of"
                    f" {domain or 'ai.onnx'}: only one can be meant"
                )
            if not 0 < version < 1 << 31:
                raise _Refused(f"{where} imports opset {version} of {domain or 'ai.onnx'}")
            newest = NEWEST_OPSETS.get(domain)
            if newest is not None and version > newest:
                raise _Refused(
                    f"{where} imports opset {version} of {domain or 'ai.onnx'}, and the operators"
                    f" of up to {newest} are known here: export it with an older opset"
                )
        return opsets

    def _judged(
        self,
        node: Mapping[int, list[Place]],
        attributes: Mapping[str, Mapping[int, list[Place]]],
        scope: _Scope,
        domain: str,
    ) -> _Node:
        return _Node(
            inputs=[self._decoded(place) for place in node.get(1, [])],
            outputs=[self._decoded(place) for place in node.get(2, [])],
            attributes=attributes,
            scope=scope,
            opsets=frozenset(opsets.get(domain, 0) for opsets in scope.opsets),
        )

    def is_off(self, node: _Node, index: int) -> bool:
        """Whether a mode that is an input is left out, or is the constant false."""
        if len(node.inputs) <= index or node.inputs[index] == "":
            return True
        sources: list[tuple[Message, Place]] = []
        scope: _Scope | None = node.scope
        while scope is not None:
            if scope.detached:
                return False
            sources += self._sources(scope).get(node.inputs[index], [])
            scope = scope.around
        # A name that stands for two things, here or in a graph around, is read differently.
        if len(sources) != 1:
            return False
        message, place = sources[0]
        if message is TENSOR:
            return self._is_false(place)
        if message is not NODE:
            return False
        constant = self._read(place, NODE)
        if self._domain(constant, 7) != "" or self._text(constant, 4) != "Constant":
            return False
        attributes = [self._read(attribute, ATTRIBUTE) for attribute in constant.get(5, [])]
        return (
            len(attributes) == 1
            and len(constant.get(2, [])) == 1
            and attributes[0].keys() <= {1, 5, 13, 20}
            and self._text(attributes[0], 1) == "value"
            and self._number(attributes[0], 20) == _TENSOR
            and 5 in attributes[0]
            and self._is_false(attributes[0][5][0])
        )

    def flag(self, node: _Node, name: str) -> bool | None:
        """Whether an integer attribute is set (not where it is absent); None for one that is
        anything else.
        """
        attribute = node.attributes.get(name)
        if attribute is None:
            return False
        if not attribute.keys() <= {1, 3, 13, 20} or self._number(attribute, 20) != _INT:
            return None
        return self._number(attribute, 3) != 0

    def _sources(self, scope: _Scope) -> dict[str, list[tuple[Message, Place]]]:
        """What each name of a scope comes from: more than one thing where the model is broken."""
        if scope.sources is not None:
            return scope.sources
        sources: dict[str, list[tuple[Message, Place]]] = {}
        for place in scope.inputs:
            if scope.input_kind is None:
                name = self._decoded(place)
            else:
                name = self._text(self._read(place, scope.input_kind), 1)
            sources.setdefault(name, []).append((VALUE, place))
        for place in scope.initializers:
            name = self._text(self._read(place, TENSOR), 8)
            sources.setdefault(name, []).append((TENSOR, place))
        for place in scope.sparse:
            for values in self._read(place, SPARSE).get(1, []):
                name = self._text(self._read(values, TENSOR), 8)
                sources.setdefault(name, []).append((SPARSE, place))
        for place in scope.nodes:
            for output in self._read(place, NODE).get(2, []):
                sources.setdefault(self._decoded(output), []).append((NODE, place))
        scope.sources = sources
        return sources

    def _is_false(self, place: Place) -> bool:
        """Whether a tensor is one boolean that is false, written in one of two plain ways."""
        tensor = self._read(place, TENSOR)
        if self._number(tensor, 2) != _BOOL or not tensor.keys() <= {1, 2, 5, 8, 9, 12, 16}:
            return False
        if any(size != 1 for size in self._numbers(tensor, 1)):
            return False
        raw = [self._data[start:stop] for start, stop in tensor.get(9, [])]
        numbers = self._numbers(tensor, 5)
        return (raw, numbers) in (([b"\0"], []), ([], [0]))

    def _read(self, place: Place, message: Message) -> dict[int, list[Place]]:
        """Where the fields of a message lie, by their numbers.

        A field that ONNX does not have is refused, since a newer reader may know it. So is a
        singular field that is given twice: protobuf merges two graphs into one.
        """
        singular, repeated = message.singular, message.repeated
        places: dict[int, list[Place]] = {}
        for number, wire, tag, start, stop in fields(self._data, *place):
            if number in repeated and wire in repeated[number]:
                places.setdefault(number, []).append((start, stop))
            elif number in singular and wire in singular[number] and number not in places:
                places[number] = [(start, stop)]
            elif number in places:
                raise _Refused(f"byte {tag} gives field {number} of a {message.name} again")
            else:
                raise _Refused(f"byte {tag} is no field of a {message.name} that is known here")
        return places

    def _number(self, places: Mapping[int, list[Place]], number: int) -> int:
        """A field of one number; 0 where it is not given, as protobuf has it."""
        return varint(self._data, *places[number][0])[0] if number in places else 0

    def _numbers(self, places: Mapping[int, list[Place]], number: int) -> list[int]:
        """A field of many numbers, one by one or packed."""
        numbers = []
        for at, stop in places.get(number, []):
            while at < stop:
                value, at = varint(self._data, at, stop)
                numbers.append(value)
        return numbers

    def _text(self, places: Mapping[int, list[Place]], number: int) -> str:
        return self._decoded(places[number][0]) if number in places else ""

    def _decoded(self, place: Place) -> str:
        try:
            return self._data[place[0] : place[1]].decode()
        except UnicodeDecodeError:
            raise _Refused(f"the name at byte {place[0]} is not UTF-8") from None

    def _domain(self, places: Mapping[int, list[Place]], number: int) -> str:
        domain = self._text(places, number)
        return "" if domain == "ai.onnx" else domain


def _dropout(reader: _Reader, node: _Node) -> bool:
    """Dropout 1 and 6 train unless `is_test` is set, 7 and 10 never do, later ones by input 2."""
    return reader.is_off(node, 2) and (
        min(node.opsets) >= 7 or reader.flag(node, "is_test") is True
    )


def _batch_normalization(reader: _Reader, node: _Node) -> bool:
    """BatchNormalization 1 and 6 train unless `is_test` is set, 7 and 9 where they give the batch's
    statistics, later ones by `training_mode`.
    """
    return (
        not any(node.outputs[1:])
        and reader.flag(node, "training_mode") is False
        and (min(node.opsets) >= 7 or reader.flag(node, "is_test") is True)
    )


_JUDGES: Mapping[Operator, Callable[[_Reader, _Node], bool]] = {
    ("", "Dropout"): _dropout,
    ("", "BatchNormalization"): _batch_normalization,
    # What ONNX Runtime's optimiser writes.
    ("com.ms.internal.nhwc", "BatchNormalization"): (
        lambda reader, node: reader.flag(node, "training_mode") is False
    ),
    ("com.microsoft", "BitmaskDropout"): lambda reader, node: reader.is_off(node, 2),
    ("com.microsoft", "BiasDropout"): lambda reader, node: reader.is_off(node, 4),
    ("com.microsoft", "BitmaskBiasDropout"): lambda reader, node: reader.is_off(node, 4),
}
JUDGED = frozenset(_JUDGES)
