"""Layers of torch's own that draw, or that work otherwise, in training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, disable_observer
from torch.nn.utils import parametrizations, prune

from tests.export.leaks.case import (
    DRAWS,
    DROPS,
    ESCAPED,
    IMAGES,
    NO_EXPORT,
    ROWS,
    STEPS,
    Answer,
    Case,
    between,
    does,
)


class First(nn.Module):
    """A recurrent layer's answers without its last states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Seq2Seq(nn.Module):
    """A layer that reads a target and a memory, given one sequence as both."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def block(kind: type[nn.Module], **sizes: int) -> nn.Module:
    return kind(4, 2, dim_feedforward=8, dropout=0.3, batch_first=True, **sizes)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.3, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def transformer() -> nn.Module:
    return Seq2Seq(
        nn.Transformer(
            4,
            2,
            num_encoder_layers=1,
            num_decoder_layers=1,
            dim_feedforward=8,
            dropout=0.3,
            batch_first=True,
        )
    )


def attends(dropout: Callable[[nn.Module], float]) -> Answer:
    return lambda m, x: F.scaled_dot_product_attention(
        *[x.unsqueeze(1)] * 3, dropout_p=dropout(m)
    ).squeeze(1)


def images(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm(), nn.ReLU())


def rows(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: between(norm())


def trained(layer: nn.Module) -> nn.Module:
    """The layer with running statistics that are not those of a batch."""
    layer.running_mean.fill_(0.5)  # type: ignore[union-attr]
    return layer


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 4))


def old_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(16, 16))


def pruned() -> nn.Module:
    network = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1), nn.Linear(32, 4))
    prune.l1_unstructured(network[0], "weight", amount=0.5)
    prune.random_unstructured(network[2], "weight", amount=0.5)
    return network


class Causal(nn.Module):
    """Self-attention under a triangular mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return self.drop((q @ k.transpose(1, 2) + self.mask).softmax(-1)) @ v


def fake_quantised(*, observing: bool) -> nn.Module:
    network = between(
        FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    )
    network(2 * ROWS)
    if not observing:
        network.apply(disable_observer)
    return network


MODES = {"in_train": ESCAPED}

