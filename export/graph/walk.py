"""Walk a model: visit each node of the main graph, of bodies at any depth, and of local functions
at each of their calls.

The order of a walk:

1. The functions are sorted, callers before callees. Recursion and call trees that are too large are
   refused (`calls`).
2. The main graph: its inputs and initializers get their meaning. Then its nodes are visited in the
   order in which they run.
3. One node: its names are tested and the node is recorded. Then come the bodies in its attributes
   (branches, loops) and the function that it calls, with the arguments of this call. Last, its
   outputs get their meaning.
4. The functions that nothing calls, with unknown inputs and attributes.

`training_info` is not walked: inference never runs it.

A path says where a node is. `loop_1/body/drop` is the node `drop` in the attribute `body` of the
node `loop_1`; `call_2/my:block/drop` is `drop` in the function `my:block` as `call_2` enters it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from evalmode.export.graph.calls import Identity, function_id, order_of_calls
from evalmode.export.graph.errors import Broken
from evalmode.export.graph.fold import constant_of, describe_source
from evalmode.export.graph.order import is_sorted, sorted_order
from evalmode.export.graph.scope import (
    Absent,
    Budget,
    Initializer,
    NodeOutput,
    Origin,
    Scope,
    Unknown,
    Value,
    domain_of,
    is_unambiguous,
    opsets_of,
)
from evalmode.export.graph.weight import Array, Storage, Weight
from evalmode.export.graph.wire import Skimmed

# Bodies and functions inside one another. Each level takes a few frames of Python's own stack.
_MAX_DEPTH = 100
# IR version 4 is the first in which an initializer need not be an input as well.
_OVERRIDABLE_SINCE = 4
# Of the paths to nodes and weights in bodies and functions. A path repeats the names of all levels
# around it, so a small file with long names could otherwise take gigabytes.
_MAX_PATH_CHARACTERS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class NodeAt:
    """A node, its path, the opset of its domain, and the scope in which its names are read.

    `is_call` marks a call of a local function. `is_dead` marks a node of a function that nothing
    calls, or of a function that only such functions call.
    """

    node: onnx.NodeProto
    path: str
    opset: int
    scope: Scope
    is_call: bool = False
    is_dead: bool = False

    @property
    def domain(self) -> str:
        """The operator's domain; ONNX's own domain is the empty string."""
        return domain_of(self.node.domain)

    @property
    def op(self) -> str:
        """The operator's name in messages: `Dropout`, or `my.domain::Block`."""
        return f"{self.domain}::{self.node.op_type}" if self.domain else self.node.op_type

    def attribute(self, name: str) -> onnx.AttributeProto | Absent | None:
        """The attribute as the function's caller passes it; Absent if there is none, None if its
        value is not known.
        """
        return self.scope.attribute(self.node, name)

    def flag(self, name: str) -> bool | None:
        """Whether an integer attribute is set; None if that is not known. Absent means not set."""
        attribute = self.attribute(name)
        if isinstance(attribute, Absent):
            return False
        if attribute is None or attribute.type != onnx.AttributeProto.INT:
            return None
        return bool(attribute.i)

    def has_output(self, index: int) -> bool:
        """Whether the node names its optional output `index`."""
        return len(self.node.output) > index and self.node.output[index] != ""

    def has_input(self, index: int) -> bool:
        """Whether the optional input `index` is there; a function's caller must pass it too."""
        return not isinstance(self.scope.argument(self.node, index), Absent)

    def constant(self, index: int) -> Array | None:
        """The value of input `index` if the graph alone decides it, else None."""
        return constant_of(self.scope.argument(self.node, index))

    def decider(self, index: int) -> str:
        """What decides input `index` where the graph alone does not. The text ends a sentence that
        begins with "it is".
        """
        return describe_source(self.scope.argument(self.node, index))


