"""The calls between a model's functions: recursion, and calls without a bound, are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.scope import domain_of

Identity = tuple[str, str, str]
"""Domain, name and overload of a function."""

# The nodes of all calls together. Each call is walked, and the number of calls can grow
# exponentially: with 40 functions, each of which calls the next one twice, it is 2**40.
_MAX_NODES = 100_000
_MAX_NAMES = 2_000_000  # inputs, outputs, attributes and weights, which each call binds again


def function_id(node: onnx.NodeProto | onnx.FunctionProto) -> Identity:
    """The identity of a function, or of the function that a node would call."""
    name = node.name if isinstance(node, onnx.FunctionProto) else node.op_type
    return domain_of(node.domain), name, node.overload


def order_of_calls(
    model: onnx.ModelProto, functions: Mapping[Identity, onnx.FunctionProto]
) -> Sequence[Identity]:
    """The functions, each before those that it calls.

    Raises Broken if a function calls itself, directly or through others, or if all calls together
    have more nodes or names than the limits.
    """
    node_counts: dict[Identity, int] = {}
    name_counts: dict[Identity, int] = {}
    callees: dict[Identity, list[Identity]] = {}
    for identity, function in functions.items():
        nodes = list(_nodes_in(function.node, function.attribute_proto))
        node_counts[identity] = len(nodes)
        callees[identity] = _calls_in(nodes, functions)

        # Inputs, outputs, attributes and weights, those of bodies at any depth included.
        attributes = list(function.attribute_proto)
        name_count = len(function.input) + len(function.output)
        for node in nodes:
            name_count += len(node.input) + len(node.output)
            attributes += node.attribute
        name_count += len(attributes)
        for attribute in attributes:
            for graph in _graphs_in(attribute):
                name_count += len(graph.input) + len(graph.output)
                name_count += len(graph.initializer) + len(graph.sparse_initializer)
        name_counts[identity] = name_count

    try:
        callees_first = list(TopologicalSorter(callees).static_order())
    except CycleError as error:
        domain, name, _ = error.args[1][0]
        raise Broken(f"the function {domain}:{name} calls itself") from None

    # The walk enters the functions that the main graph calls, and those that nothing calls.
    entered = _calls_in(_nodes_in(model.graph.node, ()), functions)
    called = set(entered).union(*callees.values())
    entered += [identity for identity in functions if identity not in called]
    for counts, limit, noun in (
        (node_counts, _MAX_NODES, "nodes"),
        (name_counts, _MAX_NAMES, "names"),
    ):
        totals: dict[Identity, int] = {}  # of a function and of all that it calls
        for identity in callees_first:
            totals[identity] = counts[identity]
            for callee in callees[identity]:
                totals[identity] += totals[callee]
        if sum(totals[identity] for identity in entered) > limit:
            raise Broken(
                f"its functions call one another: all calls together have more than {limit:,}"
                f" {noun}"
            )
    return callees_first[::-1]


def _calls_in(
    nodes: Iterable[onnx.NodeProto], functions: Mapping[Identity, onnx.FunctionProto]
) -> list[Identity]:
    """The functions that the nodes call, once for each call."""
    identities = map(function_id, nodes)
    return [identity for identity in identities if identity in functions]


def _nodes_in(
    nodes: Iterable[onnx.NodeProto], attributes: Iterable[onnx.AttributeProto]
) -> Iterator[onnx.NodeProto]:
    """The nodes, those of the graphs in the attributes, and those of all bodies inside."""
    pending = list(nodes)
    for attribute in attributes:
        pending += _body_nodes(attribute)
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            pending += _body_nodes(attribute)


def _body_nodes(attribute: onnx.AttributeProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs_in(attribute):
        yield from graph.node


def _graphs_in(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs
