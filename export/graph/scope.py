"""Names and their values: in a graph, in a body inside a node, and in a function for one call.

Applies ONNX's rules of scope, and refuses models that break them. No operator is interpreted here.
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
    """The source of a value that the graph does not decide. The text ends a sentence."""

    CALLER = "the model's input"
    OVERRIDABLE = "an initializer that is an input too"
    BODY = "an input of a body"
    FUNCTION = "an input of a function that nothing calls"
    ELSEWHERE = "a name that is bound where the function uses this graph"
    SHADOWED = "a name that an outer graph uses too, which runtimes read differently"


@dataclass(frozen=True)
class Absent:
    """An optional input that is left out."""


@dataclass(frozen=True, eq=False)
class Initializer:
    """An initializer that no caller can override. Reading it is charged to `budget`."""

    weight: Weight | onnx.SparseTensorProto
    budget: Budget


@dataclass(frozen=True)
class Unknown:
    """A value that is known only when the model runs."""

    name: str
    origin: Origin


@dataclass(frozen=True, eq=False)
class NodeOutput:
    """The output `name` of node number `index` of a scope."""

    scope: Scope
    index: int
    name: str

    @property
    def node(self) -> onnx.NodeProto:
        """The node that computes the output."""
        return self.scope.nodes[self.index]


Value = Absent | Initializer | Unknown | NodeOutput

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
    """What is left to spend on the constants of one model.

    A file must not be able to make its verifier run a whole model, so all constants of a model
    share these limits. `arrays` caches the initializers that were read, by identity: many nodes may
    read the same one, and each would map its file again.
    """

    runtime_calls: int = 200
    bytes: int = 32 << 20  # of all arrays that are held
    steps: int = 200_000  # of the search for the source of values that are not constant
    arrays: dict[int, Any] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class Scope:
    """The names of one graph or function body.

    path            the prefix of the paths to its nodes: empty for the main graph, else it ends
                    with a slash
    parent          the graph around a body; None for the main graph and for functions
    attributes      what this call passes for the attributes of a function, by name; None for an
                    attribute whose value is not known, and None as a whole if no call is known
    detached        whether it is a body that was passed to a function as an attribute; its outer
                    names are bound where the function uses it, which is not known here
    calls           the functions that nodes call, by the node's index
    bodies          the bodies in nodes, by the node's index and the attribute's name
    tensors         the tensors in nodes, by the node's index and the attribute's name
    constants       what `fold` decided about outputs, by name
    unsorted_names  the outputs of all nodes if the nodes are not sorted, else empty
    """

    path: str
    nodes: Sequence[onnx.NodeProto]
    outputs: Sequence[str]
    opsets: Mapping[str, int]
    budget: Budget
    parent: Scope | None = None
    attributes: Mapping[str, onnx.AttributeProto | None] | None = None
    detached: bool = False
    calls: dict[int, Scope] = field(default_factory=dict)
    bodies: dict[tuple[int, str], Scope] = field(default_factory=dict)
    tensors: dict[tuple[int, str], Weight] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    unsorted_names: frozenset[str] = frozenset()
    _values: dict[str, Value] = field(default_factory=dict)
    _captured: set[str] = field(default_factory=set)

    def define(self, name: str, value: Value) -> None:
        """Define `name` as this value. Raises Broken if the name is defined already."""
        if name in self._values:
            raise Broken(f"the name {name!r} has two meanings in {self.display_name}")
        # A node has read the name from an outer graph: the same name would then have two meanings.
        if name in self._captured:
            raise Broken(
                f"the name {name!r} is read in {self.display_name} before it gets a second meaning"
                " there"
            )
        outer = None if self.detached else self.parent
        if not isinstance(value, Unknown) and outer is not None and outer.knows(name):
            value = Unknown(name, Origin.SHADOWED)
        self._values[name] = value

    @property
    def names(self) -> Set[str]:
        """The names that have a meaning here so far."""
        return self._values.keys()

    def knows(self, name: str) -> bool:
        """Whether the name has a meaning here or in a graph around."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope._values or name in scope.unsorted_names:
                return True
            scope = None if scope.detached else scope.parent
        return False

    def read(self, name: str) -> Value:
        """The value of `name`, here or in a graph around. Raises KeyError if nothing has defined it
        yet.
        """
        scope: Scope | None = self
        while scope is not None:
            if (value := scope._values.get(name)) is not None:
                return value
            if scope.detached:
                return Unknown(name, Origin.ELSEWHERE)
            scope._captured.add(name)
            scope = scope.parent
        raise KeyError(name)

    def argument(self, node: onnx.NodeProto, index: int) -> Value:
        """The value of input `index` of `node`; Absent if the node or a caller leaves it out."""
        if index >= len(node.input) or node.input[index] == "":
            return Absent()
        return self.read(node.input[index])

    def attribute(self, node: onnx.NodeProto, name: str) -> onnx.AttributeProto | Absent | None:
        """An attribute of `node`, taken from the function's caller if it refers to one.

        Absent if the node has no such attribute; None if its value is not known, or if it is
        written in a way that runtimes read differently.
        """
        for attribute in node.attribute:
            if attribute.name != name:
                continue
            if not attribute.ref_attr_name:
                return attribute if is_unambiguous(attribute) else None
            # A reference that also holds a value: runtimes differ on which of the two counts.
            if value_fields(attribute) or self.attributes is None:
                return None
            passed = self.attributes.get(attribute.ref_attr_name, Absent())
            if isinstance(passed, onnx.AttributeProto) and not is_unambiguous(passed):
                return None
            return passed
        return Absent()

    def path_of(self, index: int) -> str:
        """The path to node `index`: its name, or its operator and number if it has no name."""
        node = self.nodes[index]
        return f"{self.path}{node.name or f'{node.op_type}_{index}'}"

    @property
    def display_name(self) -> str:
        """The scope's name in messages."""
        return self.path.rstrip("/") or "the main graph"


def value_fields(attribute: onnx.AttributeProto) -> set[str]:
    """The fields of an attribute that hold a value."""
    return {field.name for field, _ in attribute.ListFields()} & set(_FIELDS.values())


def is_unambiguous(attribute: onnx.AttributeProto) -> bool:
    """Whether an attribute holds no value other than the one that its type names."""
    return value_fields(attribute) <= {_FIELDS.get(attribute.type, "")}


def domain_of(name: str) -> str:
    """The domain's name, with ONNX's own domain written as the empty string."""
    return "" if name == "ai.onnx" else name


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """The opset of each domain; 0 for a domain with two versions, of which runtimes use either."""
    opsets: dict[str, int] = {}
    for item in imports:
        domain = domain_of(item.domain)
        if opsets.setdefault(domain, item.version) != item.version:
            opsets[domain] = 0
        else:
            opsets[domain] = item.version
    return opsets
