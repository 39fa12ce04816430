"""What a tensor of a forward is made of: constants, weights, data, or random numbers alone.

Roles belong to storages, so that views and in-place writes share them. Knows no site.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Role(IntEnum):
    """In this order: what is made of several is the largest of them, random numbers aside."""

    CONSTANT = 0
    WEIGHT = 1
    DATA = 2
    NOISE = 3  # made of draws and constants alone: a mask on its way to the data


class Roles:
    """The role of every tensor met in one forward, and for noise the draws that it is made of."""

    def __init__(
        self, weights: Iterable[Tensor], data: Iterable[Tensor], foreign_noise: frozenset[int]
    ) -> None:
        """`foreign_noise`: which tensors from outside torch, counted as they turn up, differ from
        run to run.
        """
        self._roles: dict[int, Role] = {}
        self._draws: dict[int, frozenset[int]] = {}
        self._kept: list[Tensor] = []  # a storage's address is its own only while it lives
        self._foreign_noise = foreign_noise
        self._count = 0
        self.foreign: list[Tensor] = []
        for tensor in weights:
            self.set(tensor, Role.WEIGHT if tensor.numel() > 1 else Role.CONSTANT)
        for tensor in data:
            self.set(tensor, Role.DATA)

    def of(self, tensor: Tensor) -> Role:
        """Its role; a tensor never met before comes from outside torch (NumPy, a literal, an
        attribute).
        """
        key = _key(tensor)
        if key not in self._roles:
            is_noise = len(self.foreign) in self._foreign_noise
            self.foreign.append(tensor.detach().clone())
            steady = Role.WEIGHT if tensor.numel() > 1 else Role.CONSTANT
            self.set(
                tensor, Role.NOISE if is_noise else steady, self.draw() if is_noise else frozenset()
            )
        return self._roles[key]

    def set(self, tensor: Tensor, role: Role, draws: frozenset[int] = frozenset()) -> None:
        """Give a tensor, and all that shares its storage, a role; noise also the draws that it is
        made of.
        """
        key = _key(tensor)
        self._kept.append(tensor)
        self._roles[key] = role
        if role is Role.NOISE:
            self._draws[key] = draws

    def draw(self) -> frozenset[int]:
        """The name of a new draw."""
        self._count += 1
        return frozenset({self._count})

    def draws_of(self, operands: Iterable[Tensor]) -> frozenset[int]:
        """The draws that noise among these is made of."""
        return frozenset().union(
            *(self._draws[_key(t)] for t in operands if self.of(t) is Role.NOISE)
        )

    def pass_on(
        self, operands: Sequence[Tensor], roles: Sequence[Role], results: Iterable[Tensor]
    ) -> None:
        """Give the results of these operands, of these roles, the largest role: noise stays noise
        among constants.
        """
        if Role.NOISE in roles:
            draws = self.draws_of(operands)
            for result in results:
                self.set(result, Role.NOISE, draws)
        else:
            role = max(roles, default=Role.CONSTANT)
            for result in results:
                self.set(result, role)


def _key(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    # An empty storage has no address: the storage object itself must do.
    return storage.data_ptr() or storage._cdata


@functools.cache
def is_draw(func: torch._ops.OpOverload) -> bool:
    """Whether an operator draws random numbers."""
    drawing: bool = torch.Tag.nondeterministic_seeded in func.tags
    return drawing


_FACTORIES = ("new_", "zeros", "ones", "full", "empty", "arange", "eye", "scalar_tensor")


@functools.cache
def is_factory(func: torch._ops.OpOverload) -> bool:
    """Whether an operator makes a tensor that owes its operands no more than shape and dtype."""
    name: str = func.overloadpacket.__name__
    return name.startswith(_FACTORIES) or name.endswith("_like")


@functools.cache
def writes(func: torch._ops.OpOverload) -> bool:
    """Whether an operator writes to its first operand."""
    return bool(func._schema.is_mutable and func.overloadpacket.__name__.endswith("_"))


def tensors_in(value: object) -> list[Tensor]:
    """The tensors among an operator's arguments or results: alone, or in tuples, lists and dicts of
    them.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return []
    found: list[Tensor] = []
    for part in value:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, tuple | list | dict):
            found += tensors_in(part)
    return found
