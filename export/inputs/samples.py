"""Turn any module and a few sample inputs into a candidate for export."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evalmode.export.inputs.axes import (
    BATCH,
    Axes,
    Sample,
    parse_axes,
    shapes_of,
    sizes_of,
)
from evalmode.export.inputs.candidate import Candidate
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.find_axes import Forward, find_axes
from evalmode.export.inputs.probes import evidence_of
from evalmode.export.inputs.resize import resized
from evalmode.export.module.forward import copies_of, plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import flatten, left_out
from evalmode.export.module.randomness import Draw, Unwatched, watch
from evalmode.export.module.untouched import untouched

# ONNX Runtime takes its inputs as NumPy arrays, and NumPy does not have these types.
_TYPES_WITHOUT_ARRAYS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
# The fewest and the most rows that are traced. An exporter may take one row for a constant, and
# more than a few rows only cost time.
_TRACED_ROWS = (2, 4)


def candidate_of(
    module: nn.Module,
    samples: Sequence[object],
    *,
    dynamic_axes: Sequence[str] = (),
) -> Candidate:
    """The candidate for an export: `module` with evidence made from these sample inputs.

    A sample is a mapping of input names, a tuple or a tensor. Everything in it that is no tensor is
    a constant, to which the module's forward is bound. Apart from that the module, its mode and its
    state are unchanged. `dynamic_axes` declares the axes that vary ("ids=batch,length"). Without
    it, the axes that vary between the samples count.

    Raises UnusableInputs if the module cannot be called with the samples, or if it returns what no
    graph can return.

    >>> candidate = candidate_of(nn.Linear(4, 2).eval(), [torch.ones(3, 4)])
    >>> candidate.evidence.dynamic_axes
    {'input': {0: 'batch'}}
    """
    tensors, constants = bind_samples(module, samples)
    network = Network.of(module)
    kind = type(module).__name__
    # `untouched`, because a module that cannot be copied stands for its own copies.
    with untouched(network):
        scout, exported, fresh = (network.copy().module for _ in range(3))
        draws: dict[Draw, None] = {}  # in order, each once

        def forward(sample: Sample) -> object:
            try:
                answer, draws_of_sample = watch(scout, sample)
            except Unwatched:  # the rule eager-randomness reports it
                with plain_forward():
                    return scout(**copies_of(sample))
            draws.update(dict.fromkeys(draws_of_sample))
            return answer

        def run(sample: Sample) -> dict[str, Tensor]:
            return flatten(forward(sample))

        try:
            answer = forward(tensors[0])
        except Exception as error:  # the user's own code
            reason = str(error).strip().partition("\n")[0]
            raise UnusableInputs(
                f"{kind} fails on the sample ({shapes_of(tensors[0])}):"
                f" {type(error).__name__}: {reason}"
            ) from error
        outputs = flatten(answer)
        if not outputs:
            raise UnusableInputs(f"{kind} returns no tensor but {type(answer).__name__}")
        for name, tensor in outputs.items():
            if tensor.is_complex():
                raise UnusableInputs(
                    f"{kind} returns {name} as complex numbers, which no graph can return: return"
                    " torch.view_as_real of it"
                )
        axes = parse_axes(dynamic_axes, tensors[0]) if dynamic_axes else find_axes(run, tensors)
        # The names of a graph's values are unique, so an output cannot have the name of an input.
        output_names = [f"{name}_out" if name in tensors[0] else name for name in outputs]
        # Evaluated in this order, because each of these runs the scout.
        example = _traced_example(run, tensors, axes)
        evidence = evidence_of(run, tensors, axes)
        return Candidate(
            module=module,
            exported=exported,
            fresh=fresh,
            example=example,
            outputs=tuple(output_names),
            evidence=evidence,
            draws=tuple(draws),
            left_out=left_out(answer),
            constants=constants,
        )


def bind_samples(
    module: nn.Module, samples: Sequence[object]
) -> tuple[list[Sample], dict[str, Any]]:
    """Split samples into tensors, by the names of the forward's inputs, and constants.

    Binds the module's forward to the constants, if there are any. Raises UnusableInputs for samples
    that do not fit the module, or that differ in more than sizes and values.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnusableInputs(
            "a scripted or traced module hides its mode: export the Python module that it was made"
            " from"
        )
    for path, part in Network.of(module).parts.items():
        if isinstance(part, torch.jit.ScriptModule):
            raise UnusableInputs(
                f"{path} is a scripted or traced module, which hides its mode: export the Python"
                " module that it was made from"
            )
    if not samples:
        raise UnusableInputs("there is no sample to call the module with")
    arguments = [_named_arguments(module, sample) for sample in samples]
    tensors: list[Sample] = []
    constants: list[dict[str, Any]] = []
    for named in arguments:
        tensors.append({name: item for name, item in named.items() if isinstance(item, Tensor)})
        constants.append(
            {name: item for name, item in named.items() if not isinstance(item, Tensor)}
        )
    for other in constants[1:]:
        if other != constants[0]:
            raise UnusableInputs(
                f"inputs that are no tensors become constants of the graph, so they must be equal"
                f" in all samples: {constants[0]} and {other}"
            )
    for name, value in constants[0].items():
        if not isinstance(value, bool | int | float | str | None):
            raise UnusableInputs(
                f"input {name!r} must be a tensor or a plain constant, got {type(value).__name__}"
            )
    _require_exportable(tensors)
    bind_constants(module, constants[0])
    return tensors, constants[0]


