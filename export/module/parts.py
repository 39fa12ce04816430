"""What hangs on a network, by name: its modules, also those that `named_modules` does not see, and
its generators.

Knows no rule.
"""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
from torch import nn

Generator: TypeAlias = random.Random | np.random.Generator | np.random.RandomState

# its registries of parameters, buffers, hooks and children
_TORCHS_OWN = frozenset(vars(nn.Module()))
_SEQUENCES = (list, tuple, set, frozenset, deque)
# What their objects hold is theirs, large, and no module of the user's.
_NOT_LOOKED_INTO = ("torch", "numpy", "lightning", "builtins", "logging", "threading")


def named_everything(root: nn.Module) -> dict[str, nn.Module]:
    """Module by path ("" is the root), each once, wherever an attribute leads to one.

    A hidden one is named as one would write it: `blocks.0.drops[1]`, `parts['head']`,
    `call.args[0]`.
    """
    return {path: value for path, value in _reachable(root) if isinstance(value, nn.Module)}


def named_generators(root: nn.Module) -> dict[str, Generator]:
    """Python's and NumPy's generators by path: those that attributes lead to, and the globals
    beside a forward.
    """
    kinds = (random.Random, np.random.Generator, np.random.RandomState)
    found: dict[str, Generator] = {}
    for path, value in _reachable(root):
        if isinstance(value, kinds):
            found[path] = value
        elif isinstance(value, nn.Module):
            beside = getattr(type(value).forward, "__globals__", {})
            found |= {
                f"global {name}": part for name, part in beside.items() if isinstance(part, kinds)
            }
    return found


def private_copy(root: nn.Module, *, parameters: bool = False) -> nn.Module:
    """A copy that shares the parameters, unless these are asked for too, and nothing else with the
    network.

    The network itself where it cannot be copied (a lock, an open file), or where a copy would still
    run parts of it (a closure over one of its modules): whoever runs it then puts back what that
    moves.
    """
    shared = {} if parameters else {id(parameter): parameter for parameter in root.parameters()}
    try:
        copied = copy.deepcopy(root, shared)
    except Exception:  # whatever a user's attribute raises when it is copied
        return root
    originals = {id(part) for part in named_everything(root).values()}
    return (
        root if any(id(part) in originals for part in named_everything(copied).values()) else copied
    )


def disturbed(root: nn.Module) -> nn.Module:
    """The network, after one number was drawn from each of its own generators: what they give next
    is another one.
    """
    for generator in named_generators(root).values():
        generator.random()
    return root


def _reachable(root: nn.Module) -> Iterator[tuple[str, object]]:
    """Everything that attributes, containers, partials and closures lead to, breadth first, each
    object once.
    """
    # holds the objects too: an id is only theirs while they live
    seen: dict[int, object] = {id(root): root}
    waiting: deque[tuple[str, object]] = deque([("", root)])
    while waiting:
        path, value = waiting.popleft()
        yield path, value
        for name, part in _parts(path, value):
            if id(part) not in seen:
                seen[id(part)] = part
                waiting.append((name, part))


def _parts(path: str, value: object) -> Iterator[tuple[str, object]]:
    prefix = f"{path}." if path else ""
    if isinstance(value, nn.Module):
        yield from ((f"{prefix}{name}", child) for name, child in value.named_children())
        yield from (
            (f"{prefix}{name}", part)
            for name, part in vars(value).items()
            if name not in _TORCHS_OWN
        )
    elif isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, _SEQUENCES):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (
            (f"{prefix}{name}", getattr(value, name)) for name in ("func", "args", "keywords")
        )
    elif isinstance(value, types.MethodType):
        yield f"{prefix}__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():  # an empty cell: the variable is not bound yet
                yield f"{prefix}<{name}>", cell.cell_contents
    elif _is_users(value):
        yield from ((f"{prefix}{name}", part) for name, part in vars(value).items())


def _is_users(value: object) -> bool:
    """Whether a value is an object of a class that the user wrote."""
    if not hasattr(value, "__dict__") or isinstance(value, type | types.ModuleType):
        return False
    return type(value).__module__.partition(".")[0] not in _NOT_LOOKED_INTO
