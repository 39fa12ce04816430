"""Both dropouts against their law: equal bits where bits are promised, else exact statistics."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from evalmode.model.dropout import ClassicDropout, Dropout, fold

KINDS = [Dropout, ClassicDropout]
RATES = [0.1, 0.5, 0.9]


def tail(successes: int, *, trials: int, probability: float) -> float:
    """P(a binomial count is at least as far from its mean as `successes`).

    The terms of the sum are computed in log space, because the coefficients overflow.
    """
    mean = trials * probability
    distance = abs(successes - mean)

    def weight(count: int) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
        return math.exp(
            ways + count * math.log(probability) + (trials - count) * math.log1p(-probability)
        )

    return sum(weight(count) for count in range(trials + 1) if abs(count - mean) >= distance - 1e-9)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_survivors_is_binomial(kind, p):
    torch.manual_seed(0)
    trials = 20_000
    survivors = int((kind(p)(torch.ones(trials)) != 0).sum())
    # The seed is fixed, so the test never fails by chance.
    assert tail(survivors, trials=trials, probability=1 - p) > 1e-3


@pytest.mark.parametrize("p", RATES)
def test_a_survivor_of_inverted_dropout_is_exactly_x_over_keep(p):
    torch.manual_seed(1)
    x = torch.randn(4096)
    y = Dropout(p)(x)
    survived = y != 0
    assert 0 < int(survived.sum()) < 4096
    assert torch.equal(y[survived], (x / (1 - p))[survived])


def test_a_survivor_of_classic_dropout_is_exactly_x_and_eval_is_exactly_keep_times_x():
    torch.manual_seed(1)
    x, dropout = torch.randn(4096), ClassicDropout(0.3)
    y = dropout(x)
    assert torch.equal(y[y != 0], x[y != 0])
    assert torch.equal(dropout.eval()(x), x * 0.7)


@pytest.mark.parametrize(("kind", "scale"), [(Dropout, 0.5), (ClassicDropout, 1.0)])
def test_the_gradient_flows_through_the_mask_of_the_forward_pass(kind, scale):
    torch.manual_seed(2)
    x = torch.randn(1000).abs().add(1.0).requires_grad_()
    y = kind(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (y != 0).float() / scale)


def test_eval_returns_the_input_itself():
    x = torch.randn(8)
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_returns_the_input_itself_in_training_too(kind):
    x = torch.randn(8)
    assert kind(0.0)(x) is x


@pytest.mark.parametrize("p", RATES)
def test_the_number_of_survivors_is_distributed_as_in_torch(p):
    torch.manual_seed(3)
    rows, width = 4000, 16
    ours, theirs = (
        (module(torch.ones(rows, width)) != 0).sum(1).bincount(minlength=width + 1).double()
        for module in (Dropout(p), nn.Dropout(p))
    )
    # Two-sample chi-square over how many of 16 survive; bins that neither fills often are left out.
    common = ours + theirs >= 10
    statistic = float(((ours - theirs) ** 2 / (ours + theirs))[common].sum())
    freedom = int(common.sum()) - 1
    assert statistic < freedom + 3.5 * math.sqrt(2 * freedom)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(4)
    pairs = (Dropout(0.5)(torch.ones(20_000)) != 0).view(-1, 2)
    pairs_of_survivors = int(pairs.all(1).sum())
    assert tail(pairs_of_survivors, trials=10_000, probability=0.25) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_has_the_dtype_of_the_input(kind, dtype):
    torch.manual_seed(5)
    x = torch.ones(20_000, dtype=dtype)
    y = kind(0.1)(x)
    assert y.dtype == dtype
    assert tail(int((y != 0).sum()), trials=20_000, probability=0.9) > 1e-3
    assert kind(0.1).eval()(x).dtype == dtype


def test_a_dropped_infinity_or_nan_is_zero():
    torch.manual_seed(6)
    y = Dropout(0.5)(torch.full((64,), math.inf))
    assert bool(((y == 0) | (y == math.inf)).all())
    assert bool((y == 0).any())


def test_torch_manual_seed_decides_the_mask():
    x = torch.ones(512)
    draws = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5)(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_outside_its_range_is_refused_by_name_and_value(kind, p):
    with pytest.raises(ValueError, match=rf"p=.*{p!r}"):
        kind(p)


def test_repr_shows_the_rate():
    assert repr(Dropout(0.25)) == "Dropout(p=0.25)"
    assert repr(ClassicDropout(0.25)) == "ClassicDropout(p=0.25, folded=False)"


@pytest.mark.parametrize("side", ["following", "preceding"])
def test_folding_moves_the_eval_factor_into_the_neighbour_and_the_outputs_stay_equal(side):
    torch.manual_seed(9)
    before, after, dropout = nn.Linear(16, 16), nn.Linear(16, 16), ClassicDropout(0.3)
    net = nn.Sequential(before, dropout, after).eval()
    x = torch.randn(32, 16)
    expected = net(x)
    fold(dropout, **{side: [after if side == "following" else before]})
    h = before(x)
    assert dropout(h) is h
    torch.testing.assert_close(net(x), expected)


def test_a_folded_dropout_refuses_to_train_and_to_fold_twice():
    dropout, linear = ClassicDropout(0.3), nn.Linear(4, 4)
    fold(dropout, following=[linear])
    with pytest.raises(RuntimeError, match="cannot train"):
        dropout.train()(torch.ones(4))
    with pytest.raises(ValueError, match="folded already"):
        fold(dropout, following=[linear])


@pytest.mark.parametrize(
    "sides", [{}, {"following": [nn.Linear(2, 2)], "preceding": [nn.Linear(2, 2)]}]
)
def test_folding_needs_exactly_one_side(sides):
    with pytest.raises(ValueError, match="one side"):
        partial(fold, ClassicDropout(0.5), **sides)()