def bind_constants(module: nn.Module, constants: Mapping[str, Any]) -> None:
    """Bind the module's forward to constant arguments, because a graph's inputs are tensors."""
    if not constants:
        return
    partial = functools.partial(module.forward, **constants)
    signature = inspect.signature(partial)
    forward: Any = functools.wraps(module.forward)(partial)
    # A partial's signature still lists the constants, and the exporter would require them.
    forward.__signature__ = signature.replace(
        parameters=[
            parameter for name, parameter in signature.parameters.items() if name not in constants
        ]
    )
    module.forward = forward


def _named_arguments(module: nn.Module, sample: object) -> dict[str, Any]:
    """A sample as the keyword arguments of the module's forward, with arrays as tensors."""
    if isinstance(sample, Mapping):
        arguments = {str(name): value for name, value in sample.items()}
    else:
        kind = type(module).__name__
        positional = sample if isinstance(sample, tuple) else (sample,)
        try:
            arguments = inspect.signature(module.forward).bind(*positional).arguments
        except (TypeError, ValueError) as error:
            raise UnusableInputs(f"{kind} cannot be called with the sample: {error}") from error
        parameters = inspect.signature(module.forward).parameters
        for name in arguments:
            if parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                # Wrappers of torch: DataParallel, and what torch.compile returns.
                hint = ""
                for attribute in ("_orig_mod", "module"):
                    if hasattr(module, attribute):
                        hint = f", or export its .{attribute}, which it only wraps"
                        break
                raise UnusableInputs(
                    f"{kind}.forward takes *args, so its inputs have no names: give the forward"
                    f" named parameters{hint}"
                )
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


def _require_exportable(samples: Sequence[Sample]) -> None:
    """Raise UnusableInputs for tensors that a graph cannot read, or samples that are not alike."""
    first = samples[0]
    if not first:
        raise UnusableInputs("a sample holds no tensor")
    for name, tensor in first.items():
        if tensor.dtype in _TYPES_WITHOUT_ARRAYS:
            raise UnusableInputs(
                f"input {name!r} is {tensor.dtype}, which NumPy does not have: cast it in the"
                " module"
            )
        if tensor.layout is not torch.strided:
            raise UnusableInputs(f"input {name!r} is sparse: a graph reads dense tensors")
    for sample in samples:
        for name, tensor in sample.items():
            if not tensor.numel():
                raise UnusableInputs(
                    f"input {name!r} is empty in a sample: give a sample with elements"
                )
    for sample in samples[1:]:
        if sample.keys() != first.keys():
            raise UnusableInputs(
                f"the samples have different inputs: {', '.join(first)} and {', '.join(sample)}"
            )
        for name, tensor in sample.items():
            if (tensor.dtype, tensor.ndim) != (first[name].dtype, first[name].ndim):
                raise UnusableInputs(
                    f"input {name!r} has different types, or numbers of axes, in two samples"
                )


def _traced_example(run: Forward, samples: Sequence[Sample], axes: Axes) -> Sample:
    """The inputs that the exporter traces: the largest sample, with few rows.

    If the module reads such an example, its axes have different sizes, and none has size 1. An
    exporter may take axes of equal sizes for the same axis, and a size of 1 for a constant.
    """
    largest = max(samples, key=lambda sample: sum(tensor.numel() for tensor in sample.values()))
    sizes = sizes_of(largest, axes)
    new_sizes: dict[str, int] = {}
    # If two sizes are equal, the batch grows. Any other axis shrinks, because a module may refuse
    # longer inputs than its samples.
    for axis in sorted(sizes, key=lambda axis: axis == BATCH):
        fewest, most = _TRACED_ROWS if axis == BATCH else (2, sizes[axis])
        size = min(max(sizes[axis], fewest), max(most, fewest))
        step = 1 if axis == BATCH else -1
        while size in new_sizes.values():
            size += step
        new_sizes[axis] = size if size > 1 else sizes[axis]
    example = resized(largest, axes, new_sizes)
    try:
        run(example)
    except Exception:  # the user's own code, which does not read these sizes
        rows = {BATCH: new_sizes[BATCH]} if BATCH in new_sizes else {}
        return resized(largest, axes, rows)
    return example
