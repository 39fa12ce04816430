"""Small random networks from Hugging Face, without any flag or wrapper for the export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

_SIZES = {"vocab_size": 100}


def bert() -> nn.Module:
    """An encoder that classifies."""
    config = BertConfig(
        **_SIZES,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    """A decoder, which returns a cache beside its logits."""
    config = GPT2Config(
        **_SIZES, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def inputs() -> list[dict[str, Tensor]]:
    """Two batches of padded rows, with different row counts and lengths."""
    generator = torch.Generator().manual_seed(0)
    return [_batch(rows, length, generator) for rows, length in ((3, 9), (2, 16))]


def _batch(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {
        "input_ids": torch.randint(100, (rows, length), generator=generator),
        "attention_mask": mask,
    }


def bart() -> nn.Module:
    """An encoder and a decoder that skip layers in training."""
    config = BartConfig(
        **_SIZES,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        encoder_layerdrop=0.1,
        decoder_layerdrop=0.4,
    )
    return BartModel(config)


def wav2vec2() -> nn.Module:
    """A speech encoder, with the default SpecAugment and LayerDrop of its configuration."""
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(8, 5),
        conv_kernel=(8, 5),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_length=4,
        mask_feature_prob=0.2,
        mask_feature_length=4,
    )
    return Wav2Vec2Model(config)


def waves() -> list[dict[str, Tensor]]:
    """Two batches of sound."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_values": torch.randn(rows, 1600, generator=generator)} for rows in (3, 2)]
