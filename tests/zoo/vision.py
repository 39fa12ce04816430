"""Networks that see: transformers over patches, and convolutional networks."""

from __future__ import annotations

import torch
import transformers
from torch import Generator, nn

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

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_PATCHES = {**_SIZES, "image_size": 32, "patch_size": 8}
_LABELS = {"num_labels": 3}
_ANY: Sizes = ((3, 64, 96), (2, 96, 128))
_FRESH_ANY: Sizes = ((1, 96, 64), (4, 128, 160))


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_PATCHES, **_LABELS))


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def deit() -> nn.Module:
    config = transformers.DeiTConfig(**_PATCHES, **_LABELS)
    return transformers.DeiTForImageClassificationWithTeacher(config)


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        drop_path_rate=0.2,
        **_LABELS,
    )
    return transformers.SwinForImageClassification(config)


@entry("vision", images_of_any_size(), sizes=_ANY, fresh_sizes=_FRESH_ANY)
def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, drop_path_rate=0.3, **_LABELS
    )
    return transformers.ConvNextForImageClassification(config)


@entry("vision", images_of_any_size(), sizes=_ANY, fresh_sizes=_FRESH_ANY)
def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", **_LABELS
    )
    return transformers.ResNetForImageClassification(config)


@entry("vision", images_of_any_size(), sizes=_ANY, fresh_sizes=_FRESH_ANY)
def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        **_LABELS,
    )
    return transformers.SegformerForSemanticSegmentation(config)


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def beit() -> nn.Module:
    config = transformers.BeitConfig(
        **_PATCHES, use_relative_position_bias=True, drop_path_rate=0.2, **_LABELS
    )
    return transformers.BeitForImageClassification(config)


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(
        **{key: value for key, value in _PATCHES.items() if key != "intermediate_size"},
        drop_path_rate=0.2,
        **_LABELS,
    )
    return transformers.Dinov2ForImageClassification(config)


@entry("vision", images(64), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def mobilenet_v2_of_one_size() -> nn.Module:
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, **_LABELS)
    return transformers.MobileNetV2ForImageClassification(config)


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=32,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        num_attention_heads=2,
        **_LABELS,
    )
    return transformers.MobileViTForImageClassification(config)


@entry("vision", images_of_any_size(), sizes=_ANY, fresh_sizes=_FRESH_ANY)
def poolformer() -> nn.Module:
    config = transformers.PoolFormerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], drop_path_rate=0.2, **_LABELS
    )
    return transformers.PoolFormerForImageClassification(config)


_CLIP_TEXT = {
    **_SIZES,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "projection_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@entry("vision", text(), sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def clip_texts() -> nn.Module:
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**_CLIP_TEXT))


@entry("vision", images(32), sizes=ROWS, fresh_sizes=FRESH_ROWS)
def clip_images() -> nn.Module:
    config = transformers.CLIPVisionConfig(**_PATCHES, projection_dim=16)
    return transformers.CLIPVisionModelWithProjection(config)


def _captioned(generator: Generator, rows: int, length: int) -> Sample:
    unpadded = unpadded_positions(generator, rows, length, side="right")
    return {
        "input_ids": token_ids(generator, unpadded, pad=0),
        "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator),
        "attention_mask": unpadded.to(torch.int64),
    }


@entry("vision", _captioned, sizes=TEXTS, fresh_sizes=FRESH_TEXTS)
def clip() -> nn.Module:
    """Compares each text with each image: rows of both, which do not vary together."""
    config = transformers.CLIPConfig(
        text_config=_CLIP_TEXT, vision_config=_PATCHES, projection_dim=16
    )
    return transformers.CLIPModel(config)
