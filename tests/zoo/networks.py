"""Networks written by hand: what one finds in notebooks and repositories rather than in a
library.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.zoo.entry import Sample, Sizes, entry
from tests.zoo.samples import (
    FRESH_ROWS,
    FRESH_TEXTS,
    ROWS,
    TEXTS,
    VOCABULARY,
    images,
    images_of_any_size,
    text,
    token_ids,
    unpadded_positions,
)

_WIDTH = 32
_IMAGES: Sizes = ((3, 24, 40), (2, 40, 48))
_FRESH_IMAGES: Sizes = ((1, 48, 24), (4, 56, 64))


class DropPath(nn.Module):
    """Leaves out a residual branch for whole rows, with probability `rate`, while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the branch adds nothing at first."""

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(rate)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(x + self.drop_path(branch))


class ResNet(nn.Module):
    """A residual network whose branches are left out at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*[ResidualBlock(8, 0.1 * index) for index in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))


@entry(
    "convolutional",
    images_of_any_size(),
    sizes=_IMAGES,
    fresh_sizes=_FRESH_IMAGES,
    as_built=True,
    everyday=True,
)
def resnet_whose_branches_are_zero() -> nn.Module:
    return ResNet()


@entry("convolutional", images_of_any_size(), sizes=_IMAGES, fresh_sizes=_FRESH_IMAGES)
def resnet_with_drop_path() -> nn.Module:
    return ResNet()


