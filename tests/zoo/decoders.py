"""Decoders of text, most of which answer with a cache beside their logits."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.zoo.entry import entry
from tests.zoo.samples import FRESH_TEXTS, TEXTS, VOCABULARY, text

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_SHARED_KEYS = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}


@entry("decoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_TOKENS
    )
    return transformers.GPT2LMHeadModel(config)


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gpt_neo() -> nn.Module:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        window_size=4,
        max_position_embeddings=64,
        **_TOKENS,
    )
    return transformers.GPTNeoForCausalLM(config)


@entry("decoder", text(mask=torch.bool), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_SIZES))


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gptj() -> nn.Module:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        **_TOKENS,
    )
    return transformers.GPTJForCausalLM(config)


@entry("decoder", text(pad=1, side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return transformers.OPTForCausalLM(config)


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHARED_KEYS))


@entry("decoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def llama_padded_on_the_left() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHARED_KEYS))


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def llama_that_classifies() -> nn.Module:
    config = transformers.LlamaConfig(**_SHARED_KEYS, num_labels=3)
    return transformers.LlamaForSequenceClassification(config)


@entry("decoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def mistral_with_a_sliding_window() -> nn.Module:
    config = transformers.MistralConfig(**_SHARED_KEYS, sliding_window=4)
    return transformers.MistralForCausalLM(config)


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        **{key: value for key, value in _SHARED_KEYS.items() if key != "head_dim"}
    )
    return transformers.Qwen2ForCausalLM(config)


@entry("decoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SHARED_KEYS))


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_SHARED_KEYS))


@entry("decoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def gemma2_with_a_sliding_window() -> nn.Module:
    config = transformers.Gemma2Config(**_SHARED_KEYS, sliding_window=4)
    return transformers.Gemma2ForCausalLM(config)


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**_SIZES))


@entry("decoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def falcon() -> nn.Module:
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        **_TOKENS,
    )
    return transformers.FalconForCausalLM(config)


@entry("decoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_TOKENS
    )
    return transformers.BloomForCausalLM(config)


@entry("decoder", text(), sizes=((3, 9), (2, 9)), fresh_sizes=((4, 9), (1, 9)))
def mamba_of_one_length() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, **_TOKENS
    )
    return transformers.MambaForCausalLM(config)


@entry("experts", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_SHARED_KEYS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


@entry("experts", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **_SHARED_KEYS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    return transformers.Qwen3MoeForCausalLM(config)


@entry("experts", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def mixtral_with_batched_experts() -> nn.Module:
    config = transformers.MixtralConfig(
        **_SHARED_KEYS,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="batched_mm",
    )
    return transformers.MixtralForCausalLM(config)
