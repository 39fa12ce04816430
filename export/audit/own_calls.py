"""The calls that a module's own code makes: of other modules, and not those that these make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class OwnCall:
    """One of them: its place in the order of calls, the module, what it was given and answered."""

    index: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self) -> list[Tensor]:
        """The floating tensors that it was given."""
        return [
            leaf
            for leaf in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]

    def scaled(self, factor: float) -> Any:
        """The output with its floating tensors multiplied by a factor."""

        def exchanged(leaf: Any) -> Any:
            floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf * factor if floats else leaf

        return pytree.tree_map(exchanged, self.output)

    def with_branch(self, factor: float) -> Any:
        """The output when what the module adds to its input counts `factor` times: 0 is a module
        that was skipped. None where it does not add to an input.
        """
        leaves, structure = pytree.tree_flatten(self.output)
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                x = next((tensor for tensor in self.inputs() if tensor.shape == leaf.shape), None)
                if x is None:
                    return None
                leaves[position] = x if factor == 0 else x + factor * (leaf - x)
                return pytree.tree_unflatten(leaves, structure)
        return None


@contextmanager
def own_calls(
    site: nn.Module,
    *,
    entering: Callable[[], None] = lambda: None,
    leaving: Callable[[OwnCall], Any] = lambda call: None,
) -> Iterator[None]:
    """While a call of `site` runs, hears of every call that its own code makes.

    What `leaving` returns takes the place of the output, unless it is None.
    """
    depth, count = 0, 0

    def enter(module: nn.Module, _args: object) -> None:
        nonlocal depth
        if depth == 1:
            entering()
        if depth or module is site:
            depth += 1

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal depth, count
        if not depth:
            return None
        depth -= 1
        if depth != 1:
            return None
        count += 1
        return leaving(OwnCall(count - 1, module, args, kwargs, output))

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        hook = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
        stack.callback(hook.remove)
        yield
