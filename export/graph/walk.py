"""Walking a model: every node of the main graph, of bodies at any depth, and of local functions at
each of their calls.

Knows no rule. A node's path names where it stands: `loop_1/body/drop` is the node `drop` in the
attribute `body` of the node `loop_1`, and `call_2/my:block/drop` is `drop` in the function
`my:block` as `call_2` enters it. A function that nothing calls is walked too, with inputs and
attributes that nobody knows. `training_info` is not: no inference runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from evalmode.export.graph.calls import Identity, function_id, order_of_calls
from evalmode.export.graph.errors import Broken
from evalmode.export.graph.fold import decide, decider
from evalmode.export.graph.order import is_sorted, sorted_order
from evalmode.export.graph.scope import (
    Absent,
    Budget,
    Fixed,
    Made,
    Open,
    Origin,
    Scope,
    Value,
    domain_of,
    is_sound,
    opsets_of,
)
from evalmode.export.graph.weight import Array, Source, Weight
from evalmode.export.graph.wire import Skimmed

_DEEPEST = 100  # bodies and functions inside one another; each takes a few of Python's own frames
_OVERRIDABLE_SINCE = 4  # IR version
# Of the paths to nodes and weights in bodies and functions, where a long name counts at each call.
_PATH_CHARACTERS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class NodeAt:
    """A node, the path to it, the opset that its domain has there, and the scope that its names are
    read in.

    `is_dead` says that it stands in a function that nothing calls, or in one as such a function
    calls it.
    """

    node: onnx.NodeProto
    path: str
    opset: int
    scope: Scope
    is_call: bool = False
    is_dead: bool = False

    @property
    def domain(self) -> str:
        """The operator's domain, with ONNX's own spelled as the empty string."""
        return domain_of(self.node.domain)

    @property
    def op(self) -> str:
        """The operator as a message names it: its type, after its domain where that is not ONNX's
        own.
        """
        return f"{self.domain}::{self.node.op_type}" if self.domain else self.node.op_type

    def attribute(self, name: str) -> onnx.AttributeProto | Absent | None:
        """The attribute, as the function's caller gave it; Absent where it is not there, None where
        nobody knows.
        """
        return self.scope.attribute(self.node, name)

    def flag(self, name: str) -> bool | None:
        """Whether an integer attribute is set; None where that is not known. Absent is not set."""
        found = self.attribute(name)
        if isinstance(found, Absent):
            return False
        return None if found is None or found.type != onnx.AttributeProto.INT else bool(found.i)

    def has_output(self, index: int) -> bool:
        """Whether the node's optional output `index` is asked for."""
        return len(self.node.output) > index and self.node.output[index] != ""

    def has_input(self, index: int) -> bool:
        """Whether the optional input `index` is given, by the function's caller too."""
        return not isinstance(self.scope.argument(self.node, index), Absent)

    def constant(self, index: int) -> Array | None:
        """The value of input `index` where the graph alone decides it, else None."""
        return decide(self.scope.argument(self.node, index))

    def decider(self, index: int) -> str:
        """Who decides input `index` where the graph alone does not: the end of a sentence that
        begins with "it is".
        """
        return decider(self.scope.argument(self.node, index))


