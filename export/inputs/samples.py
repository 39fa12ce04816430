"""Anyone's module and a few sample inputs -> a candidate for export: names, axes, probes and single
rows.

Knows no rule, no ONNX and no files.
"""

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
    Run,
    Sample,
    find_axes,
    parse_axes,
    resized,
    shapes_of,
    sizes_of,
)
from evalmode.export.inputs.candidate import Candidate
from evalmode.export.inputs.errors import UnusableInputs
from evalmode.export.inputs.probes import evidence_of
from evalmode.export.module.forward import copies_of, plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import flatten, left_out
from evalmode.export.module.randomness import Draw, Unwatched, watch
from evalmode.export.module.untouched import untouched

# A runtime is given NumPy arrays.
_WITHOUT_ARRAYS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
# More than a few rows only cost time.
_TRACED_ROWS = (2, 4)


def candidate_of(
    module: nn.Module,
    samples: Sequence[object],
    *,
    dynamic_axes: Sequence[str] = (),
) -> Candidate:
    """The candidate that `module` is with these sample inputs; neither its mode nor its state is
    touched.

    Only its forward is bound to the constants among them, if there are any.

    A sample is a mapping of input names, a tuple or a tensor; what is no tensor in it is a
    constant. The axes that vary are those of `dynamic_axes` ("ids=batch,length"), or else those
    that the samples show. Raises UnusableInputs for samples that the module cannot be called with.
    """
    tensors, constants = bound(module, samples)
    network = Network.of(module)
    # The copy that runs here may be the module itself, where it cannot be copied.
    with untouched(network):
        scout, exported, fresh = (network.copy().module for _ in range(3))
        seen: dict[Draw, None] = {}  # in order, each once

        def forward(sample: Sample) -> object:
            try:
                answer, drawn = watch(scout, sample)
            except Unwatched:  # the rule that watches says so
                with plain_forward():
                    return scout(**copies_of(sample))
            seen.update(dict.fromkeys(drawn))
            return answer

        def run(sample: Sample) -> dict[str, Tensor]:
            return flatten(forward(sample))

        try:
            answer = forward(tensors[0])
        except Exception as error:  # the user's own code
            reason = str(error).strip().partition("\n")[0]
            raise UnusableInputs(
                f"{type(module).__name__} fails on the sample ({shapes_of(tensors[0])}):"
                f" {type(error).__name__}: {reason}"
            ) from error
        if not flatten(answer):
            raise UnusableInputs(
                f"{type(module).__name__} answers with no tensor but with {type(answer).__name__}"
            )
        for name, tensor in flatten(answer).items():
            if tensor.is_complex():
                raise UnusableInputs(
                    f"{type(module).__name__} answers {name} with complex numbers, which no graph"
                    " answers with: answer with torch.view_as_real of it"
                )
        axes = parse_axes(dynamic_axes, tensors[0]) if dynamic_axes else find_axes(run, tensors)
        names = [f"{name}_out" if name in tensors[0] else name for name in flatten(answer)]
        return Candidate(
            module=module,
            exported=exported,
            fresh=fresh,
            example=_example(run, tensors, axes),
            outputs=tuple(names),
            evidence=evidence_of(run, tensors, axes),
            draws=tuple(seen),
            left_out=left_out(answer),
            constants=constants,
        )


