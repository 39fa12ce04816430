"""Leaving no trace: copies to work on, and everything that a forward may move put back afterwards.

Does not know what a forward does outside the process, nor Python objects that are neither numbers
nor tensors and that a module which cannot be copied changes in place.
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


@contextmanager
def untouched(network: Network) -> Iterator[None]:
    """Put back, also after an error: every generator, and every part's flags, numbers and tensors.

    Example:
        with untouched(Network.of(module)):
            module(**sample)
    """
    with ExitStack() as stack:
        for restore in (*_generators(network), *map(saved, network.parts.values())):
            stack.callback(restore)
        yield


def saved(module: nn.Module) -> Callable[[], None]:
    """What puts one module's own attributes and buffers back as they are now; children are their
    own business.

    Parameters are left alone: no forward writes to them, and copies of all would double the memory.
    """
    plain = {
        name: value
        for name, value in vars(module).items()
        if value is None or isinstance(value, _PLAIN)
    }
    buffers = dict(module._buffers)
    tensors = [
        tensor for tensor in (*buffers.values(), *plain.values()) if isinstance(tensor, Tensor)
    ]
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore() -> None:
        vars(module).update(plain)
        module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, content in contents:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)

    return restore


_PLAIN = (bool, int, float, str, Tensor)


def state_of(network: Network) -> dict[str, object]:
    """The buffers, tensors and numbers of every part, in copies, by the paths that code reaches
    them by.
    """
    state: dict[str, object] = {}
    for path, part in network.parts.items():
        prefix = f"{path}." if path else ""
        for name, value in (*part._buffers.items(), *vars(part).items()):
            if isinstance(value, Tensor):
                state[f"{prefix}{name}"] = value.detach().clone()
            elif isinstance(value, int | float) and name != "training":
                state[f"{prefix}{name}"] = value
    return state


def _generators(network: Network) -> Iterator[Callable[[], Any]]:
    cpu = torch.get_rng_state()
    yield lambda: torch.set_rng_state(cpu)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gpus = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(gpus)
    everything = (random, np.random, *network.generators.values(), *_torch_generators(network))
    yield from (_restorer(generator) for generator in everything)


def _restorer(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, random.SystemRandom):
        return lambda: None  # it has no state
    # torch's and NumPy's legacy generators spell it with an underscore, Python's does not.
    get, put = (
        ("get_state", "set_state") if hasattr(generator, "get_state") else ("getstate", "setstate")
    )
    held = getattr(generator, get)()
    return lambda: getattr(generator, put)(held)


def _torch_generators(network: Network) -> Iterator[torch.Generator]:
    for part in network.parts.values():
        forward = inspect.getattr_static(type(part), "forward", None)
        beside = getattr(forward, "__globals__", {})
        yield from (
            v for v in (*vars(part).values(), *beside.values()) if isinstance(v, torch.Generator)
        )
