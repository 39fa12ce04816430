"""Networks that hear: waveforms and spectra."""

from __future__ import annotations

import torch
import transformers
from torch import Generator, nn

from tests.zoo.entry import Sample, Sizes, entry
from tests.zoo.samples import waveforms

_SOUNDS: Sizes = ((3, 400), (2, 560))
_FRESH_SOUNDS: Sizes = ((4, 360), (1, 480), (5, 720))
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "vocab_size": 30,
}


@entry("speech", waveforms(), sizes=_SOUNDS, fresh_sizes=_FRESH_SOUNDS)
def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(**_SIZES, layerdrop=0.1, mask_time_prob=0.3)
    return transformers.Wav2Vec2ForCTC(config)


@entry("speech", waveforms(masked=False), sizes=_SOUNDS, fresh_sizes=_FRESH_SOUNDS)
def wav2vec2_without_a_mask() -> nn.Module:
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_SIZES))


@entry("speech", waveforms(), sizes=_SOUNDS, fresh_sizes=_FRESH_SOUNDS)
def hubert() -> nn.Module:
    config = transformers.HubertConfig(**_SIZES, layerdrop=0.1, mask_time_prob=0.3)
    return transformers.HubertModel(config)


@entry("speech", waveforms(masked=False), sizes=_SOUNDS, fresh_sizes=_FRESH_SOUNDS)
def wavlm() -> nn.Module:
    config = transformers.WavLMConfig(**_SIZES, num_buckets=16, max_bucket_distance=32)
    return transformers.WavLMModel(config)


@entry("speech", waveforms(masked=False), sizes=_SOUNDS, fresh_sizes=_FRESH_SOUNDS)
def sew() -> nn.Module:
    config = transformers.SEWConfig(**_SIZES, squeeze_factor=2)
    return transformers.SEWModel(config)


def _spectra(generator: Generator, rows: int) -> Sample:
    return {"input_values": torch.randn(rows, 48, 16, generator=generator)}


@entry("speech", _spectra, sizes=((3,), (2,)), fresh_sizes=((1,), (5,)))
def ast() -> nn.Module:
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        patch_size=8,
        frequency_stride=4,
        time_stride=4,
        max_length=48,
        num_mel_bins=16,
        num_labels=3,
    )
    return transformers.ASTForAudioClassification(config)
