"""A network: a module with its parts by path and its random generators, found in one walk."""

from __future__ import annotations

import copy
import functools
import inspect
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import nn

Generator: TypeAlias = random.Random | np.random.Generator | np.random.RandomState

# Its registries of parameters, buffers, hooks and children
_TORCHS_OWN = frozenset(vars(nn.Module()))
_SEQUENCES = (list, tuple, set, frozenset, deque)
# What their objects hold is theirs, large, and no module of the user's.
_NOT_LOOKED_INTO = ("torch", "numpy", "lightning", "builtins", "logging", "threading")


@dataclass(frozen=True, eq=False)
class Network:
    """A module and everything that hangs on it, as one walk found it.

    `parts` maps paths to modules ("" is the root), each module once, wherever an attribute leads to
    one: also those that `named_modules` does not see. A hidden module is named as code would reach
    it: `blocks.0.drops[1]`, `parts['head']`, `call.args[0]`. `generators` maps paths to the
    generators of Python and NumPy: those that attributes lead to, and the globals beside a forward.
    """

    module: nn.Module
    parts: Mapping[str, nn.Module]
    generators: Mapping[str, Generator]

    @classmethod
    def of(cls, module: nn.Module) -> Network:
        """Walk over the module's attributes, containers, partials and closures."""
        kinds = (random.Random, np.random.Generator, np.random.RandomState)
        parts: dict[str, nn.Module] = {}
        generators: dict[str, Generator] = {}
        for path, value in _reachable(module):
            if isinstance(value, nn.Module):
                parts[path] = value
                # Read statically: the forward of a scripted module is a descriptor that raises.
                forward = inspect.getattr_static(type(value), "forward", None)
                beside = getattr(forward, "__globals__", {})
                generators |= {
                    f"global {name}": item
                    for name, item in beside.items()
                    if isinstance(item, kinds)
                }
            elif isinstance(value, kinds):
                generators[path] = value
        return cls(module, parts, generators)

    @property
    def in_training(self) -> dict[str, nn.Module]:
        """The parts whose `training` flag is set, by path."""
        return {path: part for path, part in self.parts.items() if part.training}

    def copy(self, *, parameters: bool = False) -> Network:
        """A copy that shares the parameters, unless `parameters` is set, and nothing else.

        The network itself where it cannot be copied (a lock, an open file), or where a copy would
        still run parts of it (a closure over one of its modules). A caller that runs the copy puts
        back what that may move: see `untouched`.
        """
        shared = {} if parameters else {id(item): item for item in self.module.parameters()}
        try:
            module = copy.deepcopy(self.module, shared)
        except Exception:  # whatever a user's attribute raises when it is copied
            return self
        copied = Network.of(module)
        originals = {id(part) for part in self.parts.values()}
        return self if any(id(part) in originals for part in copied.parts.values()) else copied

    def disturb(self) -> None:
        """Draw a number from each generator, so that the numbers it gives next are other ones."""
        for generator in self.generators.values():
            generator.random()


def _reachable(root: nn.Module) -> Iterator[tuple[str, object]]:
    """Everything that attributes, containers, partials and closures lead to, breadth first, each
    object once.
    """
    # Holds the objects too: an id is only theirs while they live.
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
