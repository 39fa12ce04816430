"""Names and what they stand for: in a graph, in a body inside of a node, in a function as one call
enters it.

Knows ONNX's rules of scope, and refuses what breaks them. Knows no operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import onnx

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.weight import Weight


class Origin(Enum):
    """Where a value that no node makes comes from."""

    CALLER = "the model's input"
    OVERRIDABLE = "an initializer that is an input too"
    BODY = "an input of a body"
    FUNCTION = "an input of a function that nothing calls"
    ELSEWHERE = "a name of the place where the function uses this graph"
    SHADOWED = "a name that also stands for something around, on which runtimes differ"


@dataclass(frozen=True)
class Absent:
    """An optional input that is not given."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """An initializer that nobody can change; `budget` is what reading it is charged to."""

    weight: Weight | onnx.SparseTensorProto
    budget: Budget


@dataclass(frozen=True)
class Open:
    """A value that is known when the model runs, and not before."""

    name: str
    origin: Origin


@dataclass(frozen=True, eq=False)
class Made:
    """The output `name` of the node `index` of a scope."""

    scope: Scope
    index: int
    name: str

    @property
    def node(self) -> onnx.NodeProto:
        """The node that makes it."""
        return self.scope.nodes[self.index]


Value = Absent | Fixed | Open | Made

# The field of an attribute that holds its value, by its type.
_FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRINGS: "strings",
    onnx.AttributeProto.TENSORS: "tensors",
    onnx.AttributeProto.GRAPHS: "graphs",
    onnx.AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    onnx.AttributeProto.TYPE_PROTOS: "type_protos",
}


@dataclass
class Budget:
    """What it may still cost to decide the values of a model, and the initializers that were read.

    `values` the runtime may be asked for, `bytes` may be held, and `steps` may be taken to find
    what an undecided value comes from. `read` holds what `fold` read, by the identity of the
    initializer: many nodes may read one, and each reading would map its file anew.
    """

    values: int = 200
    bytes: int = 32 << 20
    steps: int = 200_000
    read: dict[int, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Scope:
    """The names of one graph or function body; `parent` is the graph around a body, and None for a
    function.

    `attributes` are those that a function was called with: an attribute, or None where nobody
    knows; None where there is no call. `path` ends with a slash unless it is empty. `calls`,
    `bodies` and `tensors` are what its nodes hold, by their index (and the attribute's name);
    `decided` is what `fold` found out about the outputs of its nodes. A `detached` body was given
    to a function as an attribute: what it reads from around is bound where the function uses it.
    `made_anywhere` has what all nodes make, where these are not sorted.
    """

    path: str
    nodes: Sequence[onnx.NodeProto]
    outputs: Sequence[str]
    opsets: Mapping[str, int]
    parent: Scope | None = None
    attributes: Mapping[str, onnx.AttributeProto | None] | None = None
    calls: dict[int, Scope] = field(default_factory=dict)
    bodies: dict[tuple[int, str], Scope] = field(default_factory=dict)
    tensors: dict[tuple[int, str], Weight] = field(default_factory=dict)
    decided: dict[str, Any] = field(default_factory=dict)
    detached: bool = False
    made_anywhere: frozenset[str] = frozenset()
    budget: Budget = field(default_factory=Budget)
    _values: dict[str, Value] = field(default_factory=dict)
    _captured: set[str] = field(default_factory=set)

    def define(self, name: str, value: Value) -> None:
        """Give `name` its one meaning here. Raises Broken where it has one already."""
        if name in self._values:
            raise Broken(f"the name {name!r} has two meanings in {self.where}")
        if name in self._captured:
            raise Broken(
                f"the name {name!r} is read in {self.where} before it gets a second meaning there"
            )
        around = None if self.detached else self.parent
        if not isinstance(value, Open) and around is not None and around.knows(name):
            value = Open(name, Origin.SHADOWED)
        self._values[name] = value

    @property
    def names(self) -> Set[str]:
        """The names that have a meaning here so far."""
        return self._values.keys()

    def knows(self, name: str) -> bool:
        """Whether the name has a meaning here or in a graph around."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope._values or name in scope.made_anywhere:
                return True
            scope = None if scope.detached else scope.parent
        return False

    def read(self, name: str) -> Value:
        """What `name` stands for, here or in a graph around. Raises KeyError where nothing has made
        it yet.
        """
        scope: Scope | None = self
        while scope is not None:
            if (value := scope._values.get(name)) is not None:
                return value
            if scope.detached:
                return Open(name, Origin.ELSEWHERE)
            scope._captured.add(name)
            scope = scope.parent
        raise KeyError(name)

    def argument(self, node: onnx.NodeProto, index: int) -> Value:
        """What input `index` of `node` is; Absent also where a function's caller left it out."""
        if index >= len(node.input) or node.input[index] == "":
            return Absent()
        return self.read(node.input[index])

    def attribute(self, node: onnx.NodeProto, name: str) -> onnx.AttributeProto | Absent | None:
        """The attribute, as the function's caller gave it where it refers to one; None where it is
        not known, or is written so that readers differ.
        """
        for item in node.attribute:
            if item.name != name:
                continue
            if not item.ref_attr_name:
                return item if is_sound(item) else None
            if value_fields(item) or self.attributes is None:
                return None
            attribute = self.attributes.get(item.ref_attr_name, Absent())
            if isinstance(attribute, onnx.AttributeProto) and not is_sound(attribute):
                return None
            return attribute
        return Absent()

    def path_of(self, index: int) -> str:
        """The path to node `index`: its name, or its operator and number where it has none."""
        node = self.nodes[index]
        return f"{self.path}{node.name or f'{node.op_type}_{index}'}"

    @property
    def where(self) -> str:
        """What a message calls it."""
        return self.path.rstrip("/") or "the main graph"


def value_fields(attribute: onnx.AttributeProto) -> set[str]:
    """The fields of an attribute that hold a value."""
    return {field.name for field, _ in attribute.ListFields()} & set(_FIELDS.values())


def is_sound(attribute: onnx.AttributeProto) -> bool:
    """Whether an attribute holds no value but the one that its type names."""
    return value_fields(attribute) <= {_FIELDS.get(attribute.type, "")}


def domain_of(name: str) -> str:
    """A domain's name, with ONNX's own spelled as the empty string."""
    return "" if name == "ai.onnx" else name


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """The opset of each domain; 0 for a domain that is imported twice, on which readers differ."""
    opsets: dict[str, int] = {}
    for item in imports:
        domain = domain_of(item.domain)
        same = opsets.setdefault(domain, item.version) == item.version
        opsets[domain] = item.version if same else 0
    return opsets
