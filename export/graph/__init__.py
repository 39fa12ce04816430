"""Read ONNX files: the model, its nodes with their paths and constants, and its weights.

The rules read graphs through this package.
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
