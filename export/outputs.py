"""The tensors a module answers with, by name, whatever container it answers in. Knows no rule."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def flatten(output: object) -> dict[str, Tensor]:
    """The tensors of a module's output in order: a tensor, or what torch's pytrees know: tuples, lists, dicts.

    A dictionary's keys name its tensors (`logits`, `hidden_states_0`); what has no key is `output_0`, `output_1`, ...
    """
    leaves = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(output)[0] if isinstance(leaf, Tensor)]
    found: dict[str, Tensor] = {}
    for index, (path, leaf) in enumerate(leaves):
        name = _name(path) or f"output_{index}"
        found[name if name not in found else f"{name}_{index}"] = leaf
    return found


def left_out(output: object) -> tuple[str, ...]:
    """What an output holds beside tensors, which no graph can answer with: `past_key_values (DynamicCache)`."""
    leaves = pytree.tree_flatten_with_path(output)[0]
    strangers = [(path, leaf) for path, leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]
    return tuple(f"{_name(path) or 'output'} ({type(leaf).__name__})" for path, leaf in strangers)


@contextmanager
def answering_tensors(module: nn.Module) -> Iterator[None]:
    """Let `module` answer with its tensors alone, for an exporter that knows no other types.

    The forward is exchanged on the object, not wrapped into another module: no path of the network changes.
    """
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def tensors(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(flatten(forward(*args, **kwargs)).values())

    module.forward = tensors
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def _name(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", "")))) for part in path]
    if not keys or keys[0].isdigit():
        return ""
    return re.sub(r"\W+", "_", "_".join(keys)).strip("_")
