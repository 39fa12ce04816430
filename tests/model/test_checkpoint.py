"""A finished training on disk: it comes back as it was, and what is not whole is refused by the
name of its file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evalmode.errors import EvalmodeError
from evalmode.model.checkpoint import Checkpoint, CheckpointError, load, save
from evalmode.model.dropout import ClassicDropout
from evalmode.model.train import fit
from tests.model.conftest import small_run


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "classic"
    fit(small_run(data, dropout_kind="classic", frontend="bpe", epochs=1), out=out, cache=out)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def inputs(found: Checkpoint, row: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(row).unsqueeze(0)


def test_what_is_loaded_can_be_saved_again_byte_for_byte(folder, tmp_path):
    save(load(folder), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_it_holds_all_that_an_export_needs(folder):
    found = load(folder)
    assert not found.module.training
    assert found.labels == ("animal", "plant")
    assert len(found.held_out.rows) == len(found.held_out.labels) == found.metrics["test"]["rows"]
    assert all(row.dtype == np.int64 and row.ndim == 1 for row in found.held_out.rows)
    right = [
        int(found.module(inputs(found, row)).argmax()) == label
        for row, label in zip(found.held_out.rows, found.held_out.labels, strict=True)
    ]
    assert np.mean(right) == pytest.approx(found.metrics["test"]["accuracy"])


def test_the_texts_to_know_answers_for_are_odd_and_held_out_and_every_one_can_be_read(folder):
    found = load(folder)
    frontend = found.open_frontend()
    assert "" in found.sample_texts
    assert len(found.sample_texts) > 8
    assert any(frontend.encode(text).truncated for text in found.sample_texts)


def test_a_folded_copy_answers_as_the_module_and_the_module_stays_as_it_was(folder):
    found = load(folder)
    folded, row = found.folded(), inputs(found, found.held_out.rows[0])
    torch.testing.assert_close(folded(row), found.module(row), rtol=1e-4, atol=1e-5)
    assert all(module.folded for module in folded.modules() if isinstance(module, ClassicDropout))
    assert not any(
        module.folded for module in found.module.modules() if isinstance(module, ClassicDropout)
    )


def test_its_provenance_names_the_data_by_hash_and_knows_no_path(folder, data):
    record = (folder / "checkpoint.json").read_text()
    assert len(json.loads(record)["provenance"]["data"]["sha256"]) == 64
    assert str(data.parent) not in record
    assert str(folder) not in record


@pytest.mark.parametrize(
    "name", ["model.safetensors", "held_out.npz", "tokenizer.json", "checkpoint.json"]
)
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_a_file_that_is_not_whole_is_refused_by_name(copy, name, harm):
    path = copy / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CheckpointError, match=name) as refused:
        load(copy)
    assert isinstance(refused.value, EvalmodeError)


def test_held_out_rows_that_an_earlier_version_compressed_are_read(copy):
    before, file = load(copy), copy / "held_out.npz"
    with np.load(file) as arrays:
        np.savez_compressed(file, **arrays)
    record = json.loads((copy / "checkpoint.json").read_text())
    record["files"]["held_out.npz"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "checkpoint.json").write_text(json.dumps(record))
    after = load(copy)
    assert after.held_out.labels.tobytes() == before.held_out.labels.tobytes()
    assert [row.tolist() for row in after.held_out.rows] == [
        row.tolist() for row in before.held_out.rows
    ]


def test_another_format_is_refused_with_the_way_out(copy):
    record = json.loads((copy / "checkpoint.json").read_text())
    (copy / "checkpoint.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(
        CheckpointError, match="format 99, and this evalmode reads format 1: train again"
    ):
        load(copy)


def test_a_record_that_does_not_fit_its_weights_is_refused(copy):
    record = json.loads((copy / "checkpoint.json").read_text())
    record["network"]["width"] = 32
    (copy / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.json does not describe the files beside it"
    ):
        load(copy)


def test_a_folder_that_never_was_one_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match="a checkpoint is a folder that `evalmode train` has finished"
    ):
        load(tmp_path / "nowhere")
