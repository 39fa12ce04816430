"""The order in which the nodes of a graph run.

ONNX Runtime sorts the nodes of the main graph. It refuses bodies and functions whose nodes are not
sorted.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx


def is_sorted(nodes: Sequence[onnx.NodeProto], defined: Container[str]) -> bool:
    """Whether each node reads only names that are `defined`, or outputs of earlier nodes."""
    producers = _producers(nodes, defined)
    for index, node in enumerate(nodes):
        if any(producers.get(name, -1) >= index for name in _names_read_by(node)):
            return False
    return True


def sorted_order(nodes: Sequence[onnx.NodeProto], defined: Container[str]) -> Sequence[int]:
    """The indices of the nodes, each after the nodes whose outputs it reads.

    Nodes that form a cycle keep the order in which they are written.
    """
    producers = _producers(nodes, defined)
    dependencies: dict[int, set[int]] = {}
    for index, node in enumerate(nodes):
        dependencies[index] = set()
        for name in _names_read_by(node):
            if name in producers:
                dependencies[index].add(producers[name])
    try:
        return list(TopologicalSorter(dependencies).static_order())
    except CycleError:
        return range(len(nodes))


def _producers(nodes: Sequence[onnx.NodeProto], defined: Container[str]) -> Mapping[str, int]:
    """By each output's name, the index of the first node that has it."""
    producers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and name not in defined:
                producers.setdefault(name, index)
    return producers


def _names_read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, and those that the bodies in it read from outside of them."""
    yield from node.input
    # Attributes that are still to be searched, each with the names that the bodies around define.
    pending: list[tuple[onnx.AttributeProto, tuple[frozenset[str], ...]]]
    pending = [(attribute, ()) for attribute in node.attribute]
    while pending:
        attribute, outer = pending.pop()
        graphs = list(attribute.graphs)
        if attribute.HasField("g"):
            graphs.insert(0, attribute.g)
        for graph in graphs:
            local = [item.name for item in graph.input]
            local += [tensor.name for tensor in graph.initializer]
            local += [sparse.values.name for sparse in graph.sparse_initializer]
            names = [item.name for item in graph.output]
            for inner in graph.node:
                local += inner.output
                names += inner.input
            scopes = (frozenset(local), *outer)
            for inner in graph.node:
                pending += [(item, scopes) for item in inner.attribute]
            for name in names:
                if not any(name in scope for scope in scopes):
                    yield name
