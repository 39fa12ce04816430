"""Broken states and full disks: each is refused with a message of one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from evalmode.errors import EvalmodeError
from evalmode.model import checkpoint
from evalmode.model.resume import (
    RUN_FILE,
    STATE_FILE,
    STATE_FOLDER,
    AtomicCheckpointIO,
    RunMismatch,
    StateNotWritten,
    StateUnusable,
    read_record,
    read_state,
    require_usable_folder,
)
from tests.model.conftest import Killed, contents, train, watch_steps


@contextmanager
def full_disk_after(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def cut(size: int) -> Callable[[Path], None]:
    """Damage: only the first `size` bytes of a file are left; all but the last, if negative."""

    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:size])

    return damage


def flip(position: float) -> Callable[[Path], None]:
    """Damage: one flipped bit, in the first byte at position 0 and in the last at position 1."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        cut(0),
        cut(7),
        cut(32),
        cut(5_000),
        cut(-1_000),
        cut(-1),
        flip(0),
        flip(0.001),
        # In a tensor: torch reads it without an error.
        flip(0.5),
        flip(1),
        lambda path: path.write_bytes(bytes(20_000)),
        lambda path: torch.save({"weights": torch.ones(9)}, path),
        replace_by_folder,
    ],
)
def test_a_broken_state_is_refused_before_any_work(data, out, damage):
    damage(out / STATE_FOLDER / STATE_FILE)
    # The data does not exist: the state must be refused before the data is read.
    with pytest.raises(StateUnusable) as refusal:
        train(data.with_name("absent.csv"), out, resume=True)
    assert str(out / STATE_FOLDER / STATE_FILE) in str(refusal.value)
    assert "start over with --overwrite, or choose another --out" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert train(data, out, overwrite=True).epochs == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", None])
def test_a_broken_record_of_the_run_is_refused(data, out, content):
    run = out / STATE_FOLDER / RUN_FILE
    if content is None:
        run.unlink()
    else:
        run.write_text(content)
    with pytest.raises(StateUnusable, match=rf"{RUN_FILE} .*start over with --overwrite"):
        train(data, out, resume=True)


def test_a_loaded_state_is_saved_as_the_same_bytes(out, tmp_path):
    state = AtomicCheckpointIO().load_checkpoint(out / STATE_FOLDER / STATE_FILE)
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (out / STATE_FOLDER / STATE_FILE).read_bytes()


def test_a_state_that_does_not_fit_on_the_disk_leaves_the_previous_one(data, out):
    before = contents(out / STATE_FOLDER)
    with full_disk_after(20_000), pytest.raises(StateNotWritten) as refusal:
        train(data, out, resume=True)
    assert str(out / STATE_FOLDER / STATE_FILE) in str(refusal.value)
    assert "File too large" in str(refusal.value)
    assert "free disk space or make it writable, then continue with --resume" in str(refusal.value)
    assert contents(out / STATE_FOLDER) == before
    assert train(data, out, resume=True).epochs == 2


