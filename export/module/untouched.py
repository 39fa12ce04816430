"""Restore a module after its forwards: the generators, buffers and attributes that they change.

Two things are not restored: effects outside of the process, and Python objects other than numbers,
texts and tensors, such as a list. To keep these unchanged, run a copy of the network.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evalmode.export.module.network import Network

_SAVED_TYPES = (bool, int, float, str, Tensor)


@contextmanager
def untouched(network: Network) -> Iterator[None]:
    """Restore every generator, and each part's flags, numbers and buffers, also after an error.

    Example:
        with untouched(Network.of(module)):
            module(**sample)
    """
    # The modules `random` and `numpy.random` have the methods of their global generators.
    generators: list[Any] = [random, np.random, *network.generators.values()]
    # torch's generators in attributes of the parts, and in the globals of their forwards.
    for part in network.parts.values():
        forward = inspect.getattr_static(type(part), "forward", None)
        forward_globals = getattr(forward, "__globals__", {})
        values = (*vars(part).values(), *forward_globals.values())
        generators += [value for value in values if isinstance(value, torch.Generator)]
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        for generator in generators:
            stack.callback(_saved_generator(generator))
        for part in network.parts.values():
            stack.callback(saved(part))
        yield


def saved(module: nn.Module) -> Callable[[], None]:
    """Save a module's own attributes and buffers; the result restores them.

    Children are not saved. Parameters are not either: a forward does not write to them, and copies
    would double the memory.
    """
    attributes = {
        name: value
        for name, value in vars(module).items()
        if value is None or isinstance(value, _SAVED_TYPES)
    }
    buffers = dict(module._buffers)
    contents = [
        (value, value.detach().clone())
        for value in (*buffers.values(), *attributes.values())
        if isinstance(value, Tensor)
    ]

    def restore() -> None:
        vars(module).update(attributes)
        module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, content in contents:
                # Only what changed: a write raises the tensor's version, which autograd checks.
                if not torch.equal(tensor, content):
                    tensor.copy_(content)

    return restore


def state_of(network: Network) -> dict[str, object]:
    """Copies of the buffers, tensors and numbers of every part, by the paths that code uses."""
    state: dict[str, object] = {}
    for path, part in network.parts.items():
        prefix = f"{path}." if path else ""
        for name, value in (*part._buffers.items(), *vars(part).items()):
            if isinstance(value, Tensor):
                state[f"{prefix}{name}"] = value.detach().clone()
            elif isinstance(value, int | float) and name != "training":
                state[f"{prefix}{name}"] = value
    return state


def _saved_generator(generator: Any) -> Callable[[], Any]:
    """A function that restores the generator's present state."""
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, random.SystemRandom):
        return lambda: None  # it has no state
    # torch's and NumPy's legacy generators have an underscore in the names, Python's have none.
    if hasattr(generator, "get_state"):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    state = generator.getstate()
    return lambda: generator.setstate(state)
