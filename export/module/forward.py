"""How a module is run: without gradients and fused kernels, and with every generator under a
seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
