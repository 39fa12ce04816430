"""A training in exact arithmetic: as deterministic and resumable as one in float32."""

from __future__ import annotations

import json

import pytest
import torch

from evalmode.errors import EvalmodeError
from evalmode.model import checkpoint
from evalmode.model.checkpoint import CheckpointError
from evalmode.model.exact.network import ExactTransformer
from evalmode.model.resume import RunMismatch
from tests.model.conftest import Killed, contents, train, watch_steps

EXACT = {"arithmetic": "exact"}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("exact") / "run", **EXACT)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(data, tmp_path, uninterrupted):
    train(data, tmp_path / "same", **EXACT)
    other = train(data, tmp_path / "other", seed=1, **EXACT)
    assert contents(tmp_path / "same") == contents(uninterrupted.checkpoint)
    assert other.weights_sha256 != uninterrupted.weights_sha256


@pytest.mark.parametrize("step", [7, 13, 25])
def test_a_killed_run_resumes_to_the_same_bytes(data, tmp_path, monkeypatch, uninterrupted, step):
    with monkeypatch.context() as patch:
        watch_steps(patch, die_at=step)
        with pytest.raises(Killed):
            train(data, tmp_path, **EXACT)
    train(data, tmp_path, resume=True, **EXACT)
    assert contents(tmp_path) == contents(uninterrupted.checkpoint)


def test_a_run_in_one_arithmetic_does_not_resume_in_the_other(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        watch_steps(patch, die_at=7)
        with pytest.raises(Killed):
            train(data, tmp_path, **EXACT)
    with pytest.raises(RunMismatch, match="arithmetic was 'exact' and is now not set"):
        train(data, tmp_path, resume=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frontend": "bpe"},
        {"weight_bits": 7, "causal": True},
        {"dropout_kind": "classic"},
    ],
    ids=str,
)
def test_it_learns_with_every_front_end_and_kind_of_dropout(data, tmp_path, options):
    result = train(data, tmp_path, **(EXACT | options))
    assert result.metrics["test"]["accuracy"] > 0.8
    again = checkpoint.load(tmp_path)
    assert isinstance(again.module, ExactTransformer)
    assert again.module.config.weight_bits == options.get("weight_bits", 8)


def test_the_network_of_the_export_is_frozen_and_the_checkpoint_s_is_not(uninterrupted):
    loaded = checkpoint.load(uninterrupted.checkpoint)
    ids = torch.from_numpy(loaded.held_out.rows[0]).unsqueeze(0)
    expected, exported = loaded.module(ids), loaded.folded()
    assert torch.equal(exported(ids), expected)
    assert torch.equal(loaded.module.train()(ids).isfinite(), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="frozen"):
        exported.train()(ids)


def test_weights_that_are_too_large_to_be_exact_are_refused_by_the_export(uninterrupted):
    loaded = checkpoint.load(uninterrupted.checkpoint)
    with torch.no_grad():
        loaded.module.blocks[0].attention.out.weight.fill_(60.0)
    with pytest.raises(CheckpointError, match="the network is not exact: the residual stream"):
        loaded.folded()


def test_the_record_names_the_arithmetic_in_format_2_alone(data, tmp_path, uninterrupted):
    exact = json.loads((uninterrupted.checkpoint / "checkpoint.json").read_text())
    assert exact["format"] == 2
    assert exact["network"]["arithmetic"] == "exact"
    assert exact["network"]["weight_bits"] == 8
    assert exact["provenance"]["training"]["arithmetic"] == "exact"
    train(data, tmp_path / "float32")
    plain = json.loads((tmp_path / "float32" / "checkpoint.json").read_text())
    assert plain["format"] == 1
    assert not {"arithmetic", "weight_bits"} & plain["network"].keys()
    assert checkpoint.load(tmp_path / "float32").module.config.arithmetic == "float32"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arithmetic": None}, "network lacks 'arithmetic'"),
        ({"arithmetic": "float16"}, "network.arithmetic"),
        ({"arithmetic": "float32"}, "model.safetensors lacks"),
        ({"weight_bits": 9}, "weight_bits must be 7 or 8"),
        ({"positions": 600}, "positions to be at most 518"),
    ],
    ids=str,
)
def test_a_record_of_another_arithmetic_is_refused(tmp_path, uninterrupted, changes, sentence):
    for name, data in contents(uninterrupted.checkpoint).items():
        (tmp_path / name).write_bytes(data)
    record = json.loads((tmp_path / "checkpoint.json").read_text())
    network = record["network"] | changes
    record["network"] = {key: value for key, value in network.items() if value is not None}
    (tmp_path / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load(tmp_path)


def test_a_front_end_whose_rows_do_not_fit_is_refused_in_one_sentence(data, tmp_path):
    with pytest.raises((EvalmodeError, ValueError), match="feed_forward to be at most 518"):
        train(data, tmp_path, feed_forward=519, **EXACT)