CASES = (
    Case(
        name="`nn.RReLU`",
        make=rows(nn.RReLU),
        in_train=DROPS,
    ),
    Case(
        name="`F.rrelu(x, training=True)`",
        make=does(lambda m, x: F.rrelu(x, training=True)),
        in_eval=DRAWS,
    ),
    Case(
        name="`nn.FractionalMaxPool2d`",
        make=images(functools.partial(nn.FractionalMaxPool2d, 2, output_size=4)),
        sample=IMAGES,
        in_eval=DRAWS,
    ),
    Case(
        name="`nn.MultiheadAttention`",
        make=lambda: between(Attention(weights=True)),
        sample=STEPS,
        child="1.attention",
    ),
    Case(
        name="`nn.MultiheadAttention` without weights",
        make=lambda: between(Attention(weights=False)),
        sample=STEPS,
        child="1.attention",
    ),
    Case(
        name="`nn.TransformerEncoderLayer`",
        make=lambda: block(nn.TransformerEncoderLayer),
        sample=STEPS,
        child="dropout1",
    ),
    Case(name="`nn.TransformerEncoder`", make=encoder, sample=STEPS, child="layers.0.dropout2"),
    Case(
        name="`nn.TransformerDecoderLayer`",
        make=lambda: Seq2Seq(block(nn.TransformerDecoderLayer)),
        sample=STEPS,
        child="layer.multihead_attn",
    ),
    Case(
        name="`nn.Transformer`",
        make=transformer,
        sample=STEPS,
        child="layer.decoder.layers.0.dropout3",
    ),
    Case(
        name="`nn.LSTM(num_layers=2, dropout=.3)`",
        make=lambda: First(nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True)),
        sample=STEPS[:, :2],
        child="layer",
    ),
    Case(
        name="`nn.GRU(num_layers=2, dropout=.3)`",
        make=lambda: First(nn.GRU(4, 4, num_layers=2, dropout=0.3, batch_first=True)),
        sample=STEPS[:, :2],
        child="layer",
    ),
    Case(
        name="`nn.RNN(num_layers=2, dropout=.3)`",
        make=lambda: First(nn.RNN(4, 4, num_layers=2, dropout=0.3, batch_first=True)),
        sample=STEPS[:, :2],
        child="layer",
    ),
    Case(
        name="`F.scaled_dot_product_attention(dropout_p=.3)`",
        make=does(attends(lambda m: 0.3)),
        sample=STEPS,
        in_eval=DRAWS,
    ),
    Case(
        name="`F.scaled_dot_product_attention(dropout_p=.3 if self.training else 0.)`",
        make=does(attends(lambda m: 0.3 if m.training else 0.0)),
        sample=STEPS,
    ),
    Case(name="`nn.BatchNorm1d`", make=rows(lambda: trained(nn.BatchNorm1d(4))), **MODES),
    Case(
        name="`nn.BatchNorm2d`",
        make=images(lambda: trained(nn.BatchNorm2d(4))),
        sample=IMAGES,
        **MODES,
    ),
    Case(
        name="`nn.SyncBatchNorm`",
        make=images(lambda: trained(nn.SyncBatchNorm(4))),
        sample=IMAGES,
        **MODES,
    ),
    Case(
        name="`nn.BatchNorm2d(track_running_stats=False)`",
        make=images(lambda: nn.BatchNorm2d(4, track_running_stats=False)),
        sample=IMAGES,
        in_eval=("training-mode", "batch-invariance"),
        though_quiet="a row's answer depends on its neighbours",
        **MODES,
    ),
    Case(
        name="`F.batch_norm(training=True)`",
        make=does(
            lambda m, x: F.batch_norm(x, m.mean, m.var, training=True),
            mean=torch.ones(4),
            var=torch.ones(4),
        ),
        in_eval=("parity",),
        though_quiet="it normalises by the batch, the exporter by what was learnt",
        **MODES,
    ),
    Case(
        name="`nn.InstanceNorm2d`",
        make=images(lambda: nn.InstanceNorm2d(4)),
        sample=IMAGES,
        **MODES,
    ),
    Case(
        name="`nn.InstanceNorm2d(track_running_stats=True)`",
        make=images(lambda: trained(nn.InstanceNorm2d(4, track_running_stats=True))),
        sample=IMAGES,
        **MODES,
    ),
    Case(name="`nn.LayerNorm`", make=rows(lambda: nn.LayerNorm(4)), **MODES),
    Case(name="`nn.GroupNorm`", make=images(lambda: nn.GroupNorm(2, 4)), sample=IMAGES, **MODES),
    Case(
        name="`parametrizations.spectral_norm`",
        make=lambda: between(parametrizations.spectral_norm(nn.Linear(16, 16)), 16),
        sample=torch.randn(3, 16, generator=torch.Generator().manual_seed(0)),
        in_train=DROPS,
    ),
    Case(
        name="`nn.utils.spectral_norm`",
        make=lambda: between(old_spectral_norm(), 16),
        sample=torch.randn(3, 16, generator=torch.Generator().manual_seed(0)),
        in_train=DROPS,
    ),
    Case(
        name="`parametrizations.weight_norm`",
        make=rows(lambda: parametrizations.weight_norm(nn.Linear(4, 4))),
        **MODES,
    ),
    Case(name="`nn.utils.weight_norm`", make=rows(old_weight_norm), **MODES),
    Case(
        name="a pruned network",
        make=pruned,
        sample=torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),
    ),
    Case(name="attention under a causal mask", make=Causal, sample=STEPS, child="drop"),
    Case(
        name="fake quantisation, its observer off",
        make=lambda: fake_quantised(observing=False),
        in_eval=NO_EXPORT,
        though_quiet="torch's exporter cannot follow its switches",
        **MODES,
    ),
    Case(
        name="fake quantisation that still observes",
        make=lambda: fake_quantised(observing=True),
        in_eval=DRAWS,
        in_train=DROPS,
    ),
)
