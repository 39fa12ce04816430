"""Checkpoints on disk: loading gives what was saved, and a broken file is refused by name."""

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
from evalmode.model.checkpoint import CheckpointError, load, save
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


def as_batch(row: np.ndarray) -> torch.Tensor:
    """The row (T,) as a batch of one row, (1, T)."""
    return torch.from_numpy(row).unsqueeze(0)


def test_a_loaded_checkpoint_is_saved_as_the_same_bytes(folder, tmp_path):
    save(load(folder), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_checkpoint_holds_what_an_export_needs(folder):
    checkpoint = load(folder)
    assert not checkpoint.module.training
    assert checkpoint.labels == ("animal", "plant")
    assert (
        len(checkpoint.held_out.rows)
        == len(checkpoint.held_out.labels)
        == checkpoint.metrics["test"]["rows"]
    )
    assert all(row.dtype == np.int64 and row.ndim == 1 for row in checkpoint.held_out.rows)
    is_right = [
        int(checkpoint.module(as_batch(row)).argmax()) == label
        for row, label in zip(checkpoint.held_out.rows, checkpoint.held_out.labels, strict=True)
    ]
    assert np.mean(is_right) == pytest.approx(checkpoint.metrics["test"]["accuracy"])


def test_the_sample_texts_include_the_empty_text_and_one_that_is_truncated(folder):
    checkpoint = load(folder)
    frontend = checkpoint.open_frontend()
    assert "" in checkpoint.sample_texts
    assert len(checkpoint.sample_texts) > 8
    assert any(frontend.encode(text).truncated for text in checkpoint.sample_texts)


def test_a_folded_copy_answers_like_the_module_and_the_module_is_unchanged(folder):
    checkpoint = load(folder)
    folded, row = checkpoint.folded(), as_batch(checkpoint.held_out.rows[0])
    torch.testing.assert_close(folded(row), checkpoint.module(row), rtol=1e-4, atol=1e-5)
    assert all(module.folded for module in folded.modules() if isinstance(module, ClassicDropout))
    assert not any(
        module.folded
        for module in checkpoint.module.modules()
        if isinstance(module, ClassicDropout)
    )


def test_the_provenance_names_the_data_by_hash_and_contains_no_path(folder, data):
    record = (folder / "checkpoint.json").read_text()
    assert len(json.loads(record)["provenance"]["data"]["sha256"]) == 64
    assert str(data.parent) not in record
    assert str(folder) not in record


@pytest.mark.parametrize(
    "name", ["model.safetensors", "held_out.npz", "tokenizer.json", "checkpoint.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_missing_or_damaged_file_is_refused_by_name(copy, name, damage):
    path = copy / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CheckpointError, match=name) as refusal:
        load(copy)
    assert isinstance(refusal.value, EvalmodeError)


def test_compressed_held_out_rows_of_an_earlier_version_are_read(copy):
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


def test_another_format_is_refused_with_a_remedy(copy):
    record = json.loads((copy / "checkpoint.json").read_text())
    (copy / "checkpoint.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(
        CheckpointError, match="format 99, and this evalmode reads the formats 1 and 2: train again"
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


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match="a checkpoint is a folder that `evalmode train` has finished"
    ):
        load(tmp_path / "nowhere")


def record_of(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "checkpoint.json").read_text())
    assert isinstance(record, dict)
    return record


def write_record(folder: Path, record: object) -> None:
    (folder / "checkpoint.json").write_text(json.dumps(record))


def write_listed_file(folder: Path, name: str, data: bytes) -> None:
    """Write a file, and its sha256 into the record."""
    (folder / name).write_bytes(data)
    record = record_of(folder)
    record["files"][name] = hashlib.sha256(data).hexdigest()
    write_record(folder, record)


def require_refusal(folder: Path, name: str) -> str:
    """The message with which `load` refuses the folder: one short line that names the file."""
    with pytest.raises(CheckpointError, match=name) as refusal:
        load(folder)
    message = str(refusal.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 600
    assert message == f"{refusal.value.reason}: {message.rpartition(': ')[2]}"
    return message


FOREIGN: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 10**15, 10**40, 0.5, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "\ud800", [], [1], [[]], {}, {"a": 1}, {"": None}),
)


