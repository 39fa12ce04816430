"""The same code under other seeds, also where it seeds the generators itself.

A factory that begins with `torch.manual_seed(0)` makes the same network each time, drawn constants
included. Here every seed that code gives to torch, NumPy or Python is another one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_OFFSET = 7919  # added to every seed
_NUMPYS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64", "RandomState")


@contextmanager
def other_seeds() -> Iterator[None]:
    """Let every seed that is given meanwhile be another one.

    Seeds that are spelled in another way than torch, NumPy and Python offer (a generator of one's
    own) stay as they are, and so do names that were imported before (`from torch import
    manual_seed`).
    """
    seed = random.Random.seed

    def seed_other(self: random.Random, a: Any = None, version: int = 2) -> None:
        seed(self, _other(a), version)

    replacements: list[tuple[Any, str, Any]] = [
        (torch, "manual_seed", _offset(torch.manual_seed)),
        (torch.random, "manual_seed", _offset(torch.random.manual_seed)),
        (torch.cuda, "manual_seed", _offset(torch.cuda.manual_seed)),
        (torch.cuda, "manual_seed_all", _offset(torch.cuda.manual_seed_all)),
        (torch, "Generator", _Generator),
        (np.random, "seed", _offset(np.random.seed)),
        (np.random, "default_rng", _offset(np.random.default_rng)),
        (np.random, "SeedSequence", _SeedSequence),
        *((np.random, name, _seeded(getattr(np.random, name))) for name in _NUMPYS),
        (random, "seed", _offset(random.seed)),
        (random.Random, "seed", seed_other),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _other(seed: Any) -> Any:
    """Another seed of the same kind; what is no seed (a bit generator, None) is itself."""
    if isinstance(seed, str):
        return f"{seed}{_OFFSET}"
    if isinstance(seed, bytes):
        return seed + str(_OFFSET).encode()
    if isinstance(seed, list):
        return [*seed, _OFFSET]
    if isinstance(seed, int | float | np.integer) and not isinstance(seed, bool):
        # NumPy's seeds end at 2**32.
        return seed + _OFFSET if seed < 2**32 - _OFFSET else seed - _OFFSET
    return seed


def _offset(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(seed: Any = None, *args: Any, **kwargs: Any) -> Any:
        if seed is None:
            return function(*args, **kwargs)
        return function(_other(seed), *args, **kwargs)

    return call


def _seeded(kind: type[Any]) -> type[Any]:
    """A subclass whose first argument is another seed."""

    def initialise(self: Any, seed: Any = None, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, _other(seed), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__init__": initialise})


class _SeedSequence(np.random.SeedSequence):
    def __init__(self, entropy: Any = None, **kwargs: Any) -> None:
        super().__init__(_other(entropy), **kwargs)


class _OfGenerators(type(torch.Generator)):  # type: ignore[misc]
    """Generators that were made before are generators too."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _TORCHS)


_TORCHS = torch.Generator


class _Generator(torch.Generator, metaclass=_OfGenerators):
    """A generator of torch's whose seed is another one, also the one that it begins with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        super().manual_seed(_other(self.initial_seed() % 2**31))

    def manual_seed(self, seed: int) -> torch.Generator:
        super().manual_seed(_other(seed))
        return self
