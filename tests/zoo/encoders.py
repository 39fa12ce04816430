"""Encoders of text: each reads padded token ids with their mask, as its tokenizer gives them."""

from __future__ import annotations

import torch
import transformers
from torch import Generator, nn

from tests.zoo.entry import Sample, entry
from tests.zoo.samples import FRESH_TEXTS, TEXTS, VOCABULARY, text

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_LABELS = {"num_labels": 3}


@entry("encoder", text(token_type_ids=2), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def bert() -> nn.Module:
    config = transformers.BertConfig(**_SIZES, **_LABELS)
    return transformers.BertForSequenceClassification(config)


@entry("encoder", text(mask=torch.bool), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def bert_with_a_boolean_mask() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**_SIZES))


@entry("encoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def bert_padded_on_the_left() -> nn.Module:
    config = transformers.BertConfig(**_SIZES, **_LABELS)
    return transformers.BertForTokenClassification(config)


@entry("encoder", text(pad=1), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_SIZES))


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=64,
        **_LABELS,
    )
    return transformers.DistilBertForSequenceClassification(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def albert() -> nn.Module:
    config = transformers.AlbertConfig(**_SIZES, embedding_size=16, **_LABELS)
    return transformers.AlbertForTokenClassification(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def electra() -> nn.Module:
    config = transformers.ElectraConfig(**_SIZES, embedding_size=16)
    return transformers.ElectraForPreTraining(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def deberta_v2() -> nn.Module:
    config = transformers.DebertaV2Config(
        **_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    )
    return transformers.DebertaV2ForTokenClassification(config)


@entry("encoder", text(pad=1), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def mpnet() -> nn.Module:
    return transformers.MPNetModel(transformers.MPNetConfig(**_SIZES))


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(
        **_SIZES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=4,
        **_LABELS,
    )
    return transformers.ModernBertForSequenceClassification(config)


@entry("encoder", text(side="left"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def xlnet() -> nn.Module:
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, **_LABELS
    )
    return transformers.XLNetForSequenceClassification(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def squeezebert() -> nn.Module:
    config = transformers.SqueezeBertConfig(**_SIZES, embedding_size=32)
    return transformers.SqueezeBertModel(config)


@entry("encoder", text(), sizes=((3, 16), (2, 16)), fresh_sizes=((4, 16), (1, 16)))
def funnel_of_one_length() -> nn.Module:
    config = transformers.FunnelConfig(
        vocab_size=VOCABULARY, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1]
    )
    return transformers.FunnelModel(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def mobilebert() -> nn.Module:
    config = transformers.MobileBertConfig(
        **_SIZES, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2
    )
    return transformers.MobileBertForTokenClassification(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def convbert() -> nn.Module:
    return transformers.ConvBertModel(transformers.ConvBertConfig(**_SIZES, embedding_size=32))


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def nystromformer() -> nn.Module:
    config = transformers.NystromformerConfig(**_SIZES, segment_means_seq_len=16, num_landmarks=16)
    return transformers.NystromformerModel(config)


@entry("encoder", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def roformer() -> nn.Module:
    config = transformers.RoFormerConfig(**_SIZES, embedding_size=32)
    return transformers.RoFormerForMaskedLM(config)


@entry("encoder", text(), sizes=((3, 64), (2, 96)), fresh_sizes=((4, 32), (1, 80), (5, 112)))
def big_bird_with_full_attention() -> nn.Module:
    config = transformers.BigBirdConfig(
        **{**_SIZES, "max_position_embeddings": 128}, attention_type="original_full"
    )
    return transformers.BigBirdModel(config)


@entry("encoder", text(pad=1), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def esm() -> nn.Module:
    config = transformers.EsmConfig(
        **_SIZES, pad_token_id=1, mask_token_id=4, position_embedding_type="rotary"
    )
    return transformers.EsmForMaskedLM(config)


@entry("encoder", text(side="right"), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def xlm() -> nn.Module:
    config = transformers.XLMConfig(
        vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    return transformers.XLMModel(config)


def _segments(generator: Generator, rows: int, length: int) -> Sample:
    return {
        "input_ids": torch.randint(5, VOCABULARY, (rows, length), generator=generator),
        "token_type_ids": torch.randint(2, (rows, length), generator=generator),
    }


@entry("encoder", _segments, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def fnet() -> nn.Module:
    config = transformers.FNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return transformers.FNetModel(config)
