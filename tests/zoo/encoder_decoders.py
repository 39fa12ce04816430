"""Networks that read one sequence and write another."""

from __future__ import annotations

import torch
import transformers
from torch import Generator, nn

from tests.zoo.entry import Sample, entry
from tests.zoo.samples import FRESH_PAIRS, PAIRS, VOCABULARY, text_pairs

_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    **_TOKENS,
}


@entry("encoder-decoder", text_pairs(), sizes=PAIRS, fresh_sizes=FRESH_PAIRS)
def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5_SIZES))


@entry("encoder-decoder", text_pairs(), sizes=PAIRS, fresh_sizes=FRESH_PAIRS)
def bart() -> nn.Module:
    config = transformers.BartConfig(**_BART_SIZES, encoder_layerdrop=0.1, decoder_layerdrop=0.1)
    return transformers.BartForConditionalGeneration(config)


@entry("encoder-decoder", text_pairs(), sizes=PAIRS, fresh_sizes=FRESH_PAIRS)
def marian() -> nn.Module:
    return transformers.MarianMTModel(transformers.MarianConfig(**_BART_SIZES))


@entry("encoder-decoder", text_pairs(), sizes=PAIRS, fresh_sizes=FRESH_PAIRS)
def pegasus() -> nn.Module:
    config = transformers.PegasusConfig(**_BART_SIZES)
    return transformers.PegasusForConditionalGeneration(config)


def _spectra(generator: Generator, rows: int, target_length: int) -> Sample:
    return {
        "input_features": torch.randn(rows, 20, 60, generator=generator),
        "decoder_input_ids": torch.randint(
            5, VOCABULARY, (rows, target_length), generator=generator
        ),
    }


@entry("encoder-decoder", _spectra, sizes=((3, 6), (2, 11)), fresh_sizes=((4, 5), (1, 13), (5, 9)))
def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        **{key: value for key, value in _BART_SIZES.items() if key != "max_position_embeddings"},
        num_mel_bins=20,
        max_source_positions=30,
        max_target_positions=40,
    )
    return transformers.WhisperForConditionalGeneration(config)
