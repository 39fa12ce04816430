"""An exact graph with less work for ONNX Runtime, and with the same bits.

Both changes are what the exporter cannot be told. They are for exact graphs alone, whose bytes no
earlier version has written.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto


def lean_graph(model: ModelProto) -> ModelProto:
    """A copy of an exported model, without the shapes of inner values and with narrow indices.

    ONNX Runtime infers the shapes itself, and compares each tensor of a run with those in the file:
    5 % of the time of a small network (1.31).

    The exporter casts the indices of GatherElements to int64. int32 holds the indices of any table
    that a file can store, and ONNX Runtime casts to it four times faster.
    """
    lean = ModelProto()
    lean.CopyFrom(model)
    graph = lean.graph
    del graph.value_info[:]

    producers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in graph.node:
        if node.op_type != "GatherElements" or node.input[0] not in stored:
            continue
        # The indices are cast and reshaped, and nothing else reads them.
        index = producers.get(node.input[1])
        if index is not None and index.op_type == "Reshape" and readers[index.output[0]] == 1:
            index = producers.get(index.input[0])
        if index is None or index.op_type != "Cast" or readers[index.output[0]] > 1:
            continue
        (target,) = index.attribute
        if target.i == TensorProto.INT64:
            target.i = TensorProto.INT32
    return lean
