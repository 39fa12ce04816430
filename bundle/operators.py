"""Whether a serialised model can draw or train, read from the same bytes that ONNX Runtime reads.

A certificate says what an export measured, but anyone can compute the seal of a false one. So the
model is read again before it is served: every node of the graph, of the bodies in it, and of its
local functions. A node is accepted in one of these cases, tested in this order:

1. It is an operator that neither draws nor trains, by the table of operators.
2. It is an operator with a training mode (Dropout, BatchNormalization, ...), and the mode is
   visibly off: left out, or switched off by a constant.
3. It is a local function of the model, in a domain without operators of ONNX Runtime.

Any other node is refused. Nothing is computed, and unusual models are refused too. Exchanged
weights cannot be detected here: only a signature could show them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from evalmode.bundle.errors import BundleNotCertified
from evalmode.bundle.manifest import MODEL_FILE
from evalmode.bundle.onnx_messages import (
    ATTRIBUTE,
    FUNCTION,
    GRAPH,
    MODEL,
    NODE,
    OPSET,
    SPARSE,
    TENSOR,
    VALUE,
    Ambiguous,
    Fields,
    Message,
    Span,
    text_at,
)
from evalmode.bundle.operator_table import DRAWS, NEWEST_OPSETS, QUIET, TRAINS
from evalmode.bundle.wire import Malformed

Operator: TypeAlias = tuple[str, str]
"""Domain and name. ONNX's own domain is the empty string."""

_INT, _TENSOR, _BOOL = 2, 4, 9  # of AttributeProto.type and TensorProto.data_type
_MAX_DEPTH = 100  # of bodies inside one another; protobuf reads messages up to this depth
_ORT_FORMAT = b"ORTM"  # at byte 4: ONNX Runtime then reads its own format instead of protobuf


def _operators_of(names_by_domain: Mapping[str, str]) -> frozenset[Operator]:
    return frozenset(
        (domain, name) for domain, names in names_by_domain.items() for name in names.split()
    )


_QUIET, _DRAWS, _TRAINS = _operators_of(QUIET), _operators_of(DRAWS), _operators_of(TRAINS)

# The domains in which ONNX Runtime has operators, which it prefers to a function of the same name.
_RUNTIME_DOMAINS = frozenset({domain for domain, _ in _QUIET | _DRAWS | _TRAINS})

_REMEDY = "export the module again, in eval mode"


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """A model must not be served; the message is the reason, without the file's name."""


def check_operators(model: bytes) -> frozenset[Operator]:
    """The operators and local functions of the nodes, in bodies and functions too.

    Raises BundleNotCertified, naming the node, for a model that can draw or train. Also for a model
    that cannot be read, or that another program could read differently.
    """
    reader = _Reader(model)
    try:
        reader.read()
    except Malformed as error:
        raise BundleNotCertified(
            f"{MODEL_FILE} must not be served: it is not an ONNX model: {error}"
        ) from error
    except (_Refused, Ambiguous) as error:
        raise BundleNotCertified(f"{MODEL_FILE} must not be served: {error}") from None
    return frozenset(reader.operators)


@dataclass(eq=False)
class _Scope:
    """The names in a graph, or in the body of a function.

    Attributes:
        body: the fields of the graph or the function.
        is_function: whether it is a function, whose inputs are plain names and which has no
            initializers.
        opsets: the opsets that a domain may have here.
        around: the scope around it, whose names it can read; None for the main graph and for a
            function.
        detached: whether it is an argument of a function. It then reads names from the scope in
            which the function uses it, which is not known here.
    """

    body: Fields
    is_function: bool
    opsets: Sequence[Mapping[str, int]]
    around: _Scope | None = None
    detached: bool = False
    _sources: dict[str, list[tuple[Message, Span]]] | None = field(
        default=None, init=False, repr=False
    )

    def sources(self) -> dict[str, list[tuple[Message, Span]]]:
        """The definitions of each name: the kind of message, and its span.

        A broken model may define a name several times. The definitions are read only if the
        training mode of a node is a name, which few models need.
        """
        if self._sources is not None:
            return self._sources
        data = self.body.data
        sources: dict[str, list[tuple[Message, Span]]] = {}
        for span in self.body.spans("input"):
            if self.is_function:
                name = text_at(data, span)
            else:
                name = Fields(data, span, VALUE).text("name")
            sources.setdefault(name, []).append((VALUE, span))
        if not self.is_function:
            for span in self.body.spans("initializer"):
                name = Fields(data, span, TENSOR).text("name")
                sources.setdefault(name, []).append((TENSOR, span))
            for span in self.body.spans("sparse_initializer"):
                for values in Fields(data, span, SPARSE).messages("values", TENSOR):
                    sources.setdefault(values.text("name"), []).append((SPARSE, span))
        for span in self.body.spans("node"):
            for output in Fields(data, span, NODE).texts("output"):
                sources.setdefault(output, []).append((NODE, span))
        self._sources = sources
        return sources


