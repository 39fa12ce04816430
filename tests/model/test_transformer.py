"""The network: which positions see which, what padding may change, and where it drops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evalmode.model.dropout import ClassicDropout, Dropout
from tests.model.small_networks import RATES, small_network


def ids_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed))


def test_a_position_of_a_causal_network_sees_only_itself_and_the_past():
    network, ids = small_network(causal=True).eval(), ids_of(1, 10, 1)
    real = torch.ones(1, 10, dtype=torch.bool)
    before = network.hidden(ids, real)
    for changed in range(10):
        other = ids.clone()
        other[0, changed] = ids[0, changed] % 49 + 1
        differs = (network.hidden(other, real) != before).any(-1)[0]
        assert not differs[:changed].any()
        assert differs[changed:].all()


def test_each_position_of_a_bidirectional_network_sees_all_positions():
    network, ids = small_network().eval(), ids_of(1, 10, 1)
    real = torch.ones(1, 10, dtype=torch.bool)
    other = ids.clone()
    other[0, 9] = ids[0, 9] % 49 + 1
    assert (network.hidden(other, real) != network.hidden(ids, real)).any(-1).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_padding_changes_logits_only_by_rounding(groups, causal):
    network, ids = (
        small_network(ids_per_position=groups, causal=causal).eval(),
        ids_of(3, 7, groups),
    )
    padded = torch.cat([ids, torch.zeros(3, 5, groups, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(network(padded), network(ids), rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_nonzero_ids_gives_the_same_bits_as_no_mask():
    network, ids = small_network().eval(), ids_of(2, 8)
    ids[1, 5:] = 0
    assert torch.equal(network(ids, (ids != 0).long()), network(ids))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_of_padding_has_finite_logits(causal, training):
    network = small_network(causal=causal).train(training)
    logits = network(torch.zeros(2, 4, dtype=torch.int64))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["inverted", "classic"])
def test_with_all_rates_zero_training_gives_the_logits_of_eval(kind):
    network = small_network(ids_per_position=4, dropout_kind=kind, **dict.fromkeys(RATES, 0.0))
    ids = ids_of(3, 6, 4)
    torch.testing.assert_close(network.train()(ids), network.eval()(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", RATES)
def test_each_site_drops_at_its_own_rate(site):
    network = small_network(ids_per_position=4, **(dict.fromkeys(RATES, 0.0) | {site: 0.5}))
    dropping = [
        module for module in network.modules() if isinstance(module, Dropout) and module.p > 0
    ]
    assert len(dropping) == {"ngram_dropout": 1, "embedding_dropout": 1, "residual_dropout": 4}.get(
        site, 2
    )
    ids = ids_of(3, 6, 4)
    assert not torch.equal(network.train()(ids), network(ids))


def test_attention_dropout_acts_on_the_weights_after_the_softmax():
    network, inputs_of_site = small_network(attention_dropout=0.5), []
    site = network.blocks[0].attention.dropout
    site.register_forward_pre_hook(lambda _, inputs: inputs_of_site.append(inputs[0]))
    network.train()(ids_of(2, 6))
    (weights,) = inputs_of_site
    assert weights.shape == (2, 2, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6))


def test_a_folded_network_gives_the_logits_of_the_unfolded_one():
    network = small_network(
        ids_per_position=4, dropout_kind="classic", ngram_dropout=0.4, residual_dropout=0.3
    ).eval()
    ids = ids_of(4, 9, 4)
    expected = network(ids)
    network.fold_classic_dropout()
    torch.testing.assert_close(network(ids), expected, rtol=1e-4, atol=1e-5)
    assert all(module.folded for module in network.modules() if isinstance(module, ClassicDropout))


def test_the_table_gets_the_gradient_of_autograd():
    network, ids = small_network(ids_per_position=4, **dict.fromkeys(RATES, 0.0)), ids_of(3, 6, 4)
    ids[0, 3:] = 0
    gradients = []
    for training in (True, False):
        network.train(training).zero_grad()
        network(ids).square().sum().backward()
        gradients.append(network.embedding.table.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert not gradients[0][0].any()


def test_an_invalid_shape_is_refused_by_key_and_value():
    with pytest.raises(ValueError, match=r"heads must be a divisor of width=16, got heads=3"):
        small_network(heads=3)
    with pytest.raises(ValueError, match=r"labels must be at least 2.*labels=1"):
        small_network(labels=1)


def test_the_network_contains_no_dropout_of_torch():
    assert not any(isinstance(module, nn.Dropout) for module in small_network().modules())
