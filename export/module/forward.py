"""Running a module: to be watched, as it is used, on arrays, under a seed."""

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
    """No gradients, and no fused fast path: that of nn.MultiheadAttention ignores a child's
    training flag.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def as_used() -> Iterator[None]:
    """Inference as a service runs a module: PyTorch's inference mode, and its fast path as it is
    set.
    """
    with torch.inference_mode(), warnings.catch_warnings():
        # The fast path's own remark on what it is made of.
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        yield


def seed_everything(seed: int) -> None:
    """Seed torch's generators, NumPy's and Python's global ones."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's, NumPy's and Python's global generators under a seed, and back where they were
    afterwards.
    """
    host, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_everything(seed)
        try:
            yield
        finally:
            np.random.set_state(legacy)
            random.setstate(host)


def answers_of(module: nn.Module, inputs: Tensors, *, plain: bool = False) -> Tensors:
    """The tensors that a module answers with, by name and in order, as arrays: as it is used, or
    `plain`, without the fast path.
    """
    with plain_forward() if plain else as_used():
        outputs = flatten(module(**as_tensors(inputs)))
    return {
        # NumPy has no bfloat16; every one of its numbers is a float32.
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in outputs.items()
    }


def as_tensors(inputs: Tensors) -> dict[str, Tensor]:
    """NumPy inputs as torch tensors."""
    # Copies, which a forward may write to.
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in inputs.items()}


def copies_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in copies of their own: a forward may write to them."""
    return {name: tensor.detach().clone() for name, tensor in inputs.items()}