class Walker:
    """One walk over a model. `nodes` and `weights` collect what it visits.

    Raises Broken, when it is built or when it walks, for a model that is not valid.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        imports: Sequence[onnx.OperatorSetIdProto],
        storage: Storage,
        skimmed: Skimmed | None,
    ) -> None:
        self.nodes: list[NodeAt] = []
        self.weights: list[Weight] = []
        self._storage = storage
        self._skimmed = skimmed
        # Before IR version 4 each initializer had to be an input. ONNX Runtime does not let a
        # caller override such an input, so it is a constant.
        self._overridable = not 0 < model.ir_version < _OVERRIDABLE_SINCE

        _require_utf8("the opset imports", [item.domain for item in imports])
        for function in model.functions:
            names = [function.name, function.domain, function.overload]
            names += [*function.input, *function.output]
            names += [item.domain for item in function.opset_import]
            _require_utf8("a function", names)
        self._functions = {function_id(function): function for function in model.functions}
        self._opsets = opsets_of(imports)
        self._opsets_inside = {
            identity: self._opsets | opsets_of(function.opset_import)
            for identity, function in self._functions.items()
        }
        if len(self._functions) < len(model.functions):
            raise Broken("it defines a function twice")

        self._budget = Budget()
        self._path_characters = 0
        self._depth = 0
        self._walked: set[Identity] = set()
        # Calls in progress of functions that were walked before: their weights are listed already.
        self._repeated_calls = 0
        self._is_dead = False  # True once the main graph, and all that it calls, has been walked

    def walk(self, model: onnx.ModelProto) -> None:
        """Visit the main graph and what it calls, then the functions that nothing called."""
        callers_first = order_of_calls(model, self._functions)
        self._walk_graph(
            model.graph, path="", opsets=self._opsets, parent=None, origin=Origin.CALLER
        )
        self._is_dead = True
        # Callers come first, so that the functions that they call get their arguments.
        for identity in callers_first:
            if identity not in self._walked:
                function = self._functions[identity]
                inputs: dict[str, Value] = {
                    name: Unknown(name, Origin.FUNCTION) for name in function.input
                }
                self._walk_function(function, path="", inputs=inputs, attributes=None)

    def _walk_graph(
        self,
        graph: onnx.GraphProto,
        *,
        path: str,
        opsets: Mapping[str, int],
        parent: Scope | None,
        origin: Origin,
        detached: bool = False,
    ) -> Scope:
        """Visit the main graph (without a parent) or a body; `origin` is that of its inputs."""
        scope = Scope(
            path=path,
            nodes=graph.node,
            outputs=[item.name for item in graph.output],
            opsets=opsets,
            budget=self._budget,
            parent=parent,
            attributes=None if parent is None else parent.attributes,
            detached=detached,
        )
        names = []
        for item in (*graph.input, *graph.output):
            names.append(item.name)
            names += [size.dim_param for size in item.type.tensor_type.shape.dim]
        _require_utf8(scope.display_name, names)

        # An input with the name of an initializer is that initializer, as a default value.
        defaults = {tensor.name for tensor in graph.initializer}
        defaults |= {sparse.values.name for sparse in graph.sparse_initializer}
        for item in graph.input:
            if item.name not in defaults:
                scope.define(item.name, Unknown(item.name, origin))

        input_names = {item.name for item in graph.input}
        for tensor in graph.initializer:
            weight = self._weight(tensor, scope, tensor.name, is_listed=True)
            is_input = tensor.name in input_names
            if is_input and (self._overridable or parent is not None):
                scope.define(tensor.name, Unknown(tensor.name, Origin.OVERRIDABLE))
            else:
                scope.define(tensor.name, Initializer(weight, self._budget))
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            if name in input_names:
                scope.define(name, Unknown(name, Origin.OVERRIDABLE))
            else:
                scope.define(name, Initializer(sparse, self._budget))

        self._walk_nodes(scope)
        return scope

    def _walk_function(
        self,
        function: onnx.FunctionProto,
        *,
        path: str,
        inputs: Mapping[str, Value],
        attributes: Mapping[str, onnx.AttributeProto | None] | None,
    ) -> Scope:
        """Visit a function as one call enters it; `attributes` is None if no call is known."""
        identity = function_id(function)
        name = f"{function.domain}:{function.name}"
        is_repeated = identity in self._walked
        self._walked.add(identity)
        self._repeated_calls += is_repeated
        scope = Scope(
            path=f"{path}{name}/",
            nodes=function.node,
            outputs=function.output,
            opsets=self._opsets_inside[identity],
            budget=self._budget,
            attributes=attributes,
        )
        if len(set(function.input)) < len(function.input):
            raise Broken(f"the function {name} names an input twice")
        for input_name, value in inputs.items():
            scope.define(input_name, value)
        for attribute in function.attribute_proto:  # a default may be a graph
            self._walk_bodies(scope, -1, attribute, scope.path.rstrip("/"), detached=True)
        self._walk_nodes(scope)
        self._repeated_calls -= is_repeated
        return scope

    def _walk_nodes(self, scope: Scope) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Broken(
                f"bodies and functions are nested more than {_MAX_DEPTH} deep at"
                f" {scope.display_name}"
            )
        order: Sequence[int] = range(len(scope.nodes))
        # ONNX Runtime sorts the main graph, and refuses bodies and functions that are not sorted.
        is_main_graph = not scope.path
        if is_main_graph and not is_sorted(scope.nodes, scope.names):
            order = sorted_order(scope.nodes, scope.names)
            scope.unsorted_names = frozenset(name for node in scope.nodes for name in node.output)
        for index in order:
            path = scope.path_of(index)
            self._count_path(scope, path)
            self._walk_node(scope, index, path)
        for name in scope.outputs:
            _require_defined(scope, name, f"the output {name!r} of {scope.display_name}")
        self._depth -= 1

    def _walk_node(self, scope: Scope, index: int, path: str) -> None:
        # Step 1: the node's own names.
        node = scope.nodes[index]
        attribute_names = [attribute.name for attribute in node.attribute]
        references = [attribute.ref_attr_name for attribute in node.attribute]
        names = [node.op_type, node.domain, node.overload, *node.input, *node.output]
        _require_utf8(path, names + attribute_names + references)
        if not node.op_type:
            raise Broken(f"the node {path!r} has no operator")
        if len(set(attribute_names)) < len(attribute_names):
            raise Broken(f"the node {path!r} has an attribute twice")
        for name in node.input:
            if name:
                _require_defined(scope, name, f"the input {name!r} of the node {path!r}")

        # Step 2: record the node.
        function = self._functions.get(function_id(node))
        self.nodes.append(
            NodeAt(
                node=node,
                path=path,
                opset=scope.opsets.get(domain_of(node.domain), 0),
                scope=scope,
                is_call=function is not None,
                is_dead=self._is_dead,
            )
        )

        # Step 3: the bodies and the tensors in its attributes. Only the value of a Constant is
        # listed as a weight; the parameters of other operators (a forest's thresholds) are not.
        is_constant = (
            node.op_type == "Constant" and domain_of(node.domain) == "" and len(node.output) == 1
        )
        for attribute in node.attribute:
            self._walk_bodies(scope, index, attribute, path, detached=function is not None)
            if attribute.HasField("t"):
                name = f"{path[len(scope.path) :]}/{attribute.name}"
                if is_constant:
                    name = node.output[0]
                weight = self._weight(attribute.t, scope, name, is_listed=is_constant)
                scope.tensors[index, attribute.name] = weight

        # Step 4: the function that the node calls, with the arguments of this call.
        if function is not None:
            if len(node.input) > len(function.input):
                raise Broken(
                    f"the node {path!r} has {len(node.input)} inputs, its function takes"
                    f" {len(function.input)}"
                )
            inputs = {name: scope.argument(node, i) for i, name in enumerate(function.input)}
            attributes: dict[str, onnx.AttributeProto | None]
            attributes = {default.name: default for default in function.attribute_proto}
            for name in attribute_names:
                value = scope.attribute(node, name)
                if not isinstance(value, Absent):
                    attributes[name] = value
            scope.calls[index] = self._walk_function(
                function, path=f"{path}/", inputs=inputs, attributes=attributes
            )

        # Step 5: the outputs, which only later nodes may read.
        for name in node.output:
            if name:
                scope.define(name, NodeOutput(scope, index, name))

    def _walk_bodies(
        self,
        scope: Scope,
        index: int,
        attribute: onnx.AttributeProto,
        path: str,
        *,
        detached: bool,
    ) -> None:
        """Visit the graphs in an attribute of node `index`."""
        graphs = list(attribute.graphs)
        if attribute.HasField("g"):
            graphs.insert(0, attribute.g)
        for graph in graphs:
            body = self._walk_graph(
                graph,
                path=f"{path}/{attribute.name}/",
                opsets=scope.opsets,
                parent=scope,
                origin=Origin.BODY,
                detached=detached,
            )
            # A reference means the caller's graph, whatever else the attribute holds.
            if is_unambiguous(attribute) and not attribute.ref_attr_name and not detached:
                scope.bodies[index, attribute.name] = body

    def _weight(
        self, tensor: onnx.TensorProto, scope: Scope, name: str, *, is_listed: bool
    ) -> Weight:
        """The weight of a tensor, which `weights` lists at the first walk of its function."""
        texts = [name]
        for entry in tensor.external_data:
            texts += [entry.key, entry.value]
        _require_utf8(scope.display_name, texts)
        path = scope.path + name
        self._count_path(scope, path)
        span = self._skimmed.span(tensor) if self._skimmed else None
        weight = self._storage.weight(tensor, span, name=name, path=path)
        if is_listed and self._repeated_calls == 0:
            self.weights.append(weight)
        return weight

    def _count_path(self, scope: Scope, path: str) -> None:
        """Add a path to the total. Raises Broken if the total is too large."""
        if scope.path:
            self._path_characters += len(path)
        if self._path_characters > _MAX_PATH_CHARACTERS:
            raise Broken(
                f"the paths to its nodes come to more than {_MAX_PATH_CHARACTERS:,} characters: its"
                " bodies and functions need shorter names"
            )


def _require_utf8(location: str, names: list[str]) -> None:
    """Raise Broken for a name that is not text: protobuf returns such a name as bytes."""
    if bytes in map(type, names):
        raise Broken(f"a name in {location} is not UTF-8")


def _require_defined(scope: Scope, name: str, subject: str) -> None:
    """Raise Broken, about `subject`, if nothing has defined the name yet."""
    try:
        scope.read(name)
    except KeyError:
        problem = "is defined by nothing"
        outer: Scope | None = scope
        while outer is not None:
            if any(name in node.output for node in outer.nodes):
                problem = "is defined only later: the nodes are not sorted, or form a cycle"
                break
            outer = outer.parent
        raise Broken(f"{subject} {problem}") from None
