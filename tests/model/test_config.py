"""A configuration is checked when it is built; the error names the key and the value."""

from __future__ import annotations

import dataclasses

import pytest

from evalmode.model.config import TrainConfig, TransformerConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("patience", 0),
        ("batch_rows", 0),
        ("threads", 0),
        ("devices", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("max_minutes", 0.0),
        ("crop", 1.5),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("ngram_dropout", float("nan")),
        ("frontend", "words"),
        ("dropout_kind", "spatial"),
        ("width", 0),
        ("heads", 5),
        ("seed", -1),
        ("vocabulary", 0),
    ],
)
def test_an_invalid_value_is_refused_with_its_key(key, value):
    with pytest.raises(ValueError, match=rf"{key} must be .*{key}={value!r}"):
        TrainConfig(**{key: value})


def test_a_site_without_a_specific_rate_has_the_general_one():
    config = TrainConfig(dropout=0.2, attention_dropout=0.0)
    network = config.network(vocabulary=10, labels=2, positions=4, ids_per_position=16)
    assert network.attention_dropout == 0.0
    assert (
        network.embedding_dropout == network.residual_dropout == network.feed_forward_dropout == 0.2
    )
    assert network.ngram_dropout == config.ngram_dropout


def test_a_network_with_one_id_per_position_drops_no_ids():
    assert (
        TrainConfig()
        .network(vocabulary=10, labels=2, positions=4, ids_per_position=1)
        .ngram_dropout
        == 0.0
    )


def test_a_record_has_neither_a_path_nor_a_time_limit():
    record = TrainConfig(data="/home/someone/reviews.csv", max_minutes=5).record()
    assert record["data"] == "reviews.csv"
    assert "max_minutes" not in record


@pytest.mark.parametrize(
    "config", [TrainConfig(), TransformerConfig(vocabulary=2, labels=2, positions=1)]
)
def test_a_configuration_is_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 8
