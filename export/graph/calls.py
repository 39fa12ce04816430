"""Which functions of a model call which: that none calls itself, and how many nodes all calls make.
Knows no rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx

from evalmode.export.graph.errors import Broken
from evalmode.export.graph.scope import domain_of

Identity = tuple[str, str, str]
"""Domain, name and overload."""

_MOST = 100_000  # nodes; forty functions of two nodes each can come to a billion
_MOST_NAMES = 2_000_000  # inputs, outputs, attributes and weights, which each call binds anew


def function_id(node: onnx.NodeProto | onnx.FunctionProto) -> Identity:
    """What a call and the function that it means have in common."""
    name = node.name if isinstance(node, onnx.FunctionProto) else node.op_type
    return domain_of(node.domain), name, node.overload


def order_of_calls(
    model: onnx.ModelProto, functions: Mapping[Identity, onnx.FunctionProto]
) -> Sequence[Identity]:
    """The functions, each before those that it calls.

    Raises Broken where one calls itself, at once or through others, and where all calls together
    come to more nodes than anyone would write.
    """
    inside = {
        identity: list(_every(function.node, function.attribute_proto))
        for identity, function in functions.items()
    }
    calls = {
        identity: [one for one in map(function_id, nodes) if one in functions]
        for identity, nodes in inside.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        domain, name, _ = error.args[1][0]
        raise Broken(f"the function {domain}:{name} calls itself") from None
    names = {
        identity: _names(function.node, function.attribute_proto)
        + len(function.input)
        + len(function.output)
        for identity, function in functions.items()
    }
    called = [one for one in map(function_id, _every(model.graph.node, ())) if one in functions]
    uncalled = (
        functions.keys() - set(called) - {one for callees in calls.values() for one in callees}
    )
    nodes_in = {identity: len(nodes) for identity, nodes in inside.items()}
    for own, most, what in ((nodes_in, _MOST, "nodes"), (names, _MOST_NAMES, "names")):
        sizes: dict[Identity, int] = {}
        for identity in order:
            sizes[identity] = own[identity] + sum(sizes[one] for one in calls[identity])
        if sum(sizes[one] for one in (*called, *uncalled)) > most:
            raise Broken(
                f"its functions call one another until there are more than {most:,} {what}"
            )
    return order[::-1]


def _every(
    nodes: Iterable[onnx.NodeProto], attributes: Iterable[onnx.AttributeProto]
) -> Iterator[onnx.NodeProto]:
    """The nodes and those of the bodies in them, as they are written; and those in the
    attributes.
    """
    pending = [*nodes, *_in_bodies(attributes)]
    while pending:
        node = pending.pop()
        yield node
        pending += _in_bodies(node.attribute)


def _names(nodes: Iterable[onnx.NodeProto], attributes: Sequence[onnx.AttributeProto]) -> int:
    """How many inputs, outputs, attributes and weights the nodes have, and the bodies in them."""
    count = len(attributes) + sum(_bound(attributes))
    for node in _every(nodes, attributes):
        count += len(node.input) + len(node.output) + len(node.attribute)
        count += sum(_bound(node.attribute))
    return count


def _bound(attributes: Iterable[onnx.AttributeProto]) -> Iterator[int]:
    """How many names each graph in the attributes binds beside those of its nodes."""
    for item in attributes:
        for graph in (item.g, *item.graphs) if item.HasField("g") else item.graphs:
            weights = len(graph.initializer) + len(graph.sparse_initializer)
            yield len(graph.input) + len(graph.output) + weights


def _in_bodies(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.NodeProto]:
    for item in attributes:
        if item.HasField("g"):
            yield from item.g.node
        for graph in item.graphs:
            yield from graph.node
