"""The order in which the nodes of a graph run: ONNX Runtime sorts the main graph, whatever order it
is written in. It refuses bodies and functions that are not sorted. Knows no rule.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx


def is_sorted(nodes: Sequence[onnx.NodeProto], given: Container[str]) -> bool:
    """Whether each node reads only what is given and what the nodes before it make."""
    makers = _makers(nodes, given)
    return all(
        makers.get(name, -1) < index for index, node in enumerate(nodes) for name in _reads(node)
    )


def sorted_order(nodes: Sequence[onnx.NodeProto], given: Container[str]) -> Sequence[int]:
    """The numbers of the nodes, each after those that make what it reads; as they are written where
    they form a cycle.
    """
    makers = _makers(nodes, given)
    needs = {
        index: {makers[name] for name in _reads(node) if name in makers}
        for index, node in enumerate(nodes)
    }
    try:
        return list(TopologicalSorter(needs).static_order())
    except CycleError:
        return range(len(nodes))


def _makers(nodes: Sequence[onnx.NodeProto], given: Container[str]) -> Mapping[str, int]:
    makers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and name not in given:
                makers.setdefault(name, index)
    return makers


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those included that bodies in it read from around them."""
    yield from node.input
    pending: list[tuple[onnx.AttributeProto, tuple[frozenset[str], ...]]]
    pending = [(item, ()) for item in node.attribute]
    while pending:
        attribute, around = pending.pop()
        graphs = [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
        for graph in graphs:
            inside = (frozenset(_defined(graph)), *around)
            names = [item.name for item in graph.output]
            for inner in graph.node:
                names += inner.input
                pending += [(item, inside) for item in inner.attribute]
            yield from (name for name in names if not any(name in defined for defined in inside))


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (item.name for item in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        yield from node.output
