"""Every module of a network with a name for it, those that `named_modules` does not see included. Knows no rule."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def named_everything(root: nn.Module) -> dict[str, nn.Module]:
    """Module by path ("" is the root), each object once, those kept in plain lists, tuples, sets and dicts included.

    A hidden one is named as one would write it: `blocks.0.drops[1]`, `parts['head']`.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    _visit("", root, found, seen)
    return found


def _visit(path: str, value: object, found: dict[str, nn.Module], seen: set[int]) -> None:
    if id(value) in seen or not isinstance(value, nn.Module | dict | list | tuple | set | frozenset):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        found[path] = value
    for name, part in _parts(path, value):
        _visit(name, part, found, seen)


def _parts(path: str, value: object) -> Iterator[tuple[str, object]]:
    prefix = f"{path}." if path else ""
    if isinstance(value, nn.Module):
        for name, child in value.named_children():
            yield f"{prefix}{name}", child
        for name, attribute in vars(value).items():
            if not name.startswith("_"):  # torch's own registries: parameters, buffers, hooks, children seen above
                yield f"{prefix}{name}", attribute
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}[{key!r}]", item
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
