"""Batches that look like those of real use: padded token ids, waveforms, images.

Each function returns a `MakeBatch`, which is called with a generator and sizes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from tests.zoo.entry import MakeBatch, Sample, Sizes

VOCABULARY = 100
_SPECIAL = 5  # the first ids stand for padding, start, end and the like

# Lengths are none of the widths of the networks, so that no axis is mistaken for another.
TEXTS: Sizes = ((3, 9), (2, 14))
FRESH_TEXTS: Sizes = ((4, 7), (1, 13), (5, 21))
PAIRS: Sizes = ((3, 9, 6), (2, 14, 11))  # rows, source length, target length
FRESH_PAIRS: Sizes = ((4, 7, 5), (1, 13, 10), (5, 21, 12))
ROWS: Sizes = ((2,), (3,))
FRESH_ROWS: Sizes = ((1,), (5,))

Side = Literal["left", "right"]


def text(
    *, pad: int = 0, side: Side = "right", mask: torch.dtype = torch.int64, **extra: int
) -> MakeBatch:
    """Token ids and their attention mask: `batch(generator, rows, length)`.

    `extra` names further inputs of the same shape, with the number of their ids.
    """

    def batch(generator: Generator, rows: int, length: int) -> Sample:
        unpadded = unpadded_positions(generator, rows, length, side=side)
        sample = {
            "input_ids": token_ids(generator, unpadded, pad=pad),
            "attention_mask": unpadded.to(mask),
        }
        for name, count in extra.items():
            sample[name] = torch.randint(count, (rows, length), generator=generator)
        return sample

    return batch


def text_pairs(*, pad: int = 0) -> MakeBatch:
    """What an encoder and a decoder read: `batch(generator, rows, length, target_length)`."""

    def batch(generator: Generator, rows: int, length: int, target_length: int) -> Sample:
        unpadded = unpadded_positions(generator, rows, length, side="right")
        targets = torch.ones(rows, target_length, dtype=torch.bool)
        return {
            "input_ids": token_ids(generator, unpadded, pad=pad),
            "attention_mask": unpadded.to(torch.int64),
            "decoder_input_ids": token_ids(generator, targets, pad=pad),
        }

    return batch


def waveforms(*, masked: bool = True) -> MakeBatch:
    """Sound of 16 kHz whose ends are silent padding: `batch(generator, rows, length)`."""

    def batch(generator: Generator, rows: int, length: int) -> Sample:
        unpadded = unpadded_positions(generator, rows, length, side="right")
        sound = torch.randn(rows, length, generator=generator) * unpadded
        return {"input_values": sound} | (
            {"attention_mask": unpadded.to(torch.int64)} if masked else {}
        )

    return batch


def images(side: int, *, channels: int = 3, name: str = "pixel_values") -> MakeBatch:
    """Square images of one size: `batch(generator, rows)`."""

    def batch(generator: Generator, rows: int) -> Sample:
        return {name: torch.randn(rows, channels, side, side, generator=generator)}

    return batch


def images_of_any_size(*, channels: int = 3, name: str = "pixel_values") -> MakeBatch:
    """Images: `batch(generator, rows, height, width)`."""

    def batch(generator: Generator, rows: int, height: int, width: int) -> Sample:
        return {name: torch.randn(rows, channels, height, width, generator=generator)}

    return batch


def unpadded_positions(generator: Generator, rows: int, length: int, *, side: Side) -> Tensor:
    """A boolean of [rows, length]: the first row is full, each other at least half full."""
    lengths = torch.randint(-(-length // 2), length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    positions = torch.arange(length)
    return positions < lengths if side == "right" else positions >= length - lengths


def token_ids(generator: Generator, unpadded: Tensor, *, pad: int) -> Tensor:
    """Random ids where `unpadded` is true, and `pad` elsewhere."""
    ids = torch.randint(_SPECIAL, VOCABULARY, unpadded.shape, generator=generator)
    return ids.where(unpadded, pad)
