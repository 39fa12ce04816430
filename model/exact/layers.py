"""The layers of an exact network: the building blocks of `network.py`, and of networks of your own.

A layer has two states:

    trainable   Its parameters are real numbers, as in any network. Each forward rounds them to
                their formats, in training and in eval mode alike.
    frozen      `freeze` has replaced the parameters by the rounded ones, in the units of the
                graph. The forward is then a few plain operations, and cannot train any more.

Both give the same bits. Export a frozen copy: the rounding of the weights is then no part of the
graph.

    layer = Linear(96, 192, reads=NORMED, writes=HIDDEN)
    hidden = layer(normed)            # integers 0 .. 255
    layer.freeze()
    assert torch.equal(layer(normed), hidden)

Bounds. A sum of products is exact if the sum of |weight| * largest input, counted in the finest
unit of the weights, is at most 2^24. `formats.require_exact_sizes` guarantees this for the worst
weights, and `Linear.reach` measures it for the weights at hand, which use less. The package's
docstring has the formulas, a network of these layers, and what to do for larger ones.

Classic dropout multiplies by 1 - p in eval mode, which no power of two can express. So the layer
beside it has the factor in its weights before they are rounded: `input_keep` and `output_keep`. In
eval mode the dropout itself then is the identity: see `dropped`.

Shapes: B rows, T positions, G ids a position, D width, H heads, K = D / H, V ids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.model.dropout import ClassicDropout
from evalmode.model.exact import tables
from evalmode.model.exact.formats import (
    ATTENTION,
    LARGEST,
    NORMED,
    POSITION,
    PROJECTED,
    STREAM,
    TABLE,
    Format,
    SumFormat,
    largest_weight,
)
from evalmode.model.exact.gradients import (
    floor_clip,
    nearest,
    norm_gradient,
    power_of_two,
    quantised_rows,
    softmax_gradient,
    weighted_rows,
)


def dropped(dropout: nn.Module, tensor: Tensor) -> Tensor:
    """`dropout(tensor)`, but the tensor itself for classic dropout in eval mode.

    Its eval factor is in the weights of the layer beside it.
    """
    if isinstance(dropout, ClassicDropout) and not dropout.training:
        return tensor
    return dropout(tensor)


def keep_of(dropout: nn.Module) -> float:
    """The eval factor of a dropout: 1 - p for classic dropout, 1 for any other."""
    return dropout.keep if isinstance(dropout, ClassicDropout) else 1.0


class Linear(nn.Linear):
    """(..., in) of the format `reads` -> (..., out) of the format `writes`.

    A weight is an integer of `weight_bits` bits times 2^e, with one e for each output: the smallest
    for which the largest weight fits. A `writes` with a range is floored, to nearest, and clipped
    to it; a SumFormat is not.

    input_keep, output_keep     eval factors of classic dropouts before and after the layer
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        reads: Format,
        writes: Format | SumFormat,
        weight_bits: int = 8,
        input_keep: float = 1.0,
        output_keep: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features)
        self.reads, self.writes, self.weight_bits = reads, writes, weight_bits
        self.input_keep, self.output_keep = input_keep, output_keep
        self.is_frozen = False

    def forward(self, tensor: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        require_trainable(self)
        sums = F.linear(tensor, *self.rounded())
        if isinstance(self.writes, SumFormat):
            return sums
        return floor_clip(sums, self.writes, training=self.training)

    def rounded(self) -> tuple[Tensor, Tensor]:
        """The weight (out, in) and the bias (out,) of the graph, for units of `reads` and `writes`.

        The bias of a floored output includes the 1/2 that makes floor round to nearest.
        """
        if self.is_frozen:
            return self.weight, self.bias
        weight, bias = self._kept()
        exponents = self._exponents(weight, bias)
        dtype = weight.dtype
        integers = nearest(weight * power_of_two(-exponents, dtype).unsqueeze(1))
        # The bias is a multiple of the smallest product.
        bias_unit = power_of_two(self.reads.fraction_bits - exponents, dtype)
        bias_integers = nearest(bias * bias_unit)
        # To the units of the output. A power of two: nothing is rounded.
        shift = power_of_two(exponents + self._shift, dtype)
        half = 0.0 if isinstance(self.writes, SumFormat) else 0.5
        return integers * shift.unsqueeze(1), bias_integers * shift + half

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The weight and the bias, in eval mode times the factors of classic dropouts."""
        if self.training:
            return self.weight, self.bias
        return self.weight * (self.input_keep * self.output_keep), self.bias * self.output_keep

    @property
    def _shift(self) -> int:
        """The exponent that brings sums of products to the units of the output."""
        return self.writes.fraction_bits - self.reads.fraction_bits

    @torch.no_grad()
    def _exponents(self, weight: Tensor, bias: Tensor) -> Tensor:
        """e for each output (out,) int32: its weights are integers times 2^e."""
        # A bias beside tiny weights sets e too: it then has at most 23 of the 24 bits. The last
        # bound is for a row of zeros.
        bias_share = bias.abs() * 2.0 ** (self.reads.fraction_bits - 15)
        largest = torch.maximum(weight.abs().amax(1), bias_share).clamp(min=2.0**-60)
        fractions, exponents = torch.frexp(largest)  # fractions in [1/2, 1)
        exponents = exponents - (self.weight_bits - 1)
        # A fraction of almost 1 rounds up to 128, one more than the largest weight of 8 bits.
        limit = (largest_weight(self.weight_bits) + 0.5) / 2 ** (self.weight_bits - 1)
        exponents = exponents + (fractions >= limit)
        if isinstance(self.writes, SumFormat) and self.writes.grid_bits is not None:
            exponents = exponents.clamp(min=self.reads.fraction_bits - self.writes.grid_bits)
        return exponents

    @torch.no_grad()
    def reach(self) -> Tensor:
        """The largest sum that each output can have, (out,) float64, in units of `writes`."""
        weight, bias = (parameter.double() for parameter in self.rounded())
        return weight.abs().sum(1) * self.reads.largest + bias.abs()

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the parameters by those of the graph.

        Raises ValueError where a sum of these weights could need more than 24 bits.
        """
        if self.is_frozen:
            return
        require_eval(self)
        weight, bias = self._kept()
        exponents = self._exponents(weight, bias) + self._shift
        grid = power_of_two(exponents, torch.float64)
        if not isinstance(self.writes, SumFormat):
            grid = grid.clamp(max=0.5)
        most = float((self.reach() / grid).max())
        if most > LARGEST:
            raise ValueError(
                f"a sum of {self.in_features} products can reach {most:,.0f} units, and float32 is"
                f" exact up to {LARGEST:,}: use fewer inputs or smaller weights, such as with a"
                " higher weight decay"
            )
        weight, bias = self.rounded()
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.is_frozen = True

    def extra_repr(self) -> str:
        """The text between the brackets of `repr(module)`."""
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, frozen={self.is_frozen}"


class Embedding(nn.Module):
    """Ids to the stream: the mean of a position's G table rows, plus a vector of the position.

    The mean is a sum times 1 / G, so G is a power of two. `ngram_dropout` drops single ids,
    `dropout` elements of the result.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        positions: int,
        ids_per_position: int,
        ngram_dropout: nn.Module,
        dropout: nn.Module,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Embedding(positions, width)
        self.ngram_dropout, self.dropout = ngram_dropout, dropout
        # From the table's units to those of the stream, and the division of the mean.
        self.shift = 2.0 ** (STREAM.fraction_bits - TABLE.fraction_bits) / ids_per_position
        self.is_frozen = False

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T, G) int64 -> (B, T, D) of the format STREAM."""
        require_trainable(self)
        b, t, g = ids.shape
        if self.is_frozen:
            # A sum over G in any order: these are integers of at most 12 bits.
            x = self.table(ids).sum(2) + self.positions.weight[:t]
            return dropped(self.dropout, x)
        table_keep, position_keep = self._keeps()
        weights = self.table.weight.new_full((b, t, 1, g), self.shift)
        weights = dropped(self.ngram_dropout, weights)
        x = weighted_rows(ids, weights, self.table.weight, scale=table_keep)
        x = x + self._rounded_positions(position_keep)[:t]
        return dropped(self.dropout, x)

    def _keeps(self) -> tuple[float, float]:
        """The eval factors of classic dropouts on table rows, and on position vectors."""
        if self.training:
            return 1.0, 1.0
        position_keep = keep_of(self.dropout)
        return keep_of(self.ngram_dropout) * position_keep, position_keep

    def _rounded_positions(self, keep: float) -> Tensor:
        integers = nearest(self.positions.weight * (keep * 2.0**POSITION.fraction_bits))
        return integers.clamp(POSITION.low, POSITION.high)

    @torch.no_grad()
    def reach(self) -> float:
        """The largest magnitude of an element, in units of the stream."""
        g = 2.0 ** (STREAM.fraction_bits - TABLE.fraction_bits) / self.shift
        largest = float(self.positions.weight.abs().max())
        if not self.is_frozen:
            largest = float(self._rounded_positions(self._keeps()[1]).abs().max())
        return g * TABLE.largest * self.shift + largest

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the table and the position vectors by those of the graph, in stream units."""
        if self.is_frozen:
            return
        require_eval(self)
        table_keep, position_keep = self._keeps()
        self.positions.weight.copy_(self._rounded_positions(position_keep))
        self.table.weight.copy_(quantised_rows(self.table.weight, scale=table_keep) * self.shift)
        self.is_frozen = True


class RmsNorm(nn.Module):
    """The stream divided by its root mean square: (..., D) of STREAM -> (..., D) of NORMED.

    y = x / rms(x), as Zhang and Sennrich 2019, without a gain: the weights of the next layer have
    it. Nothing here is learned.

    1. x is floored and clipped to 16 bits, units of 2^-12: a real range of -16 to 16.
    2. c, the same in units of 2^-8, is clipped so that the sum S of its squares has 24 bits:
       to 418 for a width of 96. A number beyond 1.6 counts as 1.6 in the mean.
    3. A table has 1 / rms for S / 64, with a significand of 8 bits. 16 and 8 bits make a product
       of 24.
    """

    taken: Format = Format(low=-(2**16 - 1), high=2**16 - 1, fraction_bits=STREAM.fraction_bits)
    coarse_unit = 2.0**4

    def __init__(self, width: int) -> None:
        super().__init__()
        largest = math.isqrt((LARGEST - 1) // width)
        self.coarse = Format(low=-largest, high=largest, fraction_bits=8)
        table = tables.reciprocal_roots(
            width, most_squares=width * largest**2, unit=self.coarse_unit
        )
        self.register_buffer("table", table, persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = floor_clip(x, self.taken, training=self.training)
        with torch.no_grad():
            coarse = (x * (1 / self.coarse_unit)).floor().clamp(self.coarse.low, self.coarse.high)
            # Not a product with a vector of ones, which ONNX Runtime 1.31 computes 12 times slower.
            squares = (coarse * coarse).sum(-1)  # (...)
            # A cast drops the fraction, so it needs no floor.
            index = (squares * (1 / tables.SQUARES_PER_INDEX)).int()
            factor = F.embedding(index, self.table)  # (..., 1)
            normed = x * factor
        if self.training:
            normed = norm_gradient(x, normed, factor)
        return floor_clip(normed, NORMED, training=self.training)


class Attention(nn.Module):
    """Multi-head dot-product attention with dropout on its weights.

    Scores are divided by the power of two that is nearest to the root of K. A softmax weight is
    255 * exp(-gap) / sum, rounded, where `gap` is how far the score is below the best one.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        positions: int,
        dropout: nn.Module,
        weight_bits: int = 8,
        output_keep: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, head_width = heads, width // heads
        self.qkv = Linear(width, 3 * width, reads=NORMED, writes=PROJECTED, weight_bits=weight_bits)
        self.out = Linear(
            width,
            width,
            reads=PROJECTED,
            writes=STREAM,
            weight_bits=weight_bits,
            input_keep=keep_of(dropout),
            output_keep=output_keep,
        )
        self.dropout = dropout
        root_bits = round(math.log2(math.sqrt(head_width)))
        # What 1 in a product of a query and a key is worth, and what brings it to a score: a score
        # counts steps of the table of exponentials. ONNX Runtime makes the scale part of the
        # product; behind the subtraction of the softmax it would be an operation of its own.
        self.nats = 2.0 ** (-2 * PROJECTED.fraction_bits - root_bits)
        self.scale = self.nats * tables.EXPONENTIAL_STEPS
        self.register_buffer("exponentials", tables.exponentials(), persistent=False)
        self.register_buffer("reciprocals", tables.reciprocals(positions), persistent=False)
        self.exponentials: Tensor
        self.reciprocals: Tensor

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D) or (B * T, D) of NORMED -> the same shape, of STREAM.

        mask (B, 1, 1 or T, T): 0 where a query sees a key, at most formats.MASKED where not. Its
        unit is that of a product of a query and a key.
        """
        b, t, d = mask.shape[0], mask.shape[-1], x.shape[-1]
        heads = self.qkv(x).view(b, t, 3 * self.heads, d // self.heads)
        heads = heads.transpose(1, 2)  # (B, 3 H, T, K)
        q, k, v = heads.split(self.heads, dim=1)  # each (B, H, T, K)
        scores = (q @ k.transpose(-2, -1)) * self.scale + mask * self.scale  # (B, H, T, T)
        weights = dropped(self.dropout, self._softmax(scores))
        # The mean without the 1/2 for rounding to nearest: half a unit less everywhere, which the
        # bias of `out` makes up for.
        mixed = floor_clip(
            (weights @ v) * 2.0**-ATTENTION.fraction_bits, PROJECTED, training=self.training
        )
        out = self.out(mixed.transpose(1, 2).reshape(-1, d))
        return out if x.dim() == 2 else out.view(b, t, d)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Scores (B, H, T, T), in steps of the table of exponentials -> weights of the format
        ATTENTION, which are 0 for masked keys.
        """
        with torch.no_grad():
            gap = scores.amax(-1, keepdim=True) - scores
            # A cast drops the fraction, so it needs no floor.
            index = gap.clamp(0, len(self.exponentials) - 1).long()
            # `gather` becomes GatherElements, which takes 1 ns an index in ONNX Runtime 1.31; the
            # Gather of `F.embedding` copies rows and takes 8. Here is an index for each pair of
            # positions.
            shares = self.exponentials.gather(0, index.flatten()).view(index.shape)  # (B, H, T, T)
            reciprocal = F.embedding(shares.sum(-1).int(), self.reciprocals)  # (B, H, T, 1)
            # At most 255.5 * 2^16 in units of 2^-16: 16,744,448.
            weights = (shares * reciprocal + 0.5).floor()
        if self.training:
            weights = softmax_gradient(scores, weights, nats=1 / tables.EXPONENTIAL_STEPS)
        return weights


