"""What a tensor of a forward is made of: constants, weights, data, or random numbers alone.

Roles belong to storages, so that views and in-place writes share them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

# The beginnings of the names of operators that create tensors.
_FACTORIES = ("new_", "zeros", "ones", "full", "empty", "arange", "eye", "scalar_tensor")


class Role(IntEnum):
    """Ordered: a tensor made of several has the largest role among them.

    Noise is an exception. Noise and constants make noise; what noise and data make is decided by
    the tape (`noise_tape.py`).
    """

    CONSTANT = 0
    WEIGHT = 1
    DATA = 2
    NOISE = 3  # made of draws and constants alone: a mask on its way to the data


class Roles:
    """The role of every tensor in one forward, and for noise the draws that it is made of.

    A draw is a number that counts from 1. A non-torch tensor is one that no operator of the forward
    made: it comes from NumPy, from a literal, or from an attribute that is neither a parameter nor
    a buffer.
    """

    def __init__(
        self, weights: Iterable[Tensor], data: Iterable[Tensor], random_non_torch: frozenset[int]
    ) -> None:
        """`random_non_torch` holds indices of non-torch tensors, in the order in which they appear:
        those of the tensors that differ from run to run.
        """
        self.non_torch: list[Tensor] = []
        self._random_non_torch = random_non_torch
        self._roles: dict[int, Role] = {}
        self._draws: dict[int, frozenset[int]] = {}
        self._draw_count = 0
        # Keeps the tensors alive: another storage may get the address of one that was freed.
        self._alive: list[Tensor] = []
        for tensor in weights:
            self.set(tensor, _steady_role(tensor))
        for tensor in data:
            self.set(tensor, Role.DATA)

    def of(self, tensor: Tensor) -> Role:
        """The role of a tensor. A new one, which no operator made, is non-torch."""
        key = _key(tensor)
        if key not in self._roles:
            is_noise = len(self.non_torch) in self._random_non_torch
            self.non_torch.append(tensor.detach().clone())
            if is_noise:
                self.set(tensor, Role.NOISE, self.new_draw())
            else:
                self.set(tensor, _steady_role(tensor))
        return self._roles[key]

    def set(self, tensor: Tensor, role: Role, draws: frozenset[int] = frozenset()) -> None:
        """Set the role of a tensor, and of all that share its storage. Noise has `draws` too."""
        key = _key(tensor)
        self._alive.append(tensor)
        self._roles[key] = role
        if role is Role.NOISE:
            self._draws[key] = draws

    def new_draw(self) -> frozenset[int]:
        """A set of one new draw."""
        self._draw_count += 1
        return frozenset({self._draw_count})

    def draws_of(self, operands: Iterable[Tensor]) -> frozenset[int]:
        """The draws that the noise among these tensors is made of."""
        noises = [operand for operand in operands if self.of(operand) is Role.NOISE]
        return frozenset().union(*(self._draws[_key(noise)] for noise in noises))

    def pass_on(
        self, operands: Sequence[Tensor], roles: Sequence[Role], results: Iterable[Tensor]
    ) -> None:
        """Set the role of an operator's results: the largest of its operands' `roles`."""
        role = max(roles, default=Role.CONSTANT)
        draws = self.draws_of(operands) if role is Role.NOISE else frozenset()
        for result in results:
            self.set(result, role, draws)


def _steady_role(tensor: Tensor) -> Role:
    """The role of a tensor that is the same in every forward: a single number is a constant."""
    return Role.WEIGHT if tensor.numel() > 1 else Role.CONSTANT


def _key(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    # An empty storage has address 0. The storage object itself then has to identify it.
    return storage.data_ptr() or storage._cdata


@functools.cache
def is_draw(func: torch._ops.OpOverload) -> bool:
    """Whether an operator draws random numbers."""
    tagged: bool = torch.Tag.nondeterministic_seeded in func.tags
    return tagged


@functools.cache
def is_factory(func: torch._ops.OpOverload) -> bool:
    """Whether an operator creates a tensor that takes only shape and dtype from its operands."""
    name: str = func.overloadpacket.__name__
    return name.startswith(_FACTORIES) or name.endswith("_like")


@functools.cache
def writes(func: torch._ops.OpOverload) -> bool:
    """Whether an operator writes to its first operand."""
    return bool(func._schema.is_mutable and func.overloadpacket.__name__.endswith("_"))


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in an operator's arguments or results: alone, or in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return []
    # A loop, as this runs for every operator, and a call per tensor costs more than the test.
    tensors: list[Tensor] = []
    for part in value:
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, tuple | list | dict):
            tensors += tensors_in(part)
    return tensors