@dataclass(frozen=True)
class _Node:
    """A node with a training mode."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Fields]
    scope: _Scope
    opsets: frozenset[int]  # those that its domain may have here; 0 if it is not imported

    def is_off(self, index: int) -> bool:
        """Whether the mode, input `index`, is left out or is the constant false."""
        if len(self.inputs) <= index or self.inputs[index] == "":
            return True
        name = self.inputs[index]
        sources: list[tuple[Message, Span]] = []
        scope: _Scope | None = self.scope
        while scope is not None:
            if scope.detached:
                return False
            sources += scope.sources().get(name, [])
            scope = scope.around
        # Programs read a name differently that is defined twice, here or in a graph around.
        if len(sources) != 1:
            return False

        message, span = sources[0]
        if message is TENSOR:
            return _is_false(Fields(self.scope.body.data, span, TENSOR))
        if message is not NODE:
            return False
        constant = Fields(self.scope.body.data, span, NODE)
        if _domain_of(constant) != "" or constant.text("op_type") != "Constant":
            return False
        attributes = list(constant.messages("attribute", ATTRIBUTE))
        return (
            len(attributes) == 1
            and len(constant.spans("output")) == 1
            and attributes[0].has_only(("name", "t", "doc_string", "type"))
            and attributes[0].text("name") == "value"
            and attributes[0].number("type") == _TENSOR
            and "t" in attributes[0]
            and _is_false(next(attributes[0].messages("t", TENSOR)))
        )

    def flag(self, name: str) -> bool | None:
        """Whether an integer attribute is set. False if it is absent, None if it is no integer."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return False
        if not attribute.has_only(("name", "i", "doc_string", "type")):
            return None
        if attribute.number("type") != _INT:
            return None
        return attribute.number("i") != 0


def _is_false(tensor: Fields) -> bool:
    """Whether a tensor is one boolean that is false, written in one of the two usual ways."""
    if tensor.number("data_type") != _BOOL or not tensor.has_only(
        ("dims", "data_type", "int32_data", "name", "raw_data", "doc_string", "metadata_props")
    ):
        return False
    if any(size != 1 for size in tensor.numbers("dims")):
        return False
    raw = [tensor.data[start:stop] for start, stop in tensor.spans("raw_data")]
    return (raw, tensor.numbers("int32_data")) in (([b"\0"], []), ([], [0]))


def _domain_of(fields: Fields) -> str:
    domain = fields.text("domain")
    return "" if domain == "ai.onnx" else domain


