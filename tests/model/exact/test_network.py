"""The exact network: no padding, neighbour, thread or precision changes a bit of its logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from evalmode.model.config import TransformerConfig
from evalmode.model.dropout import ClassicDropout, Dropout
from evalmode.model.exact.network import ExactTransformer
from evalmode.model.transformer import Transformer
from tests.model.small_networks import RATES, small_config, small_network

SHAPES = [
    {"ids_per_position": 4},
    {"ids_per_position": 1},
    {"ids_per_position": 1, "causal": True},
    {"ids_per_position": 16, "weight_bits": 7, "width": 24, "heads": 3, "layers": 3},
    {"ids_per_position": 4, "dropout_kind": "classic", "causal": True, "ngram_dropout": 0.4},
]


def config(**changes) -> TransformerConfig:
    return small_config(**({"arithmetic": "exact"} | changes))


def small(**changes) -> ExactTransformer:
    """A network with large random weights; `changes` are fields of its shape."""
    return small_network(arithmetic="exact", **changes).eval()


def frozen(network: ExactTransformer) -> ExactTransformer:
    network = copy.deepcopy(network)
    network.freeze()
    return network


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_frozen_network_gives_the_bits_of_the_trainable_one_and_of_float64(shape):
    network, ids = small(**shape), ids_of(7, 9, shape["ids_per_position"])
    expected = network(ids)
    assert len(expected.unique()) > 10
    assert torch.equal(frozen(network)(ids), expected)
    assert torch.equal(frozen(network).double()(ids), expected.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_padding(shape):
    network, groups = frozen(small(**shape)), shape["ids_per_position"]
    ids = ids_of(6, 9, groups)
    ids[1:, 5:] = 0
    expected = network(ids)
    for row in range(6):
        assert torch.equal(network(ids[row : row + 1]), expected[row : row + 1])
    assert torch.equal(network(ids.flip(0)), expected.flip(0))
    assert torch.equal(network(ids.repeat(9, 1, 1)), expected.repeat(9, 1))
    assert torch.equal(network(ids[1:, :5]), expected[1:])
    padded = torch.cat([ids, torch.zeros(6, 3, groups, dtype=torch.int64)], dim=1)
    assert torch.equal(network(padded), expected)


def test_the_number_of_threads_changes_no_bit():
    network, ids = frozen(small(width=96, heads=4, feed_forward=192)), ids_of(64, 12, 1)
    before = torch.get_num_threads()
    try:
        logits = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            logits.append(network(ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*logits)


def test_a_mask_of_the_nonzero_ids_gives_the_same_bits_as_no_mask():
    network, ids = frozen(small()), ids_of(2, 8)
    ids[1, 5:] = 0
    assert torch.equal(network(ids, (ids != 0).long()), network(ids))


def test_a_position_of_a_causal_network_sees_only_itself_and_the_past():
    network, ids = small(causal=True), ids_of(1, 10, 1)
    real = torch.ones(1, 10)
    before = network.hidden(ids, real)
    for changed in range(10):
        other = ids.clone()
        other[0, changed] = ids[0, changed] % 49 + 1
        differs = (network.hidden(other, real) != before).any(-1)[0]
        assert not differs[:changed].any()
        assert differs[changed]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_of_padding_has_finite_logits(causal, training):
    logits = small(causal=causal).train(training)(torch.zeros(2, 4, dtype=torch.int64))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_all_rates_zero_training_gives_the_bits_of_eval(shape):
    network = small(**(shape | dict.fromkeys(RATES, 0.0)))
    ids = ids_of(3, 6, shape["ids_per_position"])
    assert torch.equal(network.train()(ids), network.eval()(ids))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", ["inverted", "classic"])
def test_each_site_drops_in_training_alone(rate, kind):
    rates = dict.fromkeys(RATES, 0.0) | {rate: 0.5}
    network = small(ids_per_position=4, dropout_kind=kind, **rates)
    ids = ids_of(3, 6, 4)
    torch.manual_seed(1)
    assert not torch.equal(network.train()(ids), network(ids))
    assert torch.equal(network.eval()(ids), network(ids))


@pytest.mark.parametrize("kind", ["inverted", "classic"])
def test_it_drops_where_the_float32_network_does(kind):
    shape = config(dropout_kind=kind, ngram_dropout=0.3)
    sites = [
        {
            name: (type(part), part.p)
            for name, part in network.named_modules()
            if isinstance(part, Dropout | ClassicDropout)
        }
        for network in (
            ExactTransformer(shape),
            Transformer(config(dropout_kind=kind, ngram_dropout=0.3, arithmetic="float32")),
        )
    ]
    assert sites[0] == sites[1]
    assert len(sites[0]) == 2 + 4 * 2


def test_the_eval_factors_of_classic_dropout_are_in_the_weights():
    rates = dict.fromkeys(RATES, 0.5)
    network = small(ids_per_position=4, dropout_kind="classic", **rates)
    halved = small(ids_per_position=4, **dict.fromkeys(RATES, 0.0))
    with torch.no_grad():
        halved.embedding.table.weight.mul_(0.25)
        halved.embedding.positions.weight.mul_(0.5)
        for block in halved.blocks:
            for layer in (block.attention.out, block.feed_forward.down):
                layer.weight.mul_(0.25)
                layer.bias.mul_(0.5)
    ids = ids_of(4, 9, 4)
    assert torch.equal(network(ids), halved(ids))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_parameter_gets_a_gradient(shape):
    network = small(**shape).train()
    network(ids_of(16, 9, shape["ids_per_position"])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not network.embedding.table.weight.grad[0].any()


def test_a_frozen_network_refuses_to_train():
    network = frozen(small())
    with pytest.raises(RuntimeError, match="frozen and cannot train"):
        network.train()(ids_of(2, 5))


def test_a_stream_that_could_exceed_24_bits_is_refused():
    network = small(layers=2)
    with torch.no_grad():
        for block in network.blocks:
            block.attention.out.weight.fill_(30.0)
    with pytest.raises(ValueError, match=r"the residual stream can reach .*16,777,216"):
        network.freeze()
    network.train()
    network(ids_of(2, 5))  # it was left as it was


def test_an_exact_network_needs_an_exact_configuration():
    with pytest.raises(ValueError, match="arithmetic='float32'"):
        ExactTransformer(config(arithmetic="float32"))
