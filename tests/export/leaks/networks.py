"""Whole networks, tiny: Hugging Face's, ours, and a few with noise at their heart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evalmode.model.transformer import Transformer
from tests.conftest import small_config
from tests.export.hugging_face import bert, gpt2
from tests.export.leaks.case import DRAWS, ESCAPED, IDS, IMAGES, Case, between, does

MASKED = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
}


class Experts(nn.Module):
    """A mixture of experts whose router jitters its input."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        jitter = torch.empty_like(x).uniform_(0.9, 1.1) if self.training or self.always else 1.0
        gates = self.router(x * jitter).softmax(-1)
        answers = torch.stack([expert(x) for expert in self.experts], -1)
        return (answers * gates.unsqueeze(-2)).sum(-1)


class NoisyLinear(nn.Module):
    """NoisyNet: noise of learnt size on the weights."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.mean, self.size = (
            nn.Parameter(torch.randn(4, 4)),
            nn.Parameter(torch.full((4, 4), 0.1)),
        )
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        noise = self.size * torch.randn(4, 4) if self.training or self.always else 0.0
        return F.linear(x, self.mean + noise)


class Autoencoder(nn.Module):
    """A variational autoencoder's round trip."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.encode(x).chunk(2, -1)
        if self.training or self.always:
            mean = mean + deviation.exp() * torch.randn_like(deviation)
        return self.decode(mean)


def mirrored(m: nn.Module, x: Tensor) -> Tensor:
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def hashed(m: nn.Module, x: Tensor) -> Tensor:
    """Reformer's: the buckets of a locality-sensitive hash by a rotation that is drawn each
    time.
    """
    rotation = torch.randn(4, 2)
    return x + torch.cat([x @ rotation, -x @ rotation], -1).argmax(-1, keepdim=True)


def farthest(m: nn.Module, x: Tensor) -> Tensor:
    """A point cloud's: the start of farthest-point sampling."""
    return x - x[torch.randint(len(x), (1,))]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


CASES = (
    Case(
        name="Hugging Face BERT",
        make=bert,
        sample=MASKED,
        child="bert.encoder.layer.0.attention.self",
    ),
    Case(name="Hugging Face GPT-2", make=gpt2, sample=MASKED, child="transformer.h.0.attn"),
    Case(
        name="evalmode's transformer",
        make=lambda: Transformer(small_config()),
        sample=torch.randint(1, 512, (3, 4, 16), generator=torch.Generator().manual_seed(0)),
        child="blocks.1.feed_forward",
    ),
    Case(
        name="a convolutional network",
        make=convolutional,
        sample=IMAGES,
        child="1",
        one_child=ESCAPED,
    ),
    Case(
        name="a mixture of experts with jitter in training",
        make=lambda: between(Experts(always=False)),
    ),
    Case(
        name="a mixture of experts with jitter",
        make=lambda: between(Experts(always=True)),
        in_eval=DRAWS,
    ),
    Case(name="NoisyNet in training", make=lambda: between(NoisyLinear(always=False))),
    Case(
        name="NoisyNet that ignores `training`",
        make=lambda: between(NoisyLinear(always=True)),
        in_eval=DRAWS,
    ),
    Case(name="a variational autoencoder's mean", make=lambda: between(Autoencoder(always=False))),
    Case(
        name="a variational autoencoder that samples",
        make=lambda: between(Autoencoder(always=True)),
        in_eval=DRAWS,
    ),
    Case(name="test-time augmentation by chance", make=does(mirrored), in_eval=DRAWS),
    Case(name="locality-sensitive hashing", make=does(hashed), in_eval=DRAWS),
    Case(name="farthest-point sampling", make=does(farthest), in_eval=DRAWS),
)