class _Reader:
    """One pass over every node of a model. Raises _Refused, Ambiguous or Malformed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._functions: set[Operator] = set()
        self.operators: set[Operator] = set()

    def read(self) -> None:
        """Read the main graph and all local functions, also those that nothing calls."""
        data = self._data
        if data[4:8] == _ORT_FORMAT:
            raise _Refused("it is in ONNX Runtime's own format, and must be an ONNX model")
        model = Fields(data, (0, len(data)), MODEL)
        if "graph" not in model:
            raise _Refused("it holds no graph")
        opsets = self._opsets(model, "the model")
        functions = list(model.messages("functions", FUNCTION))
        for function in functions:
            self._functions.add((_domain_of(function), function.text("name")))

        self._read_graph(model.spans("graph")[0], "", [opsets], None, depth=0)
        for function in functions:
            name = f"{_domain_of(function)}:{function.text('name')}"
            scope = _Scope(
                body=function,
                is_function=True,
                # ONNX Runtime inlines a function into the graph that calls it.
                opsets=[opsets, self._opsets(function, f"the function {name}")],
            )
            for default in function.messages("attribute_proto", ATTRIBUTE):
                self._read_attribute(default, f"{name}/", scope, depth=0, detached=True)
            self._read_nodes(scope, f"{name}/", depth=0)

    def _read_graph(
        self,
        span: Span,
        path: str,
        opsets: Sequence[Mapping[str, int]],
        around: _Scope | None,
        *,
        depth: int,
        detached: bool = False,
    ) -> None:
        if depth > _MAX_DEPTH:
            raise _Refused(f"its graphs are nested more than {_MAX_DEPTH} deep")
        graph = Fields(self._data, span, GRAPH)
        scope = _Scope(
            body=graph, is_function=False, opsets=opsets, around=around, detached=detached
        )
        for tensor in graph.spans("initializer"):
            self._require_values_inside(tensor, path)
        for sparse in graph.spans("sparse_initializer"):
            self._require_sparse_inside(sparse, path)
        self._read_nodes(scope, path, depth=depth)

    def _read_nodes(self, scope: _Scope, path: str, *, depth: int) -> None:
        """Read every node of a scope, with the graphs and tensors in its attributes."""
        for index, span in enumerate(scope.body.spans("node")):
            node = Fields(self._data, span, NODE)
            domain, name = _domain_of(node), node.text("op_type")
            operator = (domain, name)
            self.operators.add(operator)
            node_path = f"{path}{node.text('name') or f'{name}_{index}'}"

            attributes: dict[str, Fields] = {}
            for attribute in node.messages("attribute", ATTRIBUTE):
                attribute_name = attribute.text("name")
                if attribute_name in attributes:
                    raise _Refused(f"the node {node_path!r} has {attribute_name!r} twice")
                attributes[attribute_name] = attribute
                self._read_attribute(
                    attribute,
                    f"{node_path}/",
                    scope,
                    depth=depth,
                    detached=operator in self._functions,
                )

            if operator in _QUIET:
                continue
            subject = f"the node {node_path!r} is {f'{domain}::{name}' if domain else name}, which"
            if operator in _DRAWS:
                raise _Refused(f"{subject} draws random numbers: {_REMEDY}")
            if operator in _TRAINS:
                raise _Refused(f"{subject} trains: {_REMEDY}")
            if operator in _IS_OFF:
                moded = _Node(
                    inputs=node.texts("input"),
                    outputs=node.texts("output"),
                    attributes=attributes,
                    scope=scope,
                    opsets=frozenset(opsets.get(domain, 0) for opsets in scope.opsets),
                )
                if not _IS_OFF[operator](moded):
                    raise _Refused(
                        f"{subject} has a training mode that no constant switches off: {_REMEDY}"
                    )
            elif operator not in self._functions or domain in _RUNTIME_DOMAINS:
                raise _Refused(
                    f"{subject} is not known here and might draw random numbers: export the module"
                    " again as standard operators"
                )

    def _read_attribute(
        self, attribute: Fields, path: str, scope: _Scope, *, depth: int, detached: bool
    ) -> None:
        """Read the graphs and tensors in an attribute."""
        for body in (*attribute.spans("g"), *attribute.spans("graphs")):
            body_path = f"{path}{attribute.text('name')}/"
            self._read_graph(
                body, body_path, scope.opsets, scope, depth=depth + 1, detached=detached
            )
        for tensor in (*attribute.spans("t"), *attribute.spans("tensors")):
            self._require_values_inside(tensor, path)
        for sparse in (*attribute.spans("sparse_tensor"), *attribute.spans("sparse_tensors")):
            self._require_sparse_inside(sparse, path)

    def _require_values_inside(self, span: Span, path: str) -> None:
        """Refuse a tensor whose values are in another file, which no hash covers."""
        tensor = Fields(self._data, span, TENSOR)
        if "external_data" in tensor or tensor.number("data_location") != 0:
            name = path + tensor.text("name")
            raise _Refused(
                f"the values of the tensor {name!r} are in another file, which the bundle's"
                " digest does not cover"
            )

    def _require_sparse_inside(self, span: Span, path: str) -> None:
        sparse = Fields(self._data, span, SPARSE)
        for tensor in (*sparse.spans("values"), *sparse.spans("indices")):
            self._require_values_inside(tensor, path)

    def _opsets(self, importer: Fields, subject: str) -> dict[str, int]:
        """The opset of each domain that a model or a function imports.

        Two of one domain are refused: some programs take the first, some the last or the highest.
        """
        opsets: dict[str, int] = {}
        for opset in importer.messages("opset_import", OPSET):
            domain, version = _domain_of(opset), opset.number("version")
            domain_name = domain or "ai.onnx"
            if opsets.setdefault(domain, version) != version:
                raise _Refused(
                    f"{subject} imports opsets {opsets[domain]} and {version} of {domain_name}:"
                    " programs differ on which one counts"
                )
            if not 0 < version < 1 << 31:
                raise _Refused(f"{subject} imports opset {version} of {domain_name}")
            newest = NEWEST_OPSETS.get(domain)
            if newest is not None and version > newest:
                raise _Refused(
                    f"{subject} imports opset {version} of {domain_name}, and the newest known"
                    f" here is {newest}: export it with an older opset"
                )
        return opsets


def _is_dropout_off(node: _Node) -> bool:
    """Dropout 1 and 6 train unless `is_test` is set, 7 and 10 never, and later ones by input 2."""
    return node.is_off(2) and (min(node.opsets) >= 7 or node.flag("is_test") is True)


def _is_batch_normalization_off(node: _Node) -> bool:
    """BatchNormalization 1 and 6 train unless `is_test` is set, later ones by `training_mode`.

    7 and 9 train where they return the statistics of the batch.
    """
    return (
        not any(node.outputs[1:])
        and node.flag("training_mode") is False
        and (min(node.opsets) >= 7 or node.flag("is_test") is True)
    )


# For each operator with a training mode, whether a node has it visibly off. ONNX Runtime's
# optimiser writes the last four.
_IS_OFF: Mapping[Operator, Callable[[_Node], bool]] = {
    ("", "Dropout"): _is_dropout_off,
    ("", "BatchNormalization"): _is_batch_normalization_off,
    ("com.ms.internal.nhwc", "BatchNormalization"): (
        lambda node: node.flag("training_mode") is False
    ),
    ("com.microsoft", "BitmaskDropout"): lambda node: node.is_off(2),
    ("com.microsoft", "BiasDropout"): lambda node: node.is_off(4),
    ("com.microsoft", "BitmaskBiasDropout"): lambda node: node.is_off(4),
}
JUDGED = frozenset(_IS_OFF)