def test_a_first_state_that_does_not_fit_on_the_disk_leaves_nothing(data, tmp_path):
    with full_disk_after(20_000), pytest.raises(StateNotWritten):
        train(data, tmp_path / "runs" / "new")
    assert not (tmp_path / "runs" / "new").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk_can_be_written_later(data, out, monkeypatch):
    save = checkpoint.save

    def on_full_disk(finished, folder):
        with full_disk_after(20_000):
            save(finished, folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", on_full_disk)
        with pytest.raises(EvalmodeError, match=r"model\.safetensors.* continue with --resume"):
            train(data, out, resume=True)
    assert {path.name for path in out.iterdir()} == {STATE_FOLDER}
    steps = watch_steps(monkeypatch)
    assert train(data, out, resume=True).epochs == 2
    assert steps == []


def test_a_finished_training_is_replaced_only_with_overwrite(data, tmp_path):
    first = train(data, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(EvalmodeError, match="holds a finished training: use it as it is with"):
        train(data.with_name("absent.csv"), tmp_path / "run", seed=1)
    with pytest.raises(RunMismatch, match="seed was 0 and is now 1"):
        train(data, tmp_path / "run", seed=1, resume=True)
    assert contents(tmp_path / "run") == before
    assert train(data, tmp_path / "run", resume=True).weights_sha256 == first.weights_sha256
    replaced = train(data, tmp_path / "run", seed=1, overwrite=True)
    assert replaced.weights_sha256 != first.weights_sha256


def test_a_finished_training_stays_until_the_new_one_is_finished(data, tmp_path, monkeypatch):
    train(data, tmp_path / "run")
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        watch_steps(patch, die_at=7)
        with pytest.raises(Killed):
            train(data, tmp_path / "run", seed=1, overwrite=True)
    assert (tmp_path / "run" / STATE_FOLDER / STATE_FILE).exists()
    for name, value in before.items():
        assert (tmp_path / "run" / name).read_bytes() == value
    resumed = train(data, tmp_path / "run", seed=1, resume=True)
    assert contents(tmp_path / "run") == contents(train(data, tmp_path / "new", seed=1).checkpoint)
    assert resumed.epochs == 2


def test_an_unfinished_training_is_replaced_only_with_overwrite(data, out):
    with pytest.raises(EvalmodeError, match="holds an unfinished training: continue with --resume"):
        train(data, out, seed=1)
    assert train(data, out, seed=1, overwrite=True).epochs == 2


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "held_out.npz"])
def test_a_broken_checkpoint_does_not_count_as_a_finished_training(data, tmp_path, name):
    train(data, tmp_path)
    cut(-10)(tmp_path / name)
    with pytest.raises(EvalmodeError, match=rf"{name}.*start over with --overwrite"):
        train(data, tmp_path, resume=True)
    train(data, tmp_path, overwrite=True)


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(EvalmodeError, match="use only one of them"):
        require_usable_folder(tmp_path, resume=True, overwrite=True)


def test_an_out_that_cannot_be_a_folder_is_refused_and_nothing_is_created(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    blocked = [tmp_path / "file", tmp_path / "broken", tmp_path / "loop", Path("/dev/full")]
    for out in (*blocked, *(path / "run" for path in blocked)):
        with pytest.raises(EvalmodeError, match="is not a folder: choose another --out"):
            require_usable_folder(out, resume=False, overwrite=False)
    require_usable_folder(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "broken", "loop"}


@pytest.mark.parametrize(
    "name", ["checkpoint.json", "model.safetensors", "held_out.npz", "tokenizer.json", STATE_FOLDER]
)
def test_a_folder_in_place_of_a_file_or_the_reverse_is_refused_before_any_work(
    data, tmp_path, name
):
    path = tmp_path / name
    path.touch() if name == STATE_FOLDER else path.mkdir()
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(EvalmodeError, match=rf"{name} is .*: choose another --out$") as refusal:
            train(data.with_name("absent.csv"), tmp_path, **options)
        assert str(tmp_path) in str(refusal.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_place_of_the_state_folder_is_not_followed(data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STATE_FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvalmodeError, match=r"no training can be written to .*choose another"):
        train(data, tmp_path / "run")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]


def test_a_broken_link_in_place_of_a_finished_training_is_not_replaced(data, tmp_path):
    (tmp_path / "checkpoint.json").symlink_to("nowhere")
    with pytest.raises(EvalmodeError, match=r"checkpoint\.json cannot be read.*start over"):
        train(data, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]


@pytest.mark.parametrize(
    "provenance", [None, [], {}, "x", {"training": 3}, {"training": {}, "data": []}]
)
def test_a_finished_training_without_its_provenance_is_refused_in_one_sentence(
    data, tmp_path, provenance
):
    train(data, tmp_path)
    record = json.loads((tmp_path / "checkpoint.json").read_text())
    (tmp_path / "checkpoint.json").write_text(json.dumps(record | {"provenance": provenance}))
    with pytest.raises(EvalmodeError, match=r"checkpoint\.json .*: start over with") as refusal:
        train(data, tmp_path, resume=True)
    assert str(refusal.value).count(": start over") == 1
    assert "train again" not in str(refusal.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EvalmodeError, match="may not be written to"):
            require_usable_folder(tmp_path / "run", resume=False, overwrite=False)
    finally:
        tmp_path.chmod(0o700)


def test_the_record_of_a_run_contains_no_path(out):
    record = json.loads((out / STATE_FOLDER / RUN_FILE).read_text())
    assert record["data"] == "rows.csv"
    assert not {"separator", "max_minutes"} & record.keys()


@pytest.mark.parametrize("name", [RUN_FILE, STATE_FILE])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read = read_record if name == RUN_FILE else read_state
    with pytest.raises(StateUnusable, match=rf"{name} .*start over with --overwrite"):
        read(tmp_path / name)
