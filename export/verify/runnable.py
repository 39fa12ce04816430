"""A bare file made ready to run: on inputs of the user, or on numbers made for its signature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from evalmode.bundle.session import Session, open_session
from evalmode.export.graph import Graph
from evalmode.export.inputs.axes import BATCH, Axes, Sample
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.probes import evidence_of
from evalmode.export.module.forward import plain_forward
from evalmode.export.module.outputs import flatten
from evalmode.export.rules.subject import Subject

# What exporters call the axis of rows.
_BATCH_NAMES = ("batch", "batch_size", "batchsize", "bs", "n")

_BATCH_ROWS, _SIZE = 3, 4  # of the axes that vary, where nobody says how large
_MOST_MADE = 1 << 28  # elements of an input


def subject_of_file(
    path: Path,
    graph: Graph,
    samples: Sequence[Mapping[str, Any]] = (),
    *,
    module: nn.Module | None = None,
) -> Subject:
    """The graph of the file `path` with inputs, ready for the rules that run it.

    `samples` map input names to arrays; without them numbers are made that fit the types and shapes
    of the inputs. `module`, in eval mode, has inputs of the same names and is what the file is
    compared with. Raises EvalmodeError where the graph, or the module, cannot be run on them.
    """
    inputs = list(_inputs(graph.proto))
    axes = _axes(inputs)
    given = [_given(sample, inputs) for sample in samples] if samples else [_made(inputs, axes)]
    session = open_session(path)

    def run(sample: Sample) -> dict[str, Tensor]:
        return _run(session, sample)

    for sample in given:
        run(sample)  # what is refused here is told in the runtime's words
    if module is not None:
        _require_same_answers(module, given[0], [output.name for output in session.outputs])
    return Subject(
        module=module,
        graph=graph,
        file=path,
        evidence=evidence_of(run, given, axes),
    )


def _require_same_answers(module: nn.Module, sample: Sample, outputs: Sequence[str]) -> None:
    kind = type(module).__name__
    try:
        with plain_forward():
            answers = flatten(module(**sample))
    except Exception as error:  # the user's own code
        raise UnusableInputs(
            f"{kind} cannot be called with {', '.join(sample)}: {error}"
        ) from error
    if len(answers) != len(outputs):
        raise UnusableInputs(
            f"{kind} answers with {len(answers)} tensors, the graph with {', '.join(outputs)}"
        )


def _run(session: Session, sample: Sample) -> dict[str, Tensor]:
    answers = session.run({name: tensor.numpy() for name, tensor in sample.items()})
    numbers = {name: answer for name, answer in answers.items() if isinstance(answer, np.ndarray)}
    return {
        name: torch.from_numpy(answer)
        for name, answer in numbers.items()
        if answer.dtype.kind in "fiub"
    }


def _inputs(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    """What a caller gives: the inputs that no initializer stands in for."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return (value for value in model.graph.input if value.name not in defaults)


def _axes(inputs: Sequence[onnx.ValueInfoProto]) -> Axes:
    """The axes that have no size in the graph, by the names that they have there.

    The batch is an axis that is called so. Where none is, it is the first axis of all inputs whose
    first axis varies.
    """
    named: dict[str, dict[int, str]] = {}
    for value in inputs:
        sizes = value.type.tensor_type.shape.dim
        named[value.name] = {
            place: size.dim_param or f"{value.name}_{place}"
            for place, size in enumerate(sizes)
            if not _is_fixed(size)
        }
    labels = [axis for places in named.values() for axis in places.values()]
    rows = {axis for axis in labels if axis.lower() in _BATCH_NAMES}
    if not rows:
        rows = {places[0] for places in named.values() if 0 in places}
        if len(rows) > 1 and not all(axis.endswith("_0") for axis in rows):
            rows = set()
    return {
        name: {place: BATCH if axis in rows else axis for place, axis in places.items()}
        for name, places in named.items()
    }


def _given(sample: Mapping[str, Any], inputs: Sequence[onnx.ValueInfoProto]) -> dict[str, Tensor]:
    names = [value.name for value in inputs]
    if not isinstance(sample, Mapping):  # a tuple, or one array
        sample = dict(zip(names, sample if isinstance(sample, tuple) else (sample,), strict=False))
    if set(sample) != set(names):
        raise UnusableInputs(
            f"the inputs are {', '.join(names)}, given are {', '.join(map(str, sample))}"
        )
    return {name: torch.as_tensor(sample[name]) for name in names}


def _is_fixed(size: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether an axis has one size; a negative one stands for any, as in ONNX Runtime."""
    return size.HasField("dim_value") and size.dim_value >= 0


def _made(inputs: Sequence[onnx.ValueInfoProto], axes: Axes) -> dict[str, Tensor]:
    generator = np.random.default_rng(0)
    made = {}
    for value in inputs:
        kind = value.type.tensor_type
        try:
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        except KeyError:
            dtype = np.dtype(object)
        if not value.type.HasField("tensor_type") or dtype.kind not in "biuf":
            raise UnusableInputs(
                f"input {value.name} is no tensor of numbers that NumPy has: nothing can be made up"
                " for it"
            )
        shape = [
            {None: size.dim_value, BATCH: _BATCH_ROWS}.get(axes[value.name].get(place), _SIZE)
            for place, size in enumerate(kind.shape.dim)
        ]
        if max([*shape, math.prod(shape)]) > _MOST_MADE:
            raise UnusableInputs(
                f"input {value.name} has shape {shape}, which is too large to be made up: at most"
                f" {_MOST_MADE:,} elements are"
            )
        floats = np.issubdtype(dtype, np.floating)
        numbers = generator.standard_normal(shape) if floats else generator.integers(0, 2, shape)
        made[value.name] = torch.from_numpy(np.asarray(numbers).astype(dtype))
    return made