class Pooling(nn.Module):
    """The mean over real positions: (B, T, D) of NORMED -> (B, 1, D) of the format `writes`.

    A row without a real position has the mean 0.
    """

    def __init__(self, *, positions: int, writes: Format) -> None:
        super().__init__()
        self.writes = writes
        scale = 2.0 ** (writes.fraction_bits - NORMED.fraction_bits)
        table = tables.inverse_counts(positions, scale=scale)
        self.register_buffer("inverse_counts", table, persistent=False)
        self.inverse_counts: Tensor

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x (B, T, D); real (B, T), 1 at a real position and 0 at padding."""
        real = real.unsqueeze(1)  # (B, 1, T)
        inverse = F.embedding(real.sum(-1).int(), self.inverse_counts)  # (B, 1, 1)
        total = real @ x  # (B, 1, D)
        return floor_clip(total * inverse, self.writes, training=self.training)


def freeze(network: nn.Module) -> None:
    """Freeze every layer of a network in eval mode, in place. Its outputs keep every bit.

    The network cannot train any more. Raises ValueError where a sum of these weights could need
    more than 24 bits. What a network adds up by itself, such as a residual stream, is not checked.
    """
    for module in network.modules():
        if isinstance(module, Linear | Embedding):
            module.freeze()
        elif isinstance(module, ClassicDropout):
            module.folded = True


def require_eval(layer: nn.Module) -> None:
    """Raise RuntimeError if a layer is to be frozen that is still in training mode."""
    if layer.training:
        raise RuntimeError("a layer is frozen as it is in eval mode: call .eval() first")


def require_trainable(layer: Linear | Embedding) -> None:
    """Raise RuntimeError for a forward in training mode of a layer that is frozen."""
    if layer.training and layer.is_frozen:
        raise RuntimeError(
            "this layer is frozen and cannot train: keep a copy from before `freeze` for that"
        )
