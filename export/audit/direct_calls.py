"""The calls that a module makes directly: of other modules, but not the calls that these make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class DirectCall:
    """One direct call: its index in the caller's order, the module, the arguments, the output."""

    index: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self) -> list[Tensor]:
        """The floating point tensors among the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def scaled_output(self, factor: float) -> Any:
        """The output with its floating point tensors multiplied by `factor`."""
        return pytree.tree_map(lambda leaf: scaled(leaf, factor), self.output)

    def output_with_branch(self, factor: float) -> Any:
        """The output of a residual layer x + f(x), with its branch f(x) multiplied by `factor`.

        Factor 0 is a layer that was skipped. None where no input has the shape of the output's
        first floating point tensor, so that the module is no residual layer.
        """
        leaves, structure = pytree.tree_flatten(self.output)
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            x = next((tensor for tensor in self.inputs() if tensor.shape == leaf.shape), None)
            if x is None:
                return None
            leaves[position] = x if factor == 0 else x + factor * (leaf - x)
            return pytree.tree_unflatten(leaves, structure)
        return None


def scaled(leaf: Any, factor: float) -> Any:
    """A floating point tensor times `factor`; any other value as it is."""
    is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf * factor if is_float else leaf


@contextmanager
def watch_direct_calls(
    caller: nn.Module,
    *,
    on_enter: Callable[[], None] = lambda: None,
    on_leave: Callable[[DirectCall], Any] = lambda call: None,
) -> Iterator[None]:
    """While `caller` runs, call `on_enter` before and `on_leave` after each of its direct calls.

    What `on_leave` returns replaces the output of that call, unless it is None.
    """
    # 0: outside of the caller. 1: in the caller's code. 2 and more: in a module that it calls.
    depth = 0
    count = 0

    def enter(module: nn.Module, _args: object) -> None:
        nonlocal depth
        if depth == 1:
            on_enter()
        if depth or module is caller:
            depth += 1

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal depth, count
        if not depth:
            return None
        depth -= 1
        if depth != 1:
            return None
        count += 1
        return on_leave(DirectCall(count - 1, module, args, kwargs, output))

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        # always_call: the depth must also fall when a forward raises.
        hook = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
        stack.callback(hook.remove)
        yield
