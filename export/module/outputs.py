"""The tensors that a module returns, by name, whatever container they are in."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def flatten(output: object) -> dict[str, Tensor]:
    """The tensors of a module's output, in order.

    The output is a tensor, or a container that torch's pytrees or dataclasses describe. Keys of
    dictionaries and fields name the tensors (`logits`, `hidden_states_0`). A tensor without a key
    is `output_0`, `output_1`, and so on.

    >>> import torch
    >>> list(flatten({"logits": torch.ones(1), "hidden": [torch.ones(1), torch.ones(1)]}))
    ['logits', 'hidden_0', 'hidden_1']
    """
    tensors: dict[str, Tensor] = {}
    leaves = [(name, leaf) for name, leaf in _named_leaves(output) if isinstance(leaf, Tensor)]
    for index, (key, leaf) in enumerate(leaves):
        name = key or f"output_{index}"
        if name in tensors:
            name = f"{name}_{index}"
        tensors[name] = leaf
    return tensors


def left_out(output: object) -> tuple[str, ...]:
    """What an output holds besides tensors: a graph cannot return it.

    For example `past_key_values (DynamicCache)`. None is not listed.
    """
    return tuple(
        f"{name or 'output'} ({type(leaf).__name__})"
        for name, leaf in _named_leaves(output)
        if leaf is not None and not isinstance(leaf, Tensor)
    )


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Restore the module's forward afterwards, whatever replaced it on the object."""
    forward = vars(module).get("forward")
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if forward is not None:
            module.forward = forward


@contextmanager
def answering_tensors(
    module: nn.Module, inputs: Sequence[str], *, tracing: AbstractContextManager[object]
) -> Iterator[None]:
    """Make `module` take only `inputs` and return a tuple of its tensors, for an exporter.

    Each call runs under `tracing`. The forward is replaced on the object: in a wrapper module, the
    paths in the network would change. Its signature names the inputs, also those that the forward
    takes as `**kwargs`.
    """
    forward = module.forward

    def tensors_of_call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, args, strict=False)) | kwargs
        with tracing:
            output = forward(**named)
        # In a graph, no output may be an input or another output. Such a tensor is cloned.
        used = {id(tensor) for tensor in named.values()}
        answers = []
        for answer in flatten(output).values():
            answers.append(answer.clone() if id(answer) in used else answer)
            used.add(id(answer))
        return tuple(answers)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs
    ]
    tensors_of_call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with own_forward(module):
        module.forward = tensors_of_call
        yield


def _named_leaves(output: object) -> list[tuple[str, Any]]:
    """The leaves of an output in order, each with a name made from its keys, or "" without keys."""
    leaves: list[tuple[str, Any]] = []
    for path, leaf in pytree.tree_flatten_with_path(_without_dataclasses(output))[0]:
        # An entry of a path holds the key of a dictionary, a field's name or an index.
        keys: list[str] = []
        for entry in path:
            key: object = ""
            for attribute in ("key", "name", "idx"):
                if hasattr(entry, attribute):
                    key = getattr(entry, attribute)
                    break
            keys.append(str(key))
        name = ""
        if keys and not keys[0].isdigit():
            name = re.sub(r"\W+", "_", "_".join(keys)).strip("_")
        leaves.append((name, leaf))
    return leaves


def _without_dataclasses(output: object) -> Any:
    """The output with every dataclass in it as a dictionary, which pytrees can flatten."""

    def as_dictionary(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        return _without_dataclasses(fields)

    return pytree.tree_map(as_dictionary, output)
