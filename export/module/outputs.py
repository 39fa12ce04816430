"""The tensors a module answers with, by name, whatever container it answers in. Knows no rule."""

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
    """The tensors of a module's output in order: a tensor, or what torch's pytrees know: tuples,
    lists, dicts.

    A dictionary's keys name its tensors (`logits`, `hidden_states_0`); what has no key is
    `output_0`, `output_1`, ...
    """
    leaves = [(path, leaf) for path, leaf in _leaves(output) if isinstance(leaf, Tensor)]
    found: dict[str, Tensor] = {}
    for index, (path, leaf) in enumerate(leaves):
        name = _name(path) or f"output_{index}"
        found[name if name not in found else f"{name}_{index}"] = leaf
    return found


def left_out(output: object) -> tuple[str, ...]:
    """What an output holds beside tensors, which no graph can answer with: `past_key_values
    (DynamicCache)`.
    """
    strangers = [
        (path, leaf)
        for path, leaf in _leaves(output)
        if leaf is not None and not isinstance(leaf, Tensor)
    ]
    return tuple(f"{_name(path) or 'output'} ({type(leaf).__name__})" for path, leaf in strangers)


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """The module's forward afterwards as it was, whatever took its place on the object
    meanwhile.
    """
    own = vars(module).get("forward")
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


@contextmanager
def answering_tensors(
    module: nn.Module, inputs: Sequence[str], *, tracing: AbstractContextManager[object]
) -> Iterator[None]:
    """Let `module` be called with `inputs` alone and answer with its tensors alone, for an exporter
    that knows no other types; each call runs under `tracing`.

    The forward is exchanged on the object, not wrapped into another module: no path of the network
    changes. Its signature names the inputs, also those that the forward takes as `**kwargs`.
    """
    forward = module.forward

    def tensors(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, args, strict=False)) | kwargs
        known = {id(tensor) for tensor in named.values()}
        answers = []
        with tracing:
            output = forward(**named)
        for answer in flatten(output).values():
            # What is an input, or was an answer already, would be no output of its own in a graph.
            answers.append(answer.clone() if id(answer) in known else answer)
            known.add(id(answer))
        return tuple(answers)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs
    ]
    tensors.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with own_forward(module):
        module.forward = tensors
        yield


def _leaves(output: object) -> list[tuple[tuple[Any, ...], Any]]:
    return pytree.tree_flatten_with_path(_opened(output))[0]


def _opened(output: object) -> Any:
    """The output with every dataclass in it as a dictionary of its fields, which pytrees know."""

    def opened(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return _opened(
            {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        )

    return pytree.tree_map(opened, output)


def _name(path: tuple[Any, ...]) -> str:
    keys = [
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", "")))) for part in path
    ]
    if not keys or keys[0].isdigit():
        return ""
    return re.sub(r"\W+", "_", "_".join(keys)).strip("_")
