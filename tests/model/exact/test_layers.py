"""The layers against rational arithmetic: every number that a layer computes is exact.

Inputs are random and extreme integers of each format. Weights are large, so that clips are reached.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor, isqrt

import pytest
import torch
from torch import Tensor, nn

from evalmode.model.dropout import ClassicDropout, Dropout
from evalmode.model.exact import tables
from evalmode.model.exact.formats import (
    HIDDEN,
    LARGEST,
    LOGITS,
    MASKED,
    NORMED,
    PROJECTED,
    STREAM,
    Format,
    SumFormat,
    largest_weight,
    pooled_format,
)
from evalmode.model.exact.gradients import norm_gradient, softmax_gradient
from evalmode.model.exact.layers import Attention, Embedding, Linear, Pooling, RmsNorm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(*shape: int, of: Format, seed: int = 0) -> Tensor:
    """Random integers of a format; the first row holds its extremes."""
    tensor = torch.randint(of.low, of.high + 1, shape, generator=generator(seed)).float()
    tensor[0] = torch.where(
        torch.rand(tensor[0].shape, generator=generator()) < 0.5, of.low, of.high
    )
    return tensor


def rational(tensor: Tensor) -> list:
    """The numbers of a tensor as nested lists of fractions: a float is one exactly."""
    if tensor.dim() == 1:
        return [Fraction(number) for number in tensor.tolist()]
    return [rational(row) for row in tensor]


def clipped(number: Fraction, to: Format) -> int:
    return min(max(floor(number), to.low), to.high)


def linear(reads: Format, writes: Format | SumFormat, *, bits: int = 8, **options) -> Linear:
    torch.manual_seed(3)
    layer = Linear(40, 12, reads=reads, writes=writes, weight_bits=bits, **options).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 40) * torch.logspace(-3, 0, 12).unsqueeze(1))
        layer.bias.normal_(0.0, 0.3)
        layer.weight[5].zero_()
    return layer


LINEARS = [
    (NORMED, PROJECTED),
    (NORMED, HIDDEN),
    (PROJECTED, STREAM),
    (HIDDEN, STREAM),
    (pooled_format(40, weight_bits=8), LOGITS),
]


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("reads", "writes"), LINEARS)
def test_a_linear_layer_gives_the_sums_of_rational_arithmetic(reads, writes, bits):
    layer = linear(reads, writes, bits=bits)
    inputs = integers(6, 40, of=reads)
    weight, bias = layer.rounded()
    weights, biases = rational(weight.detach()), rational(bias.detach())
    for row, outputs in zip(rational(inputs), rational(layer(inputs).detach()), strict=True):
        for column, offset, output in zip(weights, biases, outputs, strict=True):
            total = sum((a * w for a, w in zip(row, column, strict=True)), offset)
            expected = total if isinstance(writes, SumFormat) else clipped(total, writes)
            assert output == expected


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("reads", "writes"), LINEARS)
def test_weights_are_integers_of_so_many_bits_times_a_power_of_two(reads, writes, bits):
    layer = linear(reads, writes, bits=bits)
    weight = layer.rounded()[0].detach().double()
    for row, real in zip(weight, layer.weight.detach().double(), strict=True):
        numbers = [Fraction(number) for number in row.tolist()]
        unit = Fraction(1, max(number.denominator for number in numbers))
        while any(numbers) and all((number / unit) % 2 == 0 for number in numbers):
            unit *= 2
        assert max(abs(number) / unit for number in numbers) <= largest_weight(bits)
        # Rounded to nearest: at most half of the finest unit that the largest weight allows.
        scale = 2.0 ** (reads.fraction_bits - writes.fraction_bits)
        step = float(real.abs().max()) / (largest_weight(bits) + 0.5) * 2
        if isinstance(writes, SumFormat) and writes.grid_bits is not None:
            step = max(step, 2.0 ** (reads.fraction_bits - writes.grid_bits))
        assert (row * scale - real).abs().max() <= step / 2


def test_layers_that_add_to_the_stream_stay_on_its_grid_of_quarters():
    for reads in (PROJECTED, HIDDEN):
        sums = linear(reads, STREAM)(integers(6, 40, of=reads)).detach()
        assert torch.equal(sums * 4, (sums * 4).floor())


@pytest.mark.parametrize(("reads", "writes"), LINEARS)
def test_the_order_of_the_inputs_changes_no_bit(reads, writes):
    layer, inputs = linear(reads, writes), integers(6, 40, of=reads)
    expected = layer(inputs)
    for seed in range(5):
        order = torch.randperm(40, generator=generator(seed))
        other = linear(reads, writes)
        with torch.no_grad():
            other.weight.copy_(layer.weight[:, order])
        assert torch.equal(other(inputs[:, order]), expected)


@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize(("reads", "writes"), LINEARS)
def test_a_frozen_layer_gives_the_same_bits_and_does_not_train(reads, writes, keep):
    layer = linear(reads, writes, input_keep=keep, output_keep=keep)
    inputs = integers(6, 40, of=reads)
    expected, reach = layer(inputs), layer.reach()
    layer.freeze()
    assert torch.equal(layer(inputs), expected)
    assert torch.equal(layer.reach(), reach)
    assert torch.equal(layer.weight, layer.rounded()[0])
    with pytest.raises(RuntimeError, match="frozen and cannot train"):
        layer.train()(inputs)


def test_a_layer_in_training_mode_is_not_frozen():
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        linear(NORMED, HIDDEN).train().freeze()


def test_a_layer_whose_sums_could_exceed_24_bits_is_refused():
    layer = Linear(600, 2, reads=HIDDEN, writes=HIDDEN).eval()
    with torch.no_grad():
        layer.weight.fill_(0.12)
    with pytest.raises(
        ValueError, match=r"a sum of 600 products can reach .* exact up to 16,777,216"
    ):
        layer.freeze()


def test_the_reach_of_a_layer_is_the_largest_sum_that_it_can_have():
    layer = linear(PROJECTED, STREAM)
    weight, bias = layer.rounded()
    signs = torch.where(weight * torch.where(bias < 0, -1, 1).unsqueeze(1) < 0, -1.0, 1.0)
    worst = torch.stack([layer(PROJECTED.largest * row)[i] for i, row in enumerate(signs)])
    assert torch.equal(worst.abs().double(), layer.reach())


def test_a_norm_divides_by_a_root_mean_square_from_its_table():
    width = 24
    norm = RmsNorm(width).eval()
    scales = torch.logspace(-1, 6, 30).unsqueeze(1)
    stream = (torch.randn(30, width, generator=generator()) * scales * 4).round() / 4
    coarse_limit = isqrt((LARGEST - 1) // width)
    factors = [Fraction(number) for number in norm.table.flatten().tolist()]
    for row, outputs in zip(rational(stream), norm(stream).tolist(), strict=True):
        taken = [clipped(number, norm.taken) for number in row]
        coarse = [min(max(number // 16, -coarse_limit), coarse_limit) for number in taken]
        squares = sum(number * number for number in coarse)
        assert squares < LARGEST
        factor = factors[squares // tables.SQUARES_PER_INDEX]
        assert max(abs(number * factor).numerator for number in taken) < LARGEST
        assert outputs == [clipped(number * factor, NORMED) for number in taken]


def test_a_normed_vector_has_a_root_mean_square_of_about_one():
    norm = RmsNorm(96).eval()
    stream = torch.randn(200, 96, generator=generator()) * torch.logspace(1.5, 3.2, 200).unsqueeze(
        1
    )
    means = norm(stream).square().mean(-1).sqrt() * 2.0**-NORMED.fraction_bits
    assert ((means > 0.9) & (means < 1.1)).all()


@pytest.mark.parametrize("width", [1, 16, 96, 1032])
def test_the_entries_of_the_root_table_have_8_bits_and_are_the_nearest(width):
    largest = isqrt((LARGEST - 1) // width)
    table = tables.reciprocal_roots(width, most_squares=width * largest**2, unit=16.0)
    assert len(table) == width * largest**2 // 64 + 1 <= 2**18
    for index in (*range(50), len(table) // 2, len(table) - 1):
        factor = Fraction(table[index].item())
        squared = Fraction(4 * width, 64 * index + 32)  # (32 / 16)^2 / mean square
        significand = factor
        while significand.denominator > 1:
            significand *= 2
        while significand.numerator % 2 == 0:
            significand /= 2
        assert significand < 2**8
        assert abs(factor**2 / squared - 1) < Fraction(1, 100)


def attention(heads: int = 2, positions: int = 9) -> Attention:
    torch.manual_seed(5)
    layer = Attention(16, heads=heads, positions=positions, dropout=Dropout(0.1)).eval()
    with torch.no_grad():
        layer.qkv.weight.normal_(0.0, 0.7)
        layer.out.weight.normal_(0.0, 0.2)
    return layer


def test_attention_gives_the_numbers_of_rational_arithmetic():
    layer, inputs = attention(), integers(2, 9, 16, of=NORMED)
    mask = torch.zeros(2, 1, 1, 9)
    mask[1, ..., 6:] = MASKED
    parts = layer.qkv(inputs).long().view(2, 9, 3, 2, 8)
    exponentials = [int(number) for number in layer.exponentials.flatten()]
    expected = torch.empty(2, 9, 16)
    for b in range(2):
        for h in range(2):
            q, k, v = (parts[b, :, index, h].tolist() for index in range(3))
            for t in range(9):
                scores = [
                    sum(x * y for x, y in zip(q[t], k[s], strict=True)) + int(mask[b, 0, 0, s])
                    for s in range(9)
                ]
                gaps = [max(scores) - score for score in scores]
                # 2^-10 nats a unit, divided by 2^round(log2(sqrt(8))) = 4; 32 indices a nat.
                indices = [min(Fraction(gap, 2**12) * 32 // 1, 200) for gap in gaps]
                shares = [exponentials[int(index)] for index in indices]
                factor = Fraction(layer.reciprocals[sum(shares)].item())
                weights = [floor(share * factor + Fraction(1, 2)) for share in shares]
                assert not any(weights[6:] if b else ())
                for c in range(8):
                    total = sum(w * row[c] for w, row in zip(weights, v, strict=True))
                    expected[b, t, 8 * h + c] = clipped(Fraction(total, 256), PROJECTED)
    assert torch.equal(layer(inputs, mask), layer.out(expected))


def test_the_weights_of_attention_are_close_to_a_softmax_and_sum_to_about_255():
    layer = attention(positions=32)
    scores = torch.randint(-20_000, 20_000, (4, 2, 32, 32), generator=generator()).float()
    weights = layer._softmax(scores * layer.scale)
    assert (weights - 255 * (scores * layer.nats).softmax(-1)).abs().max() < 4.5
    assert (weights.sum(-1) - 255).abs().max() <= 16


def test_the_exponentials_fall_from_255_to_0():
    entries = tables.exponentials().flatten()
    assert entries[0] == 255
    assert entries[-1] == 0
    assert entries[-2] == 1
    assert (entries.diff() <= 0).all()


def test_products_with_the_reciprocals_fit_24_bits():
    entries = [Fraction(number) * 2**16 for number in tables.reciprocals(40).flatten().tolist()]
    assert all(entry.denominator == 1 for entry in entries)
    # No weight exceeds the sum that it is divided by.
    for total, entry in enumerate(entries):
        assert min(total, 255) * entry + 2**15 < LARGEST
        assert total < 255 or abs(entry - Fraction(255 * 2**16, total)) <= Fraction(1, 2)


@pytest.mark.parametrize("positions", [1, 12, 32, 128, 518])
def test_pooling_is_the_mean_of_rational_arithmetic(positions):
    writes = pooled_format(96, weight_bits=8)
    layer = Pooling(positions=positions, writes=writes).eval()
    inputs = integers(3, positions, 4, of=NORMED)
    real = torch.ones(3, positions)
    real[1, (positions + 1) // 2 :] = 0
    real[2] = 0
    assert not layer(inputs, real)[2].any()
    for b in range(2):
        count = int(real[b].sum())
        factor = Fraction(layer.inverse_counts[count].item())
        assert abs(factor * count / 8 - 1) <= Fraction(1, 2**8)
        for c in range(4):
            total = int(inputs[b, :count, c].sum())
            assert Fraction(float(total * float(factor))) == total * factor
            assert layer(inputs, real)[b, 0, c] == clipped(total * factor, writes)
        worst = 128 * positions * factor
        assert Fraction(float(torch.tensor(float(worst)))) == worst


@pytest.mark.parametrize("kind", [Dropout, ClassicDropout])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_an_embedding_is_a_sum_of_integers(groups, kind):
    torch.manual_seed(2)
    layer = Embedding(
        50,
        8,
        positions=6,
        ids_per_position=groups,
        ngram_dropout=kind(0.25),
        dropout=kind(0.5),
    ).eval()
    with torch.no_grad():
        layer.table.weight.mul_(0.5)[0].zero_()
        layer.positions.weight.mul_(0.1)
    ids = torch.randint(0, 50, (3, 6, groups), generator=generator())
    keep = 0.375 if kind is ClassicDropout else 1.0
    rows = (layer.table.weight.detach() * keep * 128 + 0.5).floor().clamp(-127, 127).long()
    positions = (layer.positions.weight.detach() * min(2 * keep, 1.0) * 4096 + 0.5).floor()
    if kind is ClassicDropout:
        positions = (layer.positions.weight.detach() * 0.5 * 4096 + 0.5).floor()
    expected = rows[ids].sum(2) * 32 / groups + positions
    assert torch.equal(layer(ids), expected)
    assert expected.abs().max() <= layer.reach()
    reach = layer.reach()
    layer.freeze()
    assert torch.equal(layer(ids), expected)
    assert layer.reach() == reach


def test_the_norm_has_the_gradient_of_the_real_norm():
    stream = torch.randn(5, 16, dtype=torch.float64, generator=generator()).requires_grad_()
    weights = torch.randn(5, 16, dtype=torch.float64, generator=generator(1))
    factor = 32 / stream.square().mean(-1, keepdim=True).sqrt()
    (expected,) = torch.autograd.grad((stream * factor * weights).sum(), stream)
    exact = norm_gradient(stream, (stream * factor).detach(), factor.detach())
    (gradient,) = torch.autograd.grad((exact * weights).sum(), stream)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_softmax_has_the_gradient_of_the_real_softmax():
    scores = torch.randn(5, 7, dtype=torch.float64, generator=generator()).requires_grad_()
    weights = torch.randn(5, 7, dtype=torch.float64, generator=generator(1))
    softmax = 255 * (0.3 * scores).softmax(-1)
    (expected,) = torch.autograd.grad((softmax * weights).sum(), scores)
    exact = softmax_gradient(scores, softmax.detach(), nats=0.3)
    (gradient,) = torch.autograd.grad((exact * weights).sum(), scores)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_passes_through_a_floor_and_stops_at_a_clip():
    layer = Linear(2, 3, reads=NORMED, writes=HIDDEN).train()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, 0.5], [-0.5, -0.5], [3.0, 3.0]]))
        layer.bias.zero_()
    inputs = torch.tensor([[60.0, 40.0]], requires_grad=True)
    outputs = layer(inputs)
    assert outputs.tolist() == [[50.0, 0.0, 255.0]]
    outputs.sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, layer.rounded()[0][:1])
    assert torch.equal(layer.bias.grad, torch.tensor([32.0, 0.0, 0.0]))


def test_layers_have_no_dropout_of_their_own():
    parts = [*attention().modules()]
    assert [type(part) for part in parts if "drop" in type(part).__name__.lower()] == [Dropout]
    assert not any(isinstance(part, nn.Dropout) for part in parts)
