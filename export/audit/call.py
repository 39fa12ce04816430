"""One call of a module, to be repeated: its arguments in copies, and the numbers that the module
held when it was called.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

# Numbers and texts by part and attribute: a counter, a schedule's rate, a buffer of one element.
State = Mapping[tuple[str, str], bool | int | float | str]


@dataclass(frozen=True)
class Call:
    """The arguments of one call, in copies of their own; their tensors may be of any shape and
    dtype. `state` holds the module's numbers just before the call, where they were captured.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: State = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: State = {}) -> Call:  # noqa: B006 - never written to
        """Copies: an in-place dropout writes to its argument. What was one tensor stays one
        (self-attention asks).
        """
        copies: dict[int, Tensor] = {}

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copies.setdefault(id(value), value.detach().clone())
            return _copied_object(value)

        args, kwargs = pytree.tree_map(copied, (tuple(args), dict(kwargs)))
        return cls(args, dict(kwargs), state)

    def again(self) -> Call:
        """The same call, in fresh copies."""
        return Call.of(self.args, self.kwargs, self.state)

    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return [
            leaf
            for leaf in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(leaf, Tensor)
        ]

    def emptiness(self) -> str:
        """What its floating tensors are where they show no mask; "" where they carry values, or
        there are none.
        """
        tensors = self.tensors()
        if tensors and not any(tensor.numel() for tensor in tensors):
            return "empty"
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        return "" if not floats or carry_values(floats) else _emptiness(floats)

    def with_noise(self) -> Call:
        """The same call with standard normal values in place of its floating tensors."""

        def exchanged(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return torch.randn_like(value) if is_float else value

        args, kwargs = pytree.tree_map(exchanged, (self.args, self.kwargs))
        return Call(args, kwargs, self.state)


class CallKind(NamedTuple):
    """What calls that run the same code have in common: all but the sizes and values of tensors."""

    arguments: Hashable
    state: Hashable

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: State) -> CallKind:
        """The kind of a call, from its arguments and the numbers that the module holds."""
        leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
        return cls((str(structure), tuple(map(_described, leaves))), tuple(sorted(state.items())))


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        value = leaf.item() if leaf.numel() == 1 and leaf.dim() == 0 else None
        return str(leaf.dtype), leaf.dim(), value
    plain = leaf is None or isinstance(leaf, bool | int | float | str)
    return type(leaf).__name__, leaf if plain else None


def state_before(parts: Mapping[str, nn.Module]) -> State:
    """The numbers that parts hold, by their path and name; running statistics are none of them."""
    state: dict[tuple[str, str], bool | int | float | str] = {}
    for path, part in parts.items():
        for name, value in vars(part).items():
            if isinstance(value, bool | int | float | str) and name != "training":
                state[path, name] = value
        if not isinstance(part, _NormBase):
            for name, tensor in part._buffers.items():
                if tensor is not None and tensor.numel() == 1:
                    state[path, name] = tensor.item()
    return state


def give_state(parts: Mapping[str, nn.Module], state: State) -> None:
    """Set the numbers of a state in parts of the same paths."""
    for (path, name), value in state.items():
        part = parts.get(path)
        if part is None:
            continue
        buffer = part._buffers.get(name)
        if isinstance(buffer, Tensor):
            buffer.fill_(value)  # type: ignore[arg-type]
        elif name in vars(part):
            vars(part)[name] = value


def carry_values(floats: Sequence[Tensor]) -> bool:
    """Whether any element is finite and not zero."""
    return any(bool((tensor.isfinite() & (tensor != 0)).any()) for tensor in floats)


ZERO = "zero everywhere"


def _emptiness(floats: Sequence[Tensor]) -> str:
    if not any(tensor.numel() for tensor in floats):
        return "empty"
    if not any(bool(tensor.isfinite().any()) for tensor in floats):
        return "finite nowhere"
    return (
        ZERO
        if all(bool(tensor.isfinite().all()) for tensor in floats)
        else "zero where it is finite"
    )


def _copied_object(value: Any) -> Any:
    """An object of the user's, in a copy: a cache of keys and values grows with every call that is
    given it.
    """
    if value is None or isinstance(value, bool | int | float | str | nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever it raises when it is copied
        return value
