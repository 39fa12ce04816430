"""One call of a module, to be repeated: its arguments, and the numbers that the module held."""

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

_NO_STATE: State = {}

# What `Call.why_unmeasurable` returns for an input that random values can stand in for.
ZERO = "zero everywhere"


@dataclass(frozen=True)
class Call:
    """The arguments of one call. Their tensors are copies, of any shape and dtype.

    `state` holds the module's numbers just before the call, where they were captured.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: State = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: State = _NO_STATE) -> Call:
        """A call with copies of these arguments: an in-place dropout writes to its argument.

        A tensor that is passed twice stays one tensor: self-attention compares its arguments by
        identity.
        """
        copies: dict[int, Tensor] = {}

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copies.setdefault(id(value), value.detach().clone())
            if value is None or isinstance(value, bool | int | float | str | nn.Module):
                return value
            # An object of the user's, such as a cache of keys and values: it grows with every call.
            try:
                return copy.deepcopy(value)
            except Exception:  # the user's class may raise anything when it is copied
                return value

        args, kwargs = pytree.tree_map(copied, (tuple(args), dict(kwargs)))
        return cls(args, dict(kwargs), state)

    def copy(self) -> Call:
        """The same call with fresh copies of its arguments."""
        return Call.of(self.args, self.kwargs, self.state)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def why_unmeasurable(self) -> str:
        """Why a mask on these arguments would not be visible: "empty", "zero everywhere", ...

        "" where it would be: they carry values, or hold no floating point tensor.
        """
        tensors = self.tensors()
        if tensors and not any(tensor.numel() for tensor in tensors):
            return "empty"
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        if not floats or carry_values(floats):
            return ""
        if not any(tensor.numel() for tensor in floats):
            return "empty"
        if not any(bool(tensor.isfinite().any()) for tensor in floats):
            return "without a finite value"
        if all(bool(tensor.isfinite().all()) for tensor in floats):
            return ZERO
        return "zero where it is finite"

    def with_random_values(self) -> Call:
        """The same call with standard normal values in its floating point tensors."""

        def randomised(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return torch.randn_like(value) if is_float else value

        args, kwargs = pytree.tree_map(randomised, (self.args, self.kwargs))
        return Call(args, kwargs, self.state)


class CallSignature(NamedTuple):
    """What calls that run the same code have in common: all but the sizes and values of tensors."""

    arguments: Hashable
    state: Hashable

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: State) -> CallSignature:
        """The signature of a call, from its arguments and the numbers that the module holds."""
        leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
        descriptions: list[Hashable] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                # A tensor without axes is read like a number: code may branch on it.
                value = leaf.item() if leaf.numel() == 1 and leaf.dim() == 0 else None
                descriptions.append((str(leaf.dtype), leaf.dim(), value))
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                descriptions.append((type(leaf).__name__, leaf))
            else:
                descriptions.append((type(leaf).__name__, None))
        return cls((str(structure), tuple(descriptions)), tuple(sorted(state.items())))


def read_state(parts: Mapping[str, nn.Module]) -> State:
    """The numbers and texts that parts hold, by the part's path and the attribute's name.

    Running statistics are left out: they move in every training forward.
    """
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


def write_state(parts: Mapping[str, nn.Module], state: State) -> None:
    """Set the numbers of a state in parts of the same paths; a part that is missing is skipped."""
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
    """Whether any element is finite and not zero, so that a mask on it would be visible."""
    return any(bool((tensor.isfinite() & (tensor != 0)).any()) for tensor in floats)
