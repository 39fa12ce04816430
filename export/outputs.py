"""The tensors a module answers with, by name, whatever container it answers in. Knows no rule."""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree


def flatten(output: object) -> dict[str, Tensor]:
    """The tensors of a module's output in order: a tensor, or what torch's pytrees know: tuples, lists, dicts."""
    leaves, _ = pytree.tree_flatten(output)
    return {f"output_{index}": leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