class Walker:
    """One walk over a model; `nodes` and `weights` hold what it has met. Raises Broken for a model
    that is broken.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        imports: Sequence[onnx.OperatorSetIdProto],
        source: Source,
        skimmed: Skimmed | None,
    ) -> None:
        self.nodes: list[NodeAt] = []
        self.weights: list[Weight] = []
        self._source, self._skimmed = source, skimmed
        self._outermost_first: Sequence[Identity] = ()
        self._opsets = opsets_of(imports)
        # Before IR version 4 every initializer had to be an input, and ONNX Runtime takes no value
        # for such an input.
        self._overridable = not 0 < model.ir_version < _OVERRIDABLE_SINCE
        _text("the opset imports", [item.domain for item in imports])
        for item in model.functions:
            imported = [one.domain for one in item.opset_import]
            _text(
                "a function",
                [item.name, item.domain, item.overload, *item.input, *item.output, *imported],
            )
        self._functions = {function_id(item): item for item in model.functions}
        self._opsets_inside = {
            identity: self._opsets | opsets_of(item.opset_import)
            for identity, item in self._functions.items()
        }
        if len(self._functions) < len(model.functions):
            raise Broken("it defines a function twice")
        self._budget = Budget()
        self._path_characters = 0
        self._seen: set[Identity] = set()
        self._dead = False  # whether the main graph, and so all that it calls, has been walked
        self._again = self._depth = (
            0  # calls, in progress, of what was walked before; all that is in progress
        )

    def walk(self, model: onnx.ModelProto) -> None:
        """The main graph and what it calls, then the functions that nothing called."""
        self._outermost_first = order_of_calls(model, self._functions)
        self._graph(model.graph, "", self._opsets, None, Origin.CALLER)
        self._dead = True
        # Those that no function calls come first: what they call is entered with what they give.
        for identity in self._outermost_first:
            if identity not in self._seen:
                function = self._functions[identity]
                unknown = {name: Open(name, Origin.FUNCTION) for name in function.input}
                self._function(function, "", unknown, None)

    def _graph(
        self,
        graph: onnx.GraphProto,
        path: str,
        opsets: Mapping[str, int],
        parent: Scope | None,
        origin: Origin,
        *,
        detached: bool = False,
    ) -> Scope:
        attributes = None if parent is None else parent.attributes
        outputs = [item.name for item in graph.output]
        scope = Scope(path, graph.node, outputs, opsets, parent, attributes)
        scope.detached, scope.budget = detached, self._budget
        _text(
            "the main graph" if parent is None else path,
            [
                text
                for item in (*graph.input, *graph.output)
                for text in (
                    item.name,
                    *(size.dim_param for size in item.type.tensor_type.shape.dim),
                )
            ],
        )
        given = {tensor.name for tensor in graph.initializer} | {
            item.values.name for item in graph.sparse_initializer
        }
        for item in graph.input:
            if item.name not in given:
                scope.define(item.name, Open(item.name, origin))
        inputs = {item.name for item in graph.input}
        for tensor in graph.initializer:
            scope.define(tensor.name, self._initializer(tensor, scope, tensor.name in inputs))
        for sparse in graph.sparse_initializer:
            overridable = sparse.values.name in inputs
            fixed: Value = (
                Open(sparse.values.name, Origin.OVERRIDABLE)
                if overridable
                else Fixed(sparse, self._budget)
            )
            scope.define(sparse.values.name, fixed)
        self._nodes(scope)
        return scope

    def _initializer(self, tensor: onnx.TensorProto, scope: Scope, is_input: bool) -> Value:
        weight = self._weight(tensor, scope, tensor.name)
        self._list(weight)
        if is_input and (self._overridable or scope.parent is not None):
            return Open(tensor.name, Origin.OVERRIDABLE)
        return Fixed(weight, self._budget)

    def _weight(self, tensor: onnx.TensorProto, scope: Scope, name: str) -> Weight:
        _text(
            scope.where,
            [name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))],
        )
        self._count(scope, scope.path + name)
        span = self._skimmed.span(tensor) if self._skimmed else None
        return self._source.weight(tensor, span, name=name, path=scope.path + name)

    def _count(self, scope: Scope, path: str) -> None:
        if scope.path:
            self._path_characters += len(path)
        if self._path_characters > _PATH_CHARACTERS:
            raise Broken(
                f"the paths to its nodes come to more than {_PATH_CHARACTERS:,} characters: its"
                " bodies and functions need shorter names"
            )

    def _list(self, weight: Weight) -> None:
        if not self._again:
            self.weights.append(weight)

    def _nodes(self, scope: Scope) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Broken(
                f"bodies and functions stand more than {_DEEPEST} deep inside one another at"
                f" {scope.where}"
            )
        order: Sequence[int] = range(len(scope.nodes))
        is_main = not scope.path
        if is_main and not is_sorted(scope.nodes, scope.names):
            order = sorted_order(scope.nodes, scope.names)
            scope.made_anywhere = frozenset(name for node in scope.nodes for name in node.output)
        for index in order:
            path = scope.path_of(index)
            self._count(scope, path)
            self._node(scope, index, scope.nodes[index], path)
        for name in scope.outputs:
            _require(scope, name, f"the output {name!r} of {scope.where}")
        self._depth -= 1

    def _node(self, scope: Scope, index: int, node: onnx.NodeProto, path: str) -> None:
        names = [item.name for item in node.attribute]
        references = [item.ref_attr_name for item in node.attribute]
        _text(
            path,
            [
                node.op_type,
                node.domain,
                node.overload,
                *node.input,
                *node.output,
                *names,
                *references,
            ],
        )
        if not node.op_type:
            raise Broken(f"the node {path!r} has no operator")
        if len(set(names)) < len(names):
            raise Broken(f"the node {path!r} has an attribute twice")
        for name in node.input:
            if name:
                _require(scope, name, f"the input {name!r} of the node {path!r}")
        opset = scope.opsets.get(domain_of(node.domain), 0)
        function = self._functions.get(function_id(node))
        is_call = function is not None
        at = NodeAt(
            node=node, path=path, opset=opset, scope=scope, is_call=is_call, is_dead=self._dead
        )
        self.nodes.append(at)
        self._bodies(scope, index, node, path)
        if function is not None:
            scope.calls[index] = self._call(scope, node, function, path)
        for name in filter(None, node.output):
            scope.define(name, Made(scope, index, name))

    def _bodies(self, scope: Scope, index: int, node: onnx.NodeProto, path: str) -> None:
        for item in node.attribute:
            is_call = function_id(node) in self._functions
            self._attribute(scope, index, item, path, detached=is_call)
            if item.HasField("t"):
                is_constant = (
                    node.op_type == "Constant"
                    and domain_of(node.domain) == ""
                    and len(node.output) == 1
                )
                name = node.output[0] if is_constant else f"{path[len(scope.path) :]}/{item.name}"
                scope.tensors[index, item.name] = weight = self._weight(item.t, scope, name)
                # the parameters of other operators (a forest's thresholds) are not weights
                if is_constant:
                    self._list(weight)

    def _attribute(
        self,
        scope: Scope,
        index: int,
        item: onnx.AttributeProto,
        path: str,
        *,
        detached: bool,
    ) -> None:
        for graph in [item.g, *item.graphs] if item.HasField("g") else item.graphs:
            body = self._graph(
                graph,
                f"{path}/{item.name}/",
                scope.opsets,
                scope,
                Origin.BODY,
                detached=detached,
            )
            # A reference means the caller's graph, whatever else the attribute holds.
            if is_sound(item) and not item.ref_attr_name and not detached:
                scope.bodies[index, item.name] = body

    def _call(
        self, scope: Scope, node: onnx.NodeProto, function: onnx.FunctionProto, path: str
    ) -> Scope:
        if len(node.input) > len(function.input):
            raise Broken(
                f"the node {path!r} has {len(node.input)} inputs, its function takes"
                f" {len(function.input)}"
            )
        bound = {name: scope.argument(node, index) for index, name in enumerate(function.input)}
        given = {item.name: scope.attribute(node, item.name) for item in node.attribute}
        defaults = {item.name: item for item in function.attribute_proto}
        known = {name: value for name, value in given.items() if not isinstance(value, Absent)}
        return self._function(function, f"{path}/", bound, defaults | known)

    def _function(
        self,
        function: onnx.FunctionProto,
        path: str,
        inputs: Mapping[str, Value],
        attributes: Mapping[str, onnx.AttributeProto | None] | None,
    ) -> Scope:
        identity, named = function_id(function), f"{function.domain}:{function.name}"
        again = identity in self._seen
        self._again += again
        self._seen.add(identity)
        opsets = self._opsets_inside[identity]
        scope = Scope(f"{path}{named}/", function.node, function.output, opsets, None, attributes)
        scope.budget = self._budget
        if len(set(function.input)) < len(function.input):
            raise Broken(f"the function {named} names an input twice")
        for name, value in inputs.items():
            scope.define(name, value)
        for item in function.attribute_proto:  # a default may be a graph
            self._attribute(scope, -1, item, scope.path.rstrip("/"), detached=True)
        self._nodes(scope)
        self._again -= again
        return scope


def _text(where: str, names: list[str]) -> None:
    """Raise Broken for a name that is no text: protobuf then hands out bytes."""
    if bytes in map(type, names):
        raise Broken(f"a name in {where} is not UTF-8")


def _require(scope: Scope, name: str, what: str) -> None:
    try:
        scope.read(name)
    except KeyError:
        around: Scope | None = scope
        made = False
        while around is not None and not made:
            made = any(name in node.output for node in around.nodes)
            around = around.parent
        problem = (
            "is made only later: the nodes are not sorted, or form a cycle"
            if made
            else "is made by nothing"
        )
        raise Broken(f"{what} {problem}") from None
