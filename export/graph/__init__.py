"""What a rule is given: an ONNX model, every node of it, and its weights, which stay in their file.
Knows no rule.
"""

from evalmode.export.graph.errors import ModelUnreadable
from evalmode.export.graph.graph import (
    Graph,
    bodies_of,
    graph_of,
    module_of,
    names_read,
    open_graph,
    read_graph,
    serialise,
)
from evalmode.export.graph.walk import NodeAt
from evalmode.export.graph.weight import Weight

__all__ = [
    "Graph",
    "ModelUnreadable",
    "NodeAt",
    "Weight",
    "bodies_of",
    "graph_of",
    "module_of",
    "names_read",
    "open_graph",
    "read_graph",
    "serialise",
]
