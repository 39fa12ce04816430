"""Networks that must not be certified, each with the reason that its refusal has to give."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Generator, Tensor, nn

from tests.zoo.entry import Sample, Sizes, entry
from tests.zoo.samples import (
    PAIRS,
    TEXTS,
    VOCABULARY,
    images_of_any_size,
    text,
    text_pairs,
)

_ROWS: Sizes = ((3,), (5,))
_IN_EVAL_MODE = "draws in eval mode"
_OWN_LINE = "refusals.py"  # the message has to name the line of this file at which it happens


def _vectors(generator: Generator, rows: int) -> Sample:
    return {"x": torch.randn(rows, 12, generator=generator)}


class MonteCarlo(nn.Module):
    """Keeps its dropout in use, to estimate how sure it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.2, training=True))


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_IN_EVAL_MODE, everyday=True)
def monte_carlo_dropout() -> nn.Module:
    return MonteCarlo()


class Sampler(nn.Module):
    """A variational autoencoder that samples in use too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.decoder = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.encoder(x).chunk(2, dim=-1)
        return self.decoder(mean + torch.randn_like(mean) * deviation.exp())


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_OWN_LINE)
def autoencoder_that_samples() -> nn.Module:
    return Sampler()


class Gate(nn.Module):
    """Chooses one of its branches by chance, more often the better one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 2)
        self.branches = nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 3)])

    def forward(self, x: Tensor) -> Tensor:
        weights = F.gumbel_softmax(self.router(x), hard=True)
        answers = torch.stack([branch(x) for branch in self.branches], dim=1)
        return (weights.unsqueeze(-1) * answers).sum(1)


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_IN_EVAL_MODE)
def gumbel_gate() -> nn.Module:
    return Gate()


class Sequence(nn.Module):
    """Layers in a row, whose input is called `x`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused="neighbours")
def statistics_of_the_batch() -> nn.Module:
    return Sequence(nn.Linear(12, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))


class EarlyExit(nn.Module):
    """Skips its second half where the first is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.first(x)
        if answer.softmax(-1).amax() > 0.5:
            return answer
        return self.second(answer)


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_OWN_LINE)
def early_exit() -> nn.Module:
    return EarlyExit()


class AlwaysTraining(nn.Module):
    """Keeps a part of itself in training, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.drop = nn.Dropout(0.1)

    def train(self, mode: bool = True) -> AlwaysTraining:
        super().train(mode)
        self.drop.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.drop(x))


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused="drop")
def part_that_stays_in_training() -> nn.Module:
    return AlwaysTraining()


class Masked(nn.Module):
    """Multiplies by a mask that was drawn when it was built and is in no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.mask = torch.bernoulli(torch.full((12,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.mask)


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused="baked-noise")
def mask_of_the_constructor() -> nn.Module:
    return Masked()


@entry(
    "refused",
    text(),
    sizes=((3, 16), (2, 16)),
    fresh_sizes=(),
    refused=_IN_EVAL_MODE,
)
def reformer() -> nn.Module:
    config = transformers.ReformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_attention_heads=4,
        attention_head_size=8,
        feed_forward_size=48,
        attn_layers=["lsh", "local"],
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[16, 16],
        lsh_attn_chunk_length=4,
        local_attn_chunk_length=4,
        num_buckets=2,
        max_position_embeddings=16,
        is_decoder=False,
    )
    return transformers.ReformerModel(config)


class Counter(nn.Module):
    """Answers otherwise each time, for it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused="calls")
def counter_of_calls() -> nn.Module:
    return Counter()


class PrivateNoise(nn.Module):
    """Draws from a generator of its own, which no global seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.noise = np.random.default_rng()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(self.noise.random())


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_IN_EVAL_MODE)
def private_generator() -> nn.Module:
    return PrivateNoise()


class Clock(nn.Module):
    """Answers by the time of the day."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + time.perf_counter() % 1


@entry(
    "refused",
    _vectors,
    sizes=_ROWS,
    fresh_sizes=(),
    refused="differs between forwards of one input",
)
def clock() -> nn.Module:
    return Clock()


class Positions(nn.Module):
    """Counts its positions in Python, so that a graph of it holds for one length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.positions = nn.Embedding(64, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.tensor(list(range(input_ids.shape[1])))
        x = self.embedding(input_ids) + self.positions(positions)
        return x * attention_mask.unsqueeze(-1)


@entry("refused", text(), sizes=TEXTS, fresh_sizes=(), refused="input_ids")
def positions_counted_in_python() -> nn.Module:
    return Positions()


class Elevenths(nn.Module):
    """Answers otherwise to a series whose length is a multiple of eleven."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, series: Tensor) -> Tensor:
        answer = self.layer(series)
        return answer.tanh() if series.shape[1] % 11 == 0 else answer


def _series(generator: Generator, rows: int, length: int) -> Sample:
    return {"series": torch.randn(rows, length, 4, generator=generator)}


@entry("refused", _series, sizes=TEXTS, fresh_sizes=(), refused="takes another way at length = 11")
def branch_on_a_rare_length() -> nn.Module:
    return Elevenths()


class Spectrum(nn.Module):
    """Answers with eigenvalues, for which ONNX has no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.layer(x).reshape(-1, 3, 3)
        return torch.linalg.eigvalsh(matrix + matrix.transpose(1, 2))


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_OWN_LINE)
def eigenvalues() -> nn.Module:
    return Spectrum()


class Chosen(nn.Module):
    """Goes through the rows that pass a test, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        answer = torch.zeros_like(x)
        for index in (x.mean(-1) > 0).nonzero():
            answer[index] = self.layer(x[index])
        return answer


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused=_OWN_LINE)
def loop_over_chosen_rows() -> nn.Module:
    return Chosen()


@entry("refused", _vectors, sizes=_ROWS, fresh_sizes=(), refused="layers.1")
def scripted_part() -> nn.Module:
    return Sequence(nn.Linear(12, 8), torch.jit.script(nn.Linear(8, 3)))


@entry(
    "refused",
    text_pairs(),
    sizes=PAIRS,
    fresh_sizes=(),
    refused="modeling_switch_transformers.py",
)
def switch_transformers() -> nn.Module:
    """Its experts are called in a loop over those that the router chose."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=64,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


@entry(
    "refused",
    images_of_any_size(),
    sizes=((3, 64, 96), (2, 96, 128)),
    fresh_sizes=(),
    refused="pixel_values",
)
def mobilenet_v2_of_any_size() -> nn.Module:
    """Its padding branches on whether a side is even, so that a graph holds for even sides."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=3)
    return transformers.MobileNetV2ForImageClassification(config)


@entry("refused", text(pad=1), sizes=TEXTS, fresh_sizes=(), refused="modeling_longformer.py")
def longformer() -> nn.Module:
    """Counts its chunks with `torch.div`, whose answer is a tensor and no size."""
    config = transformers.LongformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        attention_window=4,
        pad_token_id=1,
    )
    return transformers.LongformerModel(config)


@entry("refused", text(), sizes=TEXTS, fresh_sizes=(), refused="modeling_rope_utils.py")
def llama_with_rotations_that_grow() -> nn.Module:
    """Makes its rotations anew when the largest position exceeds those made before."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)
