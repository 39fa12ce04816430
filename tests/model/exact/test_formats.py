"""The sizes that exact arithmetic allows, and the sentence for those that it does not."""

from __future__ import annotations

import pytest

from evalmode.model.config import TrainConfig, TransformerConfig
from evalmode.model.exact.formats import LARGEST, largest_weight, pooled_format


def exact(**changes) -> TransformerConfig:
    shape = {"vocabulary": 50, "labels": 5, "positions": 12, "arithmetic": "exact"}
    return TransformerConfig(**(shape | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 1040, "heads": 40, "feed_forward": 64}, "width to be at most 1032.*width=1040"),
        ({"feed_forward": 520}, "feed_forward to be at most 518.*feed_forward=520"),
        ({"positions": 519}, "positions to be at most 518.*positions=519"),
        ({"width": 128, "heads": 1}, "width / heads to be at most 127.*use more heads"),
        ({"ids_per_position": 12}, "ids_per_position to be a power of two.*ids_per_position=12"),
        ({"ids_per_position": 256}, "ids_per_position to be a power of two up to 128"),
        ({"weight_bits": 6}, "weight_bits must be 7 or 8, got weight_bits=6"),
    ],
)
def test_a_size_beyond_24_bits_is_refused_with_its_limit(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        exact(**changes)


def test_a_refused_size_names_the_way_out_that_there_is():
    with pytest.raises(ValueError, match="or set weight_bits=7"):
        exact(feed_forward=520)
    assert exact(feed_forward=520, weight_bits=7).feed_forward == 520
    with pytest.raises(ValueError, match=r"use a smaller feed_forward$"):
        exact(feed_forward=2_000, weight_bits=7)


def test_a_float32_network_has_no_such_limits():
    shape = {"vocabulary": 50, "labels": 5, "positions": 5_000, "feed_forward": 5_000}
    assert TransformerConfig(**shape).arithmetic == "float32"


def test_a_training_of_a_size_that_does_not_fit_is_refused_before_the_data_is_read():
    with pytest.raises(ValueError, match="feed_forward to be at most 518"):
        TrainConfig(arithmetic="exact", feed_forward=600)
    with pytest.raises(ValueError, match="weight_bits must be 8 unless arithmetic is exact"):
        TrainConfig(weight_bits=7)
    with pytest.raises(ValueError, match="arithmetic must be float32 or exact"):
        TrainConfig(arithmetic="float16")


@pytest.mark.parametrize("weight_bits", [7, 8])
@pytest.mark.parametrize("width", [8, 96, 129, 130, 256, 1032])
def test_a_pooled_vector_is_as_fine_as_the_head_allows(width, weight_bits):
    pooled = pooled_format(width, weight_bits=weight_bits)
    assert pooled.largest * largest_weight(weight_bits) * width < LARGEST
    finer = 2 * pooled.largest + 1
    assert pooled.fraction_bits == 8 or finer * largest_weight(weight_bits) * width >= LARGEST
