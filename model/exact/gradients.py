"""Functions with exact values and the gradients of the real functions that they stand for.

The forward pass gives the bits of eval mode. A backward pass through floors and tables alone would
be 0 everywhere, so each function brings the gradient of what it approximates.

Shapes: ... any, D width, T positions, B rows, G ids a position, V ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evalmode.model.exact.formats import ATTENTION, NORMED, TABLE, Format


def nearest(tensor: Tensor) -> Tensor:
    """Round to the nearest integer, halves up; the gradient passes through."""
    # Floor and not round, which takes halves to even numbers: the same rule as in the graph.
    rounded = (tensor.detach() + 0.5).floor_()
    return _Replaced.apply(tensor, rounded)  # type: ignore[no-untyped-call]


def power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponents for int32 exponents from -126 to 127.

    From the bits of a float32, because `exp2` and `pow` need not be exact on every device.
    """
    return ((exponents + 127) << 23).view(torch.float32).to(dtype)


def floor_clip(tensor: Tensor, to: Format, *, training: bool) -> Tensor:
    """Floor, and clip to a format.

    The gradient passes through where nothing is clipped. In eval mode these are two plain
    operations, for the exporter.
    """
    if training:
        return _FloorClip.apply(tensor, to.low, to.high)  # type: ignore[no-untyped-call]
    return tensor.floor().clamp(to.low, to.high)


def norm_gradient(stream: Tensor, normed: Tensor, factor: Tensor) -> Tensor:
    """`normed`, with the gradient of stream * 2^5 / rms(stream).

    stream (..., D); normed (..., D), not yet clipped; factor (..., 1): normed / stream.
    """
    return _Norm.apply(stream, normed, factor)  # type: ignore[no-untyped-call]


def softmax_gradient(scores: Tensor, weights: Tensor, *, nats: float) -> Tensor:
    """`weights`, with the gradient of 255 * softmax(nats * scores).

    scores, weights (..., T); `nats` is the worth of one unit of a score.
    """
    return _Softmax.apply(scores, weights, nats)  # type: ignore[no-untyped-call]


def weighted_rows(ids: Tensor, weights: Tensor, table: Tensor, *, scale: float) -> Tensor:
    """The sum of a position's table rows, each rounded to the format TABLE and weighted.

    ids (B, T, G) int64, weights (B, T, 1, G), table (V, D) -> (B, T, D). A row is
    `table * scale * 2^7`, rounded and clipped. The gradient is that of `weights @ table[ids]`, in
    units of TABLE. The row of id 0, padding, gets none.
    """
    return _WeightedRows.apply(ids, weights, table, scale)  # type: ignore[no-untyped-call]


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _FloorClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, low: int, high: int) -> Tensor:
        floored = tensor.floor()
        clipped = floored.clamp(low, high)
        ctx.save_for_backward(floored == clipped)
        return clipped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (is_inside,) = ctx.saved_tensors
        return gradient * is_inside, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, normed: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(normed, factor)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # With y = c x / rms(x) and c = 2^5:  dL/dx = (c / rms) (g - y mean(g y) / c^2)
        normed, factor = ctx.saved_tensors
        along = (gradient * normed).mean(-1, keepdim=True)
        along *= 2.0 ** (-2 * NORMED.fraction_bits)
        return torch.addcmul(gradient, normed, along, value=-1.0) * factor, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor, nats: float) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.nats = nats
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # With p = 255 softmax(nats s):  dL/ds = nats p (g - sum(g p) / 255)
        (weights,) = ctx.saved_tensors
        mean = (gradient * weights).sum(-1, keepdim=True) / ATTENTION.high
        return (gradient - mean) * weights * ctx.nats, None, None


class _WeightedRows(torch.autograd.Function):
    # As `_WeightedRows` of model/transformer.py, on the rows that the batch reads: rounding the
    # whole table of 65,536 rows would cost a fifth of a training step.

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weights: Tensor, table: Tensor, scale: float) -> Tensor:
        b, t, g = ids.shape
        ctx.save_for_backward(ids, weights)
        ctx.rows, ctx.scale = len(table), scale
        used, places = torch.unique(ids, return_inverse=True)
        rows = quantised_rows(table[used], scale=scale)
        bags = F.embedding_bag(
            places.view(-1, g), rows, per_sample_weights=weights.view(-1, g), mode="sum"
        )
        return bags.view(b, t, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, None]:
        ids, weights = ctx.saved_tensors
        weights = weights * (ctx.scale * 2.0**TABLE.fraction_bits)
        row_gradients = weights.transpose(2, 3) * gradient.unsqueeze(2)  # (B, T, G, D)
        table_gradient = gradient.new_zeros(ctx.rows, gradient.shape[-1])  # (V, D)
        table_gradient.index_add_(0, ids.flatten(), row_gradients.flatten(0, 2))
        # Id 0 is padding, which must stay the zero vector.
        table_gradient[0] = 0.0
        return None, None, table_gradient, None


def quantised_rows(rows: Tensor, *, scale: float) -> Tensor:
    """Rows of an embedding table in the format TABLE, times `scale`."""
    integers = (rows * (scale * 2.0**TABLE.fraction_bits) + 0.5).floor_()
    return integers.clamp_(TABLE.low, TABLE.high)
