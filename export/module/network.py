"""A network: a module, its parts by path and its random generators, found in one walk."""

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
_GENERATOR_TYPES = (random.Random, np.random.Generator, np.random.RandomState)

# Attributes that torch gives to every module: its registries of parameters, buffers, hooks and
# children.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
_SEQUENCES = (list, tuple, set, frozenset, deque)
# Objects of these packages are not walked: they are large and hold no module of the user's.
_SKIPPED_PACKAGES = ("torch", "numpy", "lightning", "builtins", "logging", "threading")


@dataclass(frozen=True, eq=False)
class Network:
    """A module and what can be reached from its attributes.

    parts         path -> module ("" is the root), each module once, also those that
                  `named_modules` does not list: in lists, dicts, partials and closures
    generators    path -> generator of Python or NumPy, also a global of a forward's file

    A path is what code would write: `blocks.0.drops[1]`, `parts['head']`, `call.args[0]`.
    """

    module: nn.Module
    parts: Mapping[str, nn.Module]
    generators: Mapping[str, Generator]

    @classmethod
    def of(cls, module: nn.Module) -> Network:
        """Walk over the module's attributes, containers, partials and closures."""
        parts: dict[str, nn.Module] = {}
        generators: dict[str, Generator] = {}
        # Breadth first, each object once. `visited` also holds the objects themselves, because
        # Python may reuse the id of an object that no longer exists.
        visited: dict[int, object] = {id(module): module}
        pending: deque[tuple[str, object]] = deque([("", module)])
        while pending:
            path, value = pending.popleft()
            if isinstance(value, _GENERATOR_TYPES):
                generators[path] = value
            if isinstance(value, nn.Module):
                parts[path] = value
                # Read statically: the forward of a scripted module is a descriptor that raises.
                forward = inspect.getattr_static(type(value), "forward", None)
                for name, item in getattr(forward, "__globals__", {}).items():
                    if isinstance(item, _GENERATOR_TYPES):
                        generators[f"global {name}"] = item
            for child_path, child in _children(path, value):
                if id(child) not in visited:
                    visited[id(child)] = child
                    pending.append((child_path, child))
        return cls(module, parts, generators)

    @property
    def in_training(self) -> dict[str, nn.Module]:
        """The parts whose `training` flag is set, by path."""
        return {path: part for path, part in self.parts.items() if part.training}

    def copy(self, *, parameters: bool = False) -> Network:
        """A copy that shares only the parameters; with `parameters` it copies them too.

        Returns the network itself if it cannot be copied (a lock, an open file), or if the copy
        would still run parts of the original (a closure over one of its modules). So a caller that
        runs the result must restore what that may change: see `untouched`.
        """
        # deepcopy takes objects from this table instead of copying them.
        shared = {} if parameters else {id(item): item for item in self.module.parameters()}
        try:
            module = copy.deepcopy(self.module, shared)
        except Exception:  # whatever an attribute of the user's raises when it is copied
            return self
        copied = Network.of(module)
        originals = {id(part) for part in self.parts.values()}
        if any(id(part) in originals for part in copied.parts.values()):
            return self
        return copied

    def disturb(self) -> None:
        """Draw one number from each generator, so that its next numbers are different."""
        for generator in self.generators.values():
            generator.random()


def _children(path: str, value: object) -> Iterator[tuple[str, object]]:
    """The objects that a value holds directly, each with its path."""
    prefix = f"{path}." if path else ""
    if isinstance(value, nn.Module):
        for name, child in value.named_children():
            yield f"{prefix}{name}", child
        for name, attribute in vars(value).items():
            if name not in _TORCH_ATTRIBUTES:
                yield f"{prefix}{name}", attribute
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}[{key!r}]", item
    elif isinstance(value, _SEQUENCES):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
    elif isinstance(value, functools.partial):
        for name in ("func", "args", "keywords"):
            yield f"{prefix}{name}", getattr(value, name)
    elif isinstance(value, types.MethodType):
        yield f"{prefix}__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            # An empty cell belongs to a variable that is not bound yet.
            if cell != types.CellType():
                yield f"{prefix}<{name}>", cell.cell_contents
    elif isinstance(value, type | types.ModuleType):
        return
    elif type(value).__module__.partition(".")[0] not in _SKIPPED_PACKAGES:
        # An object of any other class; one without a __dict__ has no attributes to walk.
        for name, attribute in getattr(value, "__dict__", {}).items():
            yield f"{prefix}{name}", attribute
