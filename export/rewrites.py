"""Replacements for calls that torch's exporter cannot write, used while it traces a module.

Each was needed in torch 2.13. A replacement computes the same numbers from the same inputs, up to
the order of additions; the rule parity compares the graph with the module as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Rewrites(TorchFunctionMode):
    """While active, calls that the exporter refuses are replaced by functions of this module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rewrite = _REWRITES.get(getattr(func, "__name__", ""))
        if rewrite is not None and isinstance(args[0] if args else None, Tensor):
            return rewrite(func, *args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def traceable_modules() -> Iterator[None]:
    """Make two calls traceable that do not affect the answer.

    nn.TransformerEncoder compares its mask with a causal one, only to choose a faster kernel.
    `self.layer.to(dtype)` in a forward changes nothing if the layer has that type already.
    """
    detect = nn.modules.transformer._detect_is_causal_mask
    apply = nn.Module._apply

    def causal_by_hint(
        mask: Tensor | None, is_causal: bool | None = None, size: Any = None
    ) -> bool:
        return bool(is_causal)

    def apply_if_needed(
        self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> nn.Module:
        tensors = [*self.parameters(recurse), *self.buffers(recurse)]
        if all(fn(tensor) is tensor for tensor in tensors):
            return self
        module: nn.Module = apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        return module

    nn.modules.transformer._detect_is_causal_mask = causal_by_hint
    nn.Module._apply = apply_if_needed  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.modules.transformer._detect_is_causal_mask = detect
        nn.Module._apply = apply  # type: ignore[method-assign]


def _floats_first(func: Callable[..., Any], tensor: Tensor, other: Any, **kwargs: Any) -> Any:
    """`1.0 - mask` and `mask // 2.0` of integers: in floats, as torch computes them anyway."""
    if isinstance(other, float) and not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.to(torch.get_default_dtype())
    return func(tensor, other, **kwargs)


def _cast_first(func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A softmax of integers with `dtype=`: the cast is a step before it."""
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype):
        tensor = tensor.to(dtype)
    return func(tensor, *args, **kwargs)


def _mean_slope(
    func: Callable[..., Any],
    tensor: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Any:
    """RReLU in eval mode: a leaky ReLU with the mean of the slopes that training draws."""
    if training:
        return func(tensor, lower, upper, training, inplace)
    return F.leaky_relu(tensor, (lower + upper) / 2)


def _four_axes(
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attention over (..., length, width) with fewer or more than two leading axes.

    All leading axes become one: (1, N, length, width).
    """
    if query.ndim == 4:
        return func(query, key, value, attn_mask, *args, **kwargs)
    leading = query.shape[:-2]
    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-2:])

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1, *tensor.shape[-2:])

    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = flat(attn_mask)
    answer = func(flat(query), flat(key), flat(value), attn_mask, *args, **kwargs)
    return answer.reshape(*leading, *answer.shape[-2:])


def _expert_by_expert(
    func: Callable[..., Any], rows: Tensor, weight: Tensor, offs: Tensor, **kwargs: Any
) -> Tensor:
    """Rows (S, D), sorted by expert, times their expert's weight (E, D, F): (S, F).

    `offs` (E,) has the index at which each expert's rows end; rows after the last are 0. All rows
    are multiplied by all experts, and each keeps the product of its own.
    """
    expert = (torch.arange(rows.shape[0], device=rows.device)[:, None] >= offs[None, :]).sum(-1)
    answer = torch.zeros_like(rows @ weight[0])
    for index in range(weight.shape[0]):
        answer = torch.where((expert == index)[:, None], rows @ weight[index], answer)
    return answer


_REWRITES: dict[str, Callable[..., Any]] = {
    "__rsub__": _floats_first,
    "rsub": _floats_first,
    "__floordiv__": _floats_first,
    "floor_divide": _floats_first,
    "softmax": _cast_first,
    "log_softmax": _cast_first,
    "rrelu": _mean_slope,
    F.scaled_dot_product_attention.__name__: _four_axes,
    "grouped_mm": _expert_by_expert,
    "_grouped_mm": _expert_by_expert,
    # Hugging Face's own operator, for experts in float32.
    "grouped_mm_fallback": _expert_by_expert,
    "grouped_mm_fallback.default": _expert_by_expert,
}
