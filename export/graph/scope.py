"""Names and what they stand for: in a graph, in a body inside of a node, in a function as one call
enters it.

Knows ONNX's rules of scope, and refuses what breaks them. Knows no operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import onnx

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.weight import Array, Weight


class Origin(Enum):
    """Where a value that no node makes comes from."""

    CALLER = "the model's input"
    OVERRIDABLE = "an initializer that is an input too"
    BODY = "an input of a body"
    FUNCTION = "an input of a function that nothing calls"


@dataclass(frozen=True)
class Absent:
    """An optional input that is not given."""


@dataclass(frozen=True)
class Fixed:
    """An initializer that nobody can change."""

    weight: Weight | onnx.SparseTensorProto


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


@dataclass(eq=False)
class Scope:
    """The names of one graph or function body; `parent` is the graph around a body, and None for a
    function.

    `attributes` are those that a function was called with: an attribute, or None where nobody
    knows; None where there is no call. `path` ends with a slash unless it is empty. `calls`,
    `bodies` and `tensors` are what its nodes hold, by their index (and the attribute's name);
    `decided` is what `fold` found out about the outputs of its nodes.
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
    decided: dict[str, Array | None] = field(default_factory=dict)
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
        self._values[name] = value

    def read(self, name: str) -> Value:
        """What `name` stands for, here or in a graph around. Raises KeyError where nothing has made
        it yet.
        """
        scope: Scope | None = self
        while scope is not None:
            if (value := scope._values.get(name)) is not None:
                return value
            scope._captured.add(name)
            scope = scope.parent
        raise KeyError(name)

    def argument(self, node: onnx.NodeProto, index: int) -> Value:
        """What input `index` of `node` is; Absent also where a function's caller left it out."""
        if index >= len(node.input) or node.input[index] == "":
            return Absent()
        return self.read(node.input[index])

    def attribute(self, node: onnx.NodeProto, name: str) -> onnx.AttributeProto | Absent | None:
        """The attribute, as the function's caller gave it where it refers to one; None where nobody
        knows.
        """
        found: onnx.AttributeProto | None = next(
            (item for item in node.attribute if item.name == name), None
        )
        if found is None:
            return Absent()
        if not found.ref_attr_name:
            return found
        return (
            None if self.attributes is None else self.attributes.get(found.ref_attr_name, Absent())
        )

    def path_of(self, index: int) -> str:
        """The path to node `index`: its name, or its operator and number where it has none."""
        node = self.nodes[index]
        return f"{self.path}{node.name or f'{node.op_type}_{index}'}"

    @property
    def where(self) -> str:
        """What a message calls it."""
        return self.path.rstrip("/") or "the main graph"


def domain_of(name: str) -> str:
    """A domain's name, with ONNX's own spelled as the empty string."""
    return "" if name == "ai.onnx" else name


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """The opset of each domain."""
    return {domain_of(item.domain): item.version for item in imports}
