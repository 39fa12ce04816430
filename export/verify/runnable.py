"""Make a bare file ready to run, on the user's inputs or on inputs made from its signature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from evalmode.bundle.session import open_session
from evalmode.export.graph import Graph
from evalmode.export.inputs.axes import BATCH, Axes, Sample
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.probes import evidence_of
from evalmode.export.module.forward import plain_forward
from evalmode.export.module.outputs import flatten
from evalmode.export.rules.subject import Subject

# What exporters call the axis of rows.
_BATCH_NAMES = ("batch", "batch_size", "batchsize", "bs", "n")

# The sizes of dynamic axes in generated inputs. Not 1, which an operator may treat as a constant.
_BATCH_SIZE, _AXIS_SIZE = 3, 4
_MAX_GENERATED = 1 << 28  # elements of an input


def subject_of_file(
    path: Path,
    graph: Graph,
    samples: Sequence[Mapping[str, Any]] = (),
    *,
    module: nn.Module | None = None,
) -> Subject:
    """The graph of the file `path` with inputs, ready for the rules that run it.

    `samples` map input names to arrays. Without them, inputs are generated that fit the types and
    shapes in the graph. `module`, in eval mode, has inputs of the same names and is what the file
    is compared with. Raises EvalmodeError if the graph, or the module, cannot run on them.
    """
    # An initializer is the default of the input with its name: no caller has to pass that one.
    defaults = {tensor.name for tensor in graph.proto.graph.initializer}
    inputs = [value for value in graph.proto.graph.input if value.name not in defaults]
    axes = _axes_of(inputs)
    if samples:
        tensors = [_to_tensors(sample, inputs) for sample in samples]
    else:
        tensors = [_generate(inputs, axes)]
    session = open_session(path)

    def run(sample: Sample) -> dict[str, Tensor]:
        answers = session.run({name: tensor.numpy() for name, tensor in sample.items()})
        # Texts and sequences cannot be compared, and are left out.
        return {
            name: torch.from_numpy(answer)
            for name, answer in answers.items()
            if isinstance(answer, np.ndarray) and answer.dtype.kind in "fiub"
        }

    for sample in tensors:
        run(sample)  # raises the runtime's error for inputs that do not fit
    if module is not None:
        # The module must run on the inputs too, and have as many outputs.
        kind = type(module).__name__
        try:
            with plain_forward():
                answers = flatten(module(**tensors[0]))
        except Exception as error:  # the user's own code
            raise UnusableInputs(
                f"{kind} cannot be called with {', '.join(tensors[0])}: {error}"
            ) from error
        outputs = [output.name for output in session.outputs]
        if len(answers) != len(outputs):
            raise UnusableInputs(
                f"{kind} returns {len(answers)} tensors, but the graph returns {', '.join(outputs)}"
            )
    return Subject(
        module=module,
        graph=graph,
        file=path,
        evidence=evidence_of(run, tensors, axes),
    )


def _axes_of(inputs: Sequence[onnx.ValueInfoProto]) -> Axes:
    """The dynamic axes of the inputs, by the names that they have in the graph.

    The batch is an axis with one of the usual names. If there is none, it is the first axis of all
    inputs whose first axis is dynamic.
    """
    names: dict[str, dict[int, str]] = {}  # by input and index
    for value in inputs:
        names[value.name] = {}
        for index, size in enumerate(value.type.tensor_type.shape.dim):
            # A negative size stands for any size, as in ONNX Runtime.
            if not (size.HasField("dim_value") and size.dim_value >= 0):
                names[value.name][index] = size.dim_param or f"{value.name}_{index}"

    batch_names = set()
    for axes in names.values():
        batch_names |= {name for name in axes.values() if name.lower() in _BATCH_NAMES}
    if not batch_names:
        batch_names = {axes[0] for axes in names.values() if 0 in axes}
        # First axes to which the graph gives different names may mean different things.
        if len(batch_names) > 1 and not all(name.endswith("_0") for name in batch_names):
            batch_names = set()
    for axes in names.values():
        for index, name in axes.items():
            if name in batch_names:
                axes[index] = BATCH
    return names


def _to_tensors(
    sample: Mapping[str, Any], inputs: Sequence[onnx.ValueInfoProto]
) -> dict[str, Tensor]:
    """A user's sample as tensors by input name. Raises UnusableInputs if the names differ."""
    names = [value.name for value in inputs]
    if not isinstance(sample, Mapping):  # a tuple, or one array
        arrays = sample if isinstance(sample, tuple) else (sample,)
        sample = dict(zip(names, arrays, strict=False))
    if set(sample) != set(names):
        raise UnusableInputs(
            f"the inputs are {', '.join(names)}, got {', '.join(map(str, sample))}"
        )
    return {name: torch.as_tensor(sample[name]) for name in names}


def _generate(inputs: Sequence[onnx.ValueInfoProto], axes: Axes) -> dict[str, Tensor]:
    """Inputs of the right types and shapes, always the same: normally distributed floats, and the
    integers 0 and 1, which are valid indices of most tables.
    """
    generator = np.random.default_rng(0)
    tensors = {}
    for value in inputs:
        tensor_type = value.type.tensor_type
        try:
            dtype = helper.tensor_dtype_to_np_dtype(tensor_type.elem_type)
        except KeyError:
            dtype = np.dtype(object)
        if not value.type.HasField("tensor_type") or dtype.kind not in "biuf":
            raise UnusableInputs(
                f"input {value.name} is not a tensor of numbers that NumPy has, so no values can be"
                " generated for it"
            )

        shape = []
        for index, size in enumerate(tensor_type.shape.dim):
            axis = axes[value.name].get(index)
            if axis is None:
                shape.append(size.dim_value)
            elif axis == BATCH:
                shape.append(_BATCH_SIZE)
            else:
                shape.append(_AXIS_SIZE)
        # Each size is tested too, because a size of 0 makes the product 0.
        if max([*shape, math.prod(shape)]) > _MAX_GENERATED:
            raise UnusableInputs(
                f"input {value.name} has shape {shape}, which is too large to generate: the limit"
                f" is {_MAX_GENERATED:,} elements"
            )

        numbers: np.ndarray[Any, Any]
        if np.issubdtype(dtype, np.floating):
            numbers = np.asarray(generator.standard_normal(shape))
        else:
            numbers = np.asarray(generator.integers(0, 2, shape))
        tensors[value.name] = torch.from_numpy(numbers.astype(dtype))
    return tensors