def bound(module: nn.Module, samples: Sequence[object]) -> tuple[list[Sample], dict[str, Any]]:
    """The samples' tensors by the names of the forward's inputs, and its constants, which the
    module is bound to.

    Raises UnusableInputs for samples that are no inputs of this module, or that differ in more than
    sizes and values.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnusableInputs(
            "a scripted or traced module hides its mode: give the Python module that it was made of"
        )
    for path, part in Network.of(module).parts.items():
        if isinstance(part, torch.jit.ScriptModule):
            raise UnusableInputs(
                f"{path} is a scripted or traced module, which hides its mode: give the Python"
                " module that it was made of"
            )
    if not samples:
        raise UnusableInputs("there is no sample to call the module with")
    named = [_named(module, sample) for sample in samples]
    tensors: list[Sample] = [
        {name: value for name, value in one.items() if isinstance(value, Tensor)} for one in named
    ]
    constants = _constants(named)
    _require_alike(tensors)
    bind(module, constants)
    return tensors, constants


def _named(module: nn.Module, sample: object) -> dict[str, Any]:
    """A sample as the keyword arguments of the module's forward."""
    if isinstance(sample, Mapping):
        given = {str(name): value for name, value in sample.items()}
    else:
        args = sample if isinstance(sample, tuple) else (sample,)
        try:
            bound = inspect.signature(module.forward).bind(*args)
        except (TypeError, ValueError) as error:
            raise UnusableInputs(
                f"{type(module).__name__} cannot be called with the sample: {error}"
            ) from error
        given = dict(bound.arguments)
        kinds = inspect.signature(module.forward).parameters
        if any(kinds[name].kind is inspect.Parameter.VAR_POSITIONAL for name in given):
            inside = next((name for name in ("_orig_mod", "module") if hasattr(module, name)), None)
            hint = f"; export its .{inside}, which it only wraps" if inside else ""
            raise UnusableInputs(
                f"{type(module).__name__}.forward takes *args: its inputs have no names to export"
                f" by{hint}"
            )
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in given.items()
    }


def _constants(named: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = [
        {name: value for name, value in one.items() if not isinstance(value, Tensor)}
        for one in named
    ]
    for other in others:
        if other != first:
            raise UnusableInputs(
                f"what is no tensor is a constant of the graph, the samples differ in it: {other}"
            )
    for name, value in first.items():
        if not isinstance(value, bool | int | float | str | None):
            raise UnusableInputs(
                f"input {name!r} must be a tensor or a plain constant, got {type(value).__name__}"
            )
    return first


def bind(module: nn.Module, constants: Mapping[str, Any]) -> None:
    """Give the module its constant arguments: a graph's inputs are tensors."""
    if constants:
        given = functools.partial(module.forward, **constants)
        signature = inspect.signature(given)
        inputs = [
            parameter for name, parameter in signature.parameters.items() if name not in constants
        ]
        forward: Any = functools.wraps(module.forward)(given)
        # else the constant is asked for again
        forward.__signature__ = signature.replace(parameters=inputs)
        module.forward = forward


def _require_alike(samples: Sequence[Sample]) -> None:
    first = samples[0]
    if not first:
        raise UnusableInputs("a sample holds no tensor")
    for name, tensor in first.items():
        if tensor.dtype in _WITHOUT_ARRAYS:
            raise UnusableInputs(
                f"input {name!r} is {tensor.dtype}, which no array holds: cast it in the module"
            )
        if tensor.layout is not torch.strided:
            raise UnusableInputs(f"input {name!r} is sparse: a graph reads dense tensors")
    if empty := [
        name for sample in samples for name, tensor in sample.items() if not tensor.numel()
    ]:
        raise UnusableInputs(
            f"input {empty[0]!r} is empty in a sample: nothing can be seen from it"
        )
    for sample in samples[1:]:
        if sample.keys() != first.keys():
            raise UnusableInputs(
                f"the samples have other inputs: {', '.join(first)} and {', '.join(sample)}"
            )
        for name, tensor in sample.items():
            if (tensor.dtype, tensor.ndim) != (first[name].dtype, first[name].ndim):
                raise UnusableInputs(
                    f"input {name!r} has another type or other axes in another sample"
                )


def _example(run: Run, samples: Sequence[Sample], axes: Axes) -> Sample:
    """What the exporter traces: the largest sample with few rows, and no two axes of one size.

    An exporter may take axes of one size for one axis, and a size of 1 for a constant.
    """
    largest = max(samples, key=lambda sample: sum(tensor.numel() for tensor in sample.values()))
    sizes = sizes_of(largest, axes)
    wanted: dict[str, int] = {}
    for axis in sorted(sizes, key=lambda axis: axis == BATCH):
        fewest, most = _TRACED_ROWS if axis == BATCH else (2, sizes[axis])
        size = min(max(sizes[axis], fewest), max(most, fewest))
        while size in wanted.values():
            size += 1 if axis == BATCH else -1
        wanted[axis] = size if size > 1 else sizes[axis]
    example = resized(largest, axes, wanted)
    try:
        run(example)
    except Exception:  # the user's own code: these sizes are not read
        rows = {BATCH: wanted[BATCH]} if BATCH in wanted else {}
        return resized(largest, axes, rows)
    return example