class TemporalBlock(nn.Module):
    """Causal convolutions with holes, weight norm and channel-wise dropout."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        conv = nn.Conv1d(channels, channels, 3, padding=self.padding, dilation=dilation)
        self.conv = nn.utils.parametrizations.weight_norm(conv)
        self.drop = nn.Dropout1d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)[..., : -self.padding]
        return x + self.drop(F.relu(out))


class TemporalConvolutions(nn.Module):
    """A network of causal convolutions over a series of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(4, _WIDTH, 1)
        self.blocks = nn.Sequential(*[TemporalBlock(_WIDTH, 2**level) for level in range(3)])
        self.outlet = nn.Conv1d(_WIDTH, 2, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.outlet(self.blocks(self.inlet(series.transpose(1, 2)))).transpose(1, 2)


def _series(generator: Generator, rows: int, length: int) -> Sample:
    return {"series": torch.randn(rows, length, 4, generator=generator)}


@entry("convolutional", _series, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def temporal_convolutions() -> nn.Module:
    return TemporalConvolutions()


class UNet(nn.Module):
    """Down, up, and the fine details past the bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = self._convolutions(3, 8)
        self.coarse = self._convolutions(8, 16)
        self.bottom = self._convolutions(16, 32)
        self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.mixed1 = self._convolutions(32, 16)
        self.up2 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.mixed2 = self._convolutions(16, 8)
        self.drop = nn.Dropout2d(0.3)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _convolutions(inlet: int, outlet: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inlet, outlet, 3, padding=1), nn.BatchNorm2d(outlet), nn.ReLU()
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        fine = self.fine(pixel_values)
        coarse = self.coarse(F.max_pool2d(fine, 2))
        bottom = self.drop(self.bottom(F.max_pool2d(coarse, 2)))
        mixed = self.mixed1(torch.cat([self.up1(bottom), coarse], dim=1))
        logits = self.head(self.mixed2(torch.cat([self.up2(mixed), fine], dim=1)))
        return {"logits": logits, "classes": logits.argmax(1)}


@entry("convolutional", images_of_any_size(), sizes=_IMAGES, fresh_sizes=_FRESH_IMAGES)
def u_net() -> nn.Module:
    return UNet()


class SqueezeExcite(nn.Module):
    """Weighs the channels by their means over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * weights.sigmoid()


@entry("convolutional", images_of_any_size(name="input"), sizes=_IMAGES, fresh_sizes=_FRESH_IMAGES)
def squeeze_and_excite() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        SqueezeExcite(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )


class TextConvolutions(nn.Module):
    """Kim's classifier: convolutions of several widths, each reduced to its largest answer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(_WIDTH, 8, width, padding=width - 1) for width in (2, 3, 4)
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).transpose(1, 2)
        pooled = [F.relu(convolution(x)).amax(-1) for convolution in self.convolutions]
        return self.head(self.drop(torch.cat(pooled, dim=1)))


def _ids(generator: Generator, rows: int, length: int) -> Sample:
    unpadded = unpadded_positions(generator, rows, length, side="right")
    return {"input_ids": token_ids(generator, unpadded, pad=0)}


@entry("convolutional", _ids, sizes=TEXTS, fresh_sizes=FRESH_TEXTS, everyday=True)
def text_convolutions() -> nn.Module:
    return TextConvolutions()


class Tagger(nn.Module):
    """Two bidirectional LSTM layers with dropout between them, and a label for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        self.lstm = nn.LSTM(
            _WIDTH, 16, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True
        )
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        states, _ = self.lstm(self.drop(self.embedding(input_ids)))
        logits = self.head(self.drop(states))
        return {"logits": logits, "labels": logits.argmax(-1)}


@entry("recurrent", _ids, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def lstm_tagger() -> nn.Module:
    return Tagger()


class Forecaster(nn.Module):
    """A GRU over a series, whose last state gives the next numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, _WIDTH, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(_WIDTH, 4)

    def forward(self, series: Tensor) -> Tensor:
        states, _ = self.gru(series)
        return self.head(states[:, -1])


@entry("recurrent", _series, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gru_forecaster() -> nn.Module:
    return Forecaster()


class Encoder(nn.Module):
    """torch's own encoder with a padding mask, which takes its fused way in use."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, 4, 48, dropout=0.1, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, input_ids: Tensor, padding: Tensor) -> Tensor:
        states = self.encoder(self.embedding(input_ids), src_key_padding_mask=padding)
        weights = (~padding).unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


class TokenEncoder(Encoder):
    """The same with an answer for each token."""

    def forward(self, input_ids: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(input_ids), src_key_padding_mask=padding))


def _padded(generator: Generator, rows: int, length: int) -> Sample:
    unpadded = unpadded_positions(generator, rows, length, side="right")
    return {"input_ids": token_ids(generator, unpadded, pad=0), "padding": ~unpadded}


def _not_padding(sample: Mapping[str, Tensor]) -> Tensor:
    return ~sample["padding"]


@entry("attention", _padded, sizes=TEXTS, fresh_sizes=FRESH_TEXTS, visible=_not_padding)
def torch_encoder_that_classifies() -> nn.Module:
    return Encoder(norm_first=False)


@entry("attention", _padded, sizes=TEXTS, fresh_sizes=FRESH_TEXTS, visible=_not_padding)
def torch_encoder_with_norm_first() -> nn.Module:
    return TokenEncoder(norm_first=True)


@entry("attention", _padded, sizes=TEXTS, fresh_sizes=FRESH_TEXTS, visible=_not_padding)
def torch_encoder_of_tokens() -> nn.Module:
    return TokenEncoder(norm_first=False)


class Decoder(nn.Module):
    """torch's own decoder over a memory, under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        layer = nn.TransformerDecoderLayer(_WIDTH, 4, 48, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(_WIDTH, VOCABULARY)

    def forward(self, target_ids: Tensor, memory: Tensor) -> Tensor:
        length = target_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=target_ids.device).triu(1)
        return self.head(self.decoder(self.embedding(target_ids), memory, tgt_mask=causal))


def _with_memory(generator: Generator, rows: int, length: int, target_length: int) -> Sample:
    return {
        "target_ids": torch.randint(VOCABULARY, (rows, target_length), generator=generator),
        "memory": torch.randn(rows, length, _WIDTH, generator=generator),
    }


@entry(
    "attention", _with_memory, sizes=((3, 9, 6), (2, 14, 11)), fresh_sizes=((4, 7, 5), (1, 13, 10))
)
def torch_decoder() -> nn.Module:
    return Decoder()


class LanguageModel(nn.Module):
    """torch's own encoder under a causal mask: the language model of torch's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        layer = nn.TransformerEncoderLayer(_WIDTH, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(_WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.encoder(self.embedding(input_ids), mask=causal))


@entry("attention", _ids, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def torch_encoder_under_a_causal_mask() -> nn.Module:
    return LanguageModel()


class MixerBlock(nn.Module):
    """Mixes the positions and then the channels."""

    def __init__(self, positions: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.places = self._two_layers(positions)
        self.channels = self._two_layers(channels)

    @staticmethod
    def _two_layers(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-Mixer over the patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _WIDTH, 8, stride=8)
        self.blocks = nn.Sequential(MixerBlock(16, _WIDTH), MixerBlock(16, _WIDTH))
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return self.head(self.blocks(patches).mean(1))


@entry("perceptron", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS, everyday=True)
def mlp_mixer() -> nn.Module:
    return Mixer()


class Tabular(nn.Module):
    """Categories and numbers of a table, with the noises that table networks like."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count, 4) for count in (7, 5, 9))
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.Sequential(
            nn.Linear(18, _WIDTH),
            nn.SELU(),
            nn.AlphaDropout(0.1),
            nn.Linear(_WIDTH, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(16, 1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        columns = [
            embedding(categories[:, index]) for index, embedding in enumerate(self.embeddings)
        ]
        x = self.layers(torch.cat([*columns, self.norm(numbers)], dim=1))
        return self.head(x).squeeze(-1)


def _table(generator: Generator, rows: int) -> Sample:
    return {
        "categories": torch.randint(5, (rows, 3), generator=generator),
        "numbers": torch.randn(rows, 6, generator=generator),
    }


@entry("perceptron", _table, sizes=((3,), (5,)), fresh_sizes=((1,), (8,)), everyday=True)
def tabular() -> nn.Module:
    return Tabular()


class DeepSets(nn.Module):
    """A set of points, of which some are padding, in no order."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, _WIDTH), nn.ReLU(), nn.Dropout(0.1))
        self.whole = nn.Sequential(nn.Linear(2 * _WIDTH, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, points: Tensor, attention_mask: Tensor) -> Tensor:
        unpadded = attention_mask.unsqueeze(-1)
        features = self.point(points)
        mean = (features * unpadded).sum(1) / unpadded.sum(1).clamp(min=1)
        largest = features.masked_fill(~unpadded, -torch.inf).amax(1)
        return self.whole(torch.cat([mean, largest], dim=1))


def _points(generator: Generator, rows: int, length: int) -> Sample:
    return {
        "points": torch.randn(rows, length, 3, generator=generator),
        "attention_mask": unpadded_positions(generator, rows, length, side="right"),
    }


@entry("sets and graphs", _points, sizes=TEXTS, fresh_sizes=FRESH_TEXTS, everyday=True)
def deep_sets() -> nn.Module:
    return DeepSets()


class GraphNetwork(nn.Module):
    """Two rounds of messages along a dense adjacency, with dropout on the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, _WIDTH)
        self.messages = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(2))
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        edges = adjacency + torch.eye(adjacency.shape[-1], device=adjacency.device)
        scale = edges.sum(-1).rsqrt()
        edges = scale.unsqueeze(-1) * edges * scale.unsqueeze(-2)
        x = F.relu(self.inlet(features))
        for message in self.messages:
            x = F.relu(F.dropout(edges, 0.1, self.training) @ message(x))
        return self.head(x)


def _graph(generator: Generator, rows: int, nodes: int) -> Sample:
    upper = torch.rand(rows, nodes, nodes, generator=generator).triu(1) > 0.6
    return {
        "features": torch.randn(rows, nodes, 4, generator=generator),
        "adjacency": (upper | upper.transpose(1, 2)).float(),
    }


@entry("sets and graphs", _graph, sizes=TEXTS, fresh_sizes=FRESH_TEXTS, everyday=True)
def graph_network() -> nn.Module:
    return GraphNetwork()


class Experts(nn.Module):
    """The two best of four experts for each token; all experts answer, and most weights are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(_WIDTH, 4)
        self.inner = nn.Parameter(torch.randn(4, _WIDTH, 24) * 0.1)
        self.outer = nn.Parameter(torch.randn(4, 24, _WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
        values, experts = logits.topk(2, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, experts, values.softmax(-1))
        hidden = F.gelu(torch.einsum("bld,edh->bleh", x, self.inner))
        return torch.einsum("bleh,ehd,ble->bld", hidden, self.outer, weights)


class MixtureOfExperts(nn.Module):
    """A language model of experts whose router is noisy in training."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        self.experts = nn.ModuleList([Experts(), Experts()])
        self.norms = nn.ModuleList([nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)])
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for norm, experts in zip(self.norms, self.experts, strict=True):
            x = x + experts(norm(x))
        return self.head(x)


@entry("experts", _ids, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def mixture_of_experts() -> nn.Module:
    return MixtureOfExperts()


class TwoTowers(nn.Module):
    """A query and a document, each with its own length, and how near they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, _WIDTH, mode="mean")
        self.query = nn.Sequential(nn.Dropout(0.1), nn.Linear(_WIDTH, 16))
        self.document = nn.Sequential(nn.Dropout(0.1), nn.Linear(_WIDTH, 16))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        left = F.normalize(self.query(self.embedding(query)), dim=-1)
        right = F.normalize(self.document(self.embedding(document)), dim=-1)
        return (left * right).sum(-1)


def _queries(generator: Generator, rows: int, length: int, other: int) -> Sample:
    return {
        "query": torch.randint(VOCABULARY, (rows, other), generator=generator),
        "document": torch.randint(VOCABULARY, (rows, length), generator=generator),
    }


@entry("perceptron", _queries, sizes=((3, 9, 6), (2, 14, 11)), fresh_sizes=((4, 7, 5), (1, 13, 10)))
def two_towers() -> nn.Module:
    return TwoTowers()


class Vae(nn.Module):
    """A variational autoencoder that samples in training and takes the mean otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.decoder = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = self.encoder(x).chunk(2, dim=-1)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * deviation.exp()
        return self.decoder(latent), mean, deviation


def _vectors(generator: Generator, rows: int) -> Sample:
    return {"x": torch.randn(rows, 12, generator=generator)}


@entry("perceptron", _vectors, sizes=((3,), (5,)), fresh_sizes=((1,), (8,)), everyday=True)
def variational_autoencoder() -> nn.Module:
    return Vae()


class AttentionPooling(nn.Module):
    """A learnt query that looks at a padded sequence, beside sines for the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, _WIDTH)
        self.query = nn.Parameter(torch.randn(1, 1, _WIDTH))
        self.attention = nn.MultiheadAttention(_WIDTH, 4, dropout=0.1, batch_first=True)
        self.head = nn.Linear(_WIDTH, 3)
        frequencies = torch.exp(torch.arange(0, _WIDTH, 2) * (-4.0 / _WIDTH))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = positions.unsqueeze(1) * self.frequencies
        x = self.embedding(input_ids) + torch.cat([angles.sin(), angles.cos()], dim=-1)
        query = self.query.expand(x.shape[0], -1, -1)
        pooled, _ = self.attention(query, x, x, key_padding_mask=attention_mask == 0)
        return self.head(pooled.squeeze(1))


@entry("attention", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def attention_pooling() -> nn.Module:
    return AttentionPooling()
