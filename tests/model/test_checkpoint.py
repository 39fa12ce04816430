"""A finished training on disk: it comes back as it was, and what is not whole is refused by the
name of its file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models

from evalmode.bundle.npz import npz_of
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


def record_of(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "checkpoint.json").read_text())
    assert isinstance(record, dict)
    return record


def put(folder: Path, record: object) -> None:
    (folder / "checkpoint.json").write_text(json.dumps(record))


def put_file(folder: Path, name: str, data: bytes) -> None:
    """Write a file whose sha256 the record has."""
    (folder / name).write_bytes(data)
    record = record_of(folder)
    record["files"][name] = hashlib.sha256(data).hexdigest()
    put(folder, record)


def require_refusal(folder: Path, name: str) -> str:
    with pytest.raises(CheckpointError, match=name) as refused:
        load(folder)
    sentence = str(refused.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert sentence == f"{refused.value.reason}: {sentence.rpartition(': ')[2]}"
    return sentence


FOREIGN: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 10**15, 10**40, 0.5, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "\ud800", [], [1], [[]], {}, {"a": 1}, {"": None}),
)


def test_a_record_with_a_foreign_part_is_refused_by_name_or_makes_a_whole_checkpoint(copy):
    whole, sentences, loaded = record_of(copy), [], []
    ways: list[tuple[Any, ...]] = [(key,) for key in whole]
    ways += [(key, place) for key in whole if isinstance(whole[key], dict) for place in whole[key]]
    ways += [(key, 0) for key in whole if isinstance(whole[key], list)]
    for way in ways:
        for value in FOREIGN:
            record = json.loads(json.dumps(whole))
            part = record if len(way) == 1 else record[way[0]]
            part[way[-1]] = value
            put(copy, record)
            try:
                found = load(copy)
            except CheckpointError as refusal:
                sentences.append(str(refusal))
                continue
            loaded.append(way)
            assert found.labels == ("animal", "plant") or way == ("labels", 0)
            row = inputs(found, found.held_out.rows[0])
            assert found.module(row).isfinite().all()
            assert found.open_frontend().encode("a text").ids.max() < found.frontend.vocabulary
    # What a network computes in eval mode does not depend on the rates, and all metrics are data.
    free = {"metrics", "provenance", "sample_texts", "labels"}
    assert {way for way in loaded if way[0] not in free} <= {
        *((key,) for key in free),
        *(("network", key) for key in whole["network"] if "dropout" in key or key == "causal"),
        ("network", "heads"),
        ("frontend", "start"),
        ("frontend", "lengths"),
    }
    assert len(sentences) > 400
    for sentence in sentences:
        assert str(copy) in sentence
        assert "\n" not in sentence
        assert len(sentence) < 600


@pytest.mark.parametrize("key", ["network", "frontend"])
def test_a_record_that_lacks_a_field_or_has_one_too_many_is_refused(copy, key):
    whole = record_of(copy)
    for field in whole[key]:
        rest = {name: value for name, value in whole[key].items() if name != field}
        if key == "frontend" and field not in ("kind", "vocabulary"):
            continue  # fields with a default, as bundles of earlier versions may lack them
        put(copy, whole | {key: rest})
        assert key in require_refusal(copy, field)
    put(copy, whole | {key: whole[key] | {"surplus": 1}})
    require_refusal(copy, "surplus")


@pytest.mark.parametrize("name", ["model.safetensors", "held_out.npz", "tokenizer.json"])
@pytest.mark.parametrize(
    "foreign",
    [b"", b"{}", b"[]", b"null", b"9" * 40, b"\xff" * 9, b"PK\x05\x06" + bytes(18), bytes(40)],
    ids=repr,
)
def test_foreign_files_of_the_recorded_sha256_are_refused_by_name(copy, name, foreign):
    put_file(copy, name, foreign)
    assert require_refusal(copy, name).endswith(": train again")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"embedding.table.weight": torch.ones(9, 9)}, "of the shape (9, 9), and the network's"),
        ({"head.bias": torch.ones(2).half()}, "head.bias in model.safetensors is torch.float16"),
        ({"head.bias": torch.full((2,), torch.nan)}, "holds numbers that are not finite"),
        ({"head.bias": None}, "model.safetensors lacks 'head.bias'"),
        ({"tail.bias": torch.ones(2)}, "model.safetensors holds an unknown 'tail.bias'"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(copy, change, reason):
    weights = safetensors.torch.load((copy / "model.safetensors").read_bytes()) | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    put_file(copy, "model.safetensors", safetensors.torch.save(weights))
    assert reason in require_refusal(copy, "model.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"ids": np.ones((40, 3), np.int32)},
            "has ids of the shape (3,), and the front end is bpe",
        ),
        ({"ids": np.ones(40)}, "ids in held_out.npz is float64 of the shape"),
        ({"ids": np.full(40, 10**6)}, "ids in held_out.npz must be from 0 to"),
        ({"ids": np.full(40, -1)}, "ids in held_out.npz must be from 0 to"),
        ({"labels": np.array([0, 2])}, "labels in held_out.npz must be from 0 to 1"),
        ({"labels": np.array([0, -1])}, "labels in held_out.npz must be from 0 to 1"),
        ({"labels": np.array([0, 1, 1])}, "do not divide its ids into rows"),
        ({"offsets": np.array([0, 50, 40])}, "do not divide its ids into rows"),
        ({"offsets": np.array([0, 0, 40])}, "do not divide its ids into rows"),
        ({"offsets": np.array([0, 20, 10**15])}, "do not divide its ids into rows"),
        ({"offsets": np.array(0)}, "offsets in held_out.npz is int64 of the shape ()"),
        ({"offsets": None}, "held_out.npz cannot be read"),
        (
            {"ids": np.ones(400, np.int32), "offsets": np.array([0, 1, 400])},
            "rows of up to 399 positions",
        ),
    ],
)
def test_held_out_rows_that_the_network_cannot_read_are_refused(copy, change, reason):
    arrays: dict[str, Any] = {
        "ids": np.ones(40, np.int32),
        "offsets": np.array([0, 20, 40]),
        "labels": np.array([0, 1]),
    }
    put_file(copy, "held_out.npz", npz_of(arrays))
    assert [len(row) for row in load(copy).held_out.rows] == [20, 20]
    changed = {name: array for name, array in (arrays | change).items() if array is not None}
    put_file(copy, "held_out.npz", npz_of(changed))
    assert reason in require_refusal(copy, r"held_out\.npz")


def test_a_tokenizer_of_another_training_is_refused(copy):
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(900)}, "w0"))
    put_file(copy, "tokenizer.json", tokenizer.to_str().encode())
    assert "has ids up to 899, and the network's table has 297 rows" in require_refusal(
        copy, "tokenizer"
    )


def become(kind: str, path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "a broken link":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "a link to the outside":
        outside = path.parents[1] / "outside"
        outside.write_bytes(data)
        path.symlink_to(outside)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "held_out.npz", "tokenizer.json", "checkpoint.json"]
)
@pytest.mark.parametrize(
    "kind",
    [
        *("a folder", "a FIFO", "a socket", "a broken link", "a link to itself"),
        *("a link to a device", "a link to the outside"),
    ],
)
def test_what_is_no_file_of_the_folder_is_refused_at_once(folder, tmp_path, name, kind):
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    become(kind, copied / name)
    if (name, kind) == ("checkpoint.json", "a link to the outside"):
        assert load(copied).labels == ("animal", "plant")  # it names no file outside by itself
    else:
        require_refusal(copied, name)


def test_a_link_within_the_folder_is_followed(copy):
    (copy / "model.safetensors").rename(copy / "weights")
    (copy / "model.safetensors").symlink_to("weights")
    assert load(copy).labels == ("animal", "plant")


@pytest.mark.parametrize(
    "name", ["../held_out.npz", "/etc/hostname", "sub/../held_out.npz", "..", ".", "", "other.npz"]
)
def test_a_record_cannot_name_files_that_are_not_a_checkpoints(copy, name):
    record = record_of(copy)
    record["files"][name] = "0" * 64
    put(copy, record)
    assert "which is no file of a checkpoint" in require_refusal(copy, r"checkpoint\.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "[" * 100_000, "9" * 5_000])
def test_a_record_that_is_not_one_is_refused(copy, text):
    (copy / "checkpoint.json").write_text(text)
    assert require_refusal(copy, r"checkpoint\.json").endswith(": train again")