def test_a_record_with_a_foreign_value_is_refused_or_makes_a_usable_checkpoint(copy):
    original, messages, loaded = record_of(copy), [], set()
    # Every key of the record, every key of its tables, and the first entry of its lists.
    paths: list[tuple[Any, ...]] = []
    for key, value in original.items():
        paths.append((key,))
        if isinstance(value, dict):
            paths += [(key, inner) for inner in value]
        elif isinstance(value, list):
            paths.append((key, 0))
    for path in paths:
        for value in FOREIGN:
            record = json.loads(json.dumps(original))
            part = record if len(path) == 1 else record[path[0]]
            part[path[-1]] = value
            write_record(copy, record)
            try:
                checkpoint = load(copy)
            except CheckpointError as refusal:
                messages.append(str(refusal))
                continue
            loaded.add(path)
            assert checkpoint.labels == ("animal", "plant") or path == ("labels", 0)
            row = as_batch(checkpoint.held_out.rows[0])
            assert checkpoint.module(row).isfinite().all()
            ids = checkpoint.open_frontend().encode("a text").ids
            assert ids.max() < checkpoint.frontend.vocabulary
    # In eval mode the rates do not matter, and the values of these four keys are only data.
    free_keys = {"metrics", "provenance", "sample_texts", "labels"}
    assert {path for path in loaded if path[0] not in free_keys} <= {
        *(("network", key) for key in original["network"] if "dropout" in key or key == "causal"),
        ("network", "heads"),
        ("frontend", "start"),
        ("frontend", "lengths"),
    }
    assert len(messages) > 400
    for message in messages:
        assert str(copy) in message
        assert "\n" not in message
        assert len(message) < 600


@pytest.mark.parametrize("key", ["network", "frontend"])
def test_a_record_that_lacks_a_field_or_has_an_unknown_one_is_refused(copy, key):
    original = record_of(copy)
    for field in original[key]:
        rest = {name: value for name, value in original[key].items() if name != field}
        if key == "frontend" and field not in ("kind", "vocabulary"):
            # Fields with a default, because bundles of earlier versions may lack them.
            continue
        write_record(copy, original | {key: rest})
        assert key in require_refusal(copy, field)
    write_record(copy, original | {key: original[key] | {"surplus": 1}})
    require_refusal(copy, "surplus")


@pytest.mark.parametrize("name", ["model.safetensors", "held_out.npz", "tokenizer.json"])
@pytest.mark.parametrize(
    "foreign",
    [b"", b"{}", b"[]", b"null", b"9" * 40, b"\xff" * 9, b"PK\x05\x06" + bytes(18), bytes(40)],
    ids=repr,
)
def test_a_foreign_file_with_the_recorded_sha256_is_refused_by_name(copy, name, foreign):
    write_listed_file(copy, name, foreign)
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
def test_weights_that_do_not_fit_the_network_are_refused(copy, change, reason):
    weights = safetensors.torch.load((copy / "model.safetensors").read_bytes()) | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    write_listed_file(copy, "model.safetensors", safetensors.torch.save(weights))
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
    write_listed_file(copy, "held_out.npz", npz_of(arrays))
    assert [len(row) for row in load(copy).held_out.rows] == [20, 20]
    changed = {name: array for name, array in (arrays | change).items() if array is not None}
    write_listed_file(copy, "held_out.npz", npz_of(changed))
    assert reason in require_refusal(copy, r"held_out\.npz")


def test_offsets_of_a_narrow_type_that_fall_are_refused(copy):
    # From 100 to -100 an int8 rises by 56, because -200 does not fit into it.
    offsets = np.array([0, 100, -100, 20], np.int8)
    assert (np.diff(offsets) > 0).all()
    arrays = {"ids": np.ones(20, np.int32), "offsets": offsets, "labels": np.array([0, 1, 0])}
    write_listed_file(copy, "held_out.npz", npz_of(arrays))
    assert "do not divide its ids into rows" in require_refusal(copy, r"held_out\.npz")


def test_a_tokenizer_with_ids_beyond_the_table_is_refused(copy):
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(900)}, "w0"))
    write_listed_file(copy, "tokenizer.json", tokenizer.to_str().encode())
    assert "has ids up to 899, and the network's table has 297 rows" in require_refusal(
        copy, "tokenizer"
    )


def replace_by(kind: str, path: Path) -> None:
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
def test_anything_but_a_file_in_the_folder_is_refused_at_once(folder, tmp_path, name, kind):
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    replace_by(kind, copied / name)
    if (name, kind) == ("checkpoint.json", "a link to the outside"):
        # The user may place the record elsewhere. Only the files that it lists must not leave.
        assert load(copied).labels == ("animal", "plant")
    else:
        require_refusal(copied, name)


def test_a_link_within_the_folder_is_followed(copy):
    (copy / "model.safetensors").rename(copy / "weights")
    (copy / "model.safetensors").symlink_to("weights")
    assert load(copy).labels == ("animal", "plant")


@pytest.mark.parametrize(
    "name", ["../held_out.npz", "/etc/hostname", "sub/../held_out.npz", "..", ".", "", "other.npz"]
)
def test_a_record_cannot_list_other_files_than_those_of_a_checkpoint(copy, name):
    record = record_of(copy)
    record["files"][name] = "0" * 64
    write_record(copy, record)
    assert "which is not a file of a checkpoint" in require_refusal(copy, r"checkpoint\.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "[" * 100_000, "9" * 5_000])
def test_a_record_that_is_not_a_json_object_is_refused(copy, text):
    (copy / "checkpoint.json").write_text(text)
    assert require_refusal(copy, r"checkpoint\.json").endswith(": train again")
