"""Whether a written graph answers as its network, shown without any of the rules.

Knows only torch, onnx and onnxruntime: what is wrong in a rule cannot be wrong here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry

# Of the standard deviation of the network's own answer.
LARGEST_DIFFERENCE = 1e-4

_DRAWS = ("Bernoulli", "Multinomial")


def confirm(entry: Entry, module: nn.Module, model: Path) -> float:
    """The largest difference of any output, over its deviation, on the fresh inputs of `entry`.

    Raises AssertionError for an operator that draws, for two runs that differ by a bit, for an
    output of another shape or type, for whole numbers that differ, and for a difference that is too
    large.
    """
    drawing = list(drawing_nodes(onnx.load(model)))
    assert not drawing, f"nodes that may draw: {', '.join(drawing)}"
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    read = [item.name for item in session.get_inputs()]
    largest = 0.0
    for sample in entry.fresh_inputs():
        arrays = {name: tensor.numpy() for name, tensor in sample.items() if name in read}
        answers = [np.asarray(answer) for answer in session.run(None, arrays)]
        again = [np.asarray(answer) for answer in session.run(None, arrays)]
        with torch.inference_mode():
            copies = {name: tensor.clone() for name, tensor in sample.items()}
            expected = [tensor.numpy() for tensor in tensors_of(module(**copies))]
        assert len(expected) == len(answers), f"{names} for {len(expected)} tensors of the network"
        positions = entry.visible(sample)
        for name, right, answer, repeat in zip(names, expected, answers, again, strict=True):
            assert answer.tobytes() == repeat.tobytes(), f"{name} differs between two runs"
            assert (answer.shape, answer.dtype) == (right.shape, right.dtype), name
            if positions is not None and right.shape[:2] == tuple(positions.shape):
                right, answer = right[positions.numpy()], answer[positions.numpy()]
            if np.issubdtype(right.dtype, np.inexact):
                difference = _difference(right, answer)
                assert difference < LARGEST_DIFFERENCE, f"{name} differs by {difference:.2e}"
                largest = max(largest, difference)
            else:
                np.testing.assert_array_equal(answer, right, err_msg=name)
    return largest


def tensors_of(answer: object) -> Iterator[Tensor]:
    """The tensors of a network's answer in order; what else is in it, such as a cache, is no
    output.
    """
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, Mapping):
        for part in answer.values():
            yield from tensors_of(part)
    elif isinstance(answer, list | tuple):
        for part in answer:
            yield from tensors_of(part)


def drawing_nodes(model: onnx.ModelProto) -> Iterator[str]:
    """Every node, in functions and branches too, that draws random numbers or has a training
    mode.
    """
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _drawing(nodes)


def _drawing(nodes: object) -> Iterator[str]:
    for node in nodes:  # type: ignore[attr-defined]
        in_training = node.op_type == "Dropout" and len(node.input) > 2
        if node.op_type.startswith("Random") or node.op_type in _DRAWS or in_training:
            yield f"{node.op_type} {node.name}"
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _drawing(graph.node)


def _difference(right: npt.NDArray[np.floating], answer: npt.NDArray[np.floating]) -> float:
    assert right.size, "an output is empty"
    assert np.isfinite(right).all(), "the network answers with numbers that are not finite"
    deviation = float(right.std())
    distance = float(np.abs(right.astype(np.float64) - answer).max())
    return distance / deviation if deviation else distance
