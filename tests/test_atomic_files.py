"""On a full disk the old files stay as they were, and no partial file is left."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from evalmode.atomic_files import replace_files, write_file


@pytest.fixture
def _no_room() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("_no_room")
def test_on_a_full_disk_the_old_file_stays(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="File too large"):
        write_file(tmp_path / "a", bytes(5_000))
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.usefixtures("_no_room")
def test_on_a_full_disk_all_old_files_stay(tmp_path: Path) -> None:
    replace_files(tmp_path, {"a": b"1", "b": b"2", "record": b"of both"})
    with pytest.raises(OSError, match="File too large") as refused:
        replace_files(tmp_path, {"a": b"3", "b": bytes(5_000), "record": b"another"})
    assert refused.value.filename == str(tmp_path / "b")
    assert contents(tmp_path) == {"a": b"1", "b": b"2", "record": b"of both"}


def test_files_are_replaced_together(tmp_path: Path) -> None:
    replace_files(tmp_path / "new", {"a": b"1", "record": b"of it"})
    replace_files(tmp_path / "new", {"a": b"2", "record": b"of that"})
    assert contents(tmp_path / "new") == {"a": b"2", "record": b"of that"}


def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    replace_files(tmp_path, {"a": b"1", "record": b"of it"})
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        replace_files(tmp_path, {"a": b"2", "b": b"3", "record": b"of those"})
    assert refused.value.filename == str(tmp_path / "b")
    (tmp_path / "b").rmdir()
    assert contents(tmp_path) == {"a": b"1", "record": b"of it"}
