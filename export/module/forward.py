"""Run a module: without gradients, in inference mode, on arrays, and under a seed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from evalmode.bundle.known_answers import Tensors
from evalmode.export.module.outputs import flatten


@contextmanager
def plain_forward() -> Iterator[None]:
    """Run without gradients and without PyTorch's fast path for attention.

    The fast path of nn.MultiheadAttention ignores the training flag of a child module.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def as_used() -> Iterator[None]:
    """Run in PyTorch's inference mode, as a service does, with the fast path as the user set it."""
    with torch.inference_mode(), warnings.catch_warnings():
        # The fast path warns about the nested tensors that it uses itself.
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        yield


def seed_everything(seed: int) -> None:
    """Seed torch's generators, and the global ones of NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # NumPy refuses larger seeds
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run under a seed, and restore the global generators of torch, NumPy and Python afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_everything(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def answers_of(module: nn.Module, inputs: Tensors, *, plain: bool = False) -> Tensors:
    """The tensors that a module answers with, as arrays by name and in order.

    The module runs as it is used, or with `plain` without the fast path. bfloat16 becomes float32,
    which holds each of its numbers, because NumPy has no bfloat16.
    """
    with plain_forward() if plain else as_used():
        outputs = flatten(module(**as_tensors(inputs)))
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in outputs.items():
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        arrays[name] = tensor.numpy()
    return arrays


def as_tensors(inputs: Tensors) -> dict[str, Tensor]:
    """NumPy inputs as torch tensors, copied because a forward may write to them."""
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in inputs.items()}


def copies_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the inputs, because a forward may write to them."""
    return {name: tensor.detach().clone() for name, tensor in inputs.items()}
