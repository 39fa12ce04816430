"""Which files and bundles are the targets of the paths on a command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evalmode.export.verify.targets import Target, find_targets
from evalmode.export.verify.verify import Unreadable, examine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = [
        "b.onnx",
        "a/z.ONNX",
        "a/deep/er/m.onnx",
        "a/weights.bin",
        "bundles/x/1/manifest.json",
        "bundles/x/1/model.onnx",
        "bundles/x/1/inside/other.onnx",
        "bundles/.x-half/manifest.json",
        ".hidden/m.onnx",
        "a/._m.onnx",
        "empty/readme.txt",
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x" * len(file))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths_found_in(*paths: str) -> list[str]:
    return [target.path.as_posix() for target in find_targets(map(Path, paths))]


def test_a_folder_is_searched_for_models_and_bundles_in_the_order_of_their_paths(
    folder: Path,
) -> None:
    assert paths_found_in(".") == ["a/deep/er/m.onnx", "a/z.ONNX", "b.onnx", "bundles/x/1"]


def test_a_bundle_is_one_target_and_its_files_are_not_targets(folder: Path) -> None:
    assert paths_found_in("bundles/x/1") == ["bundles/x/1"]
    assert paths_found_in("bundles") == ["bundles/x/1"]


def test_targets_are_sorted_by_path_whatever_the_order_of_the_arguments(folder: Path) -> None:
    assert paths_found_in("b.onnx", "bundles", "a") == paths_found_in("a", "b.onnx", "bundles")


def test_a_path_that_is_named_twice_is_one_target(folder: Path) -> None:
    assert paths_found_in("a", "a/z.ONNX", "./a/../a/z.ONNX", str(folder / "a/z.ONNX")) == [
        "a/deep/er/m.onnx",
        "a/z.ONNX",
    ]


def test_a_file_that_is_named_is_a_target_whatever_its_name(folder: Path) -> None:
    assert paths_found_in(".hidden", "a/._m.onnx", "a/weights.bin") == [
        ".hidden/m.onnx",
        "a/._m.onnx",
        "a/weights.bin",
    ]


def test_a_folder_without_models_is_a_target_with_a_problem(folder: Path) -> None:
    (target,) = find_targets([Path("empty")])
    assert target == Target(path=Path("empty"), problem="empty holds no .onnx file and no bundle")


def test_a_circular_link_is_not_followed_and_a_broken_link_is_a_target(
    folder: Path,
) -> None:
    (folder / "a/again").symlink_to(folder)
    (folder / "a/gone.onnx").symlink_to(folder / "nowhere")
    assert paths_found_in("a") == ["a/deep/er/m.onnx", "a/gone.onnx", "a/z.ONNX"]


def test_a_pipe_and_an_absent_path_are_unreadable(folder: Path) -> None:
    os.mkfifo(folder / "pipe.onnx")
    absent, pipe = map(examine, find_targets([Path("pipe.onnx"), Path("absent.onnx")]))
    assert isinstance(pipe, Unreadable)
    assert pipe.why == "pipe.onnx is neither a file nor a folder"
    assert isinstance(absent, Unreadable)
    assert "absent.onnx cannot be read: No such file" in absent.why


def test_the_size_of_a_target_is_the_size_of_its_model(folder: Path) -> None:
    sizes = {
        target.path.as_posix(): target.size_bytes
        for target in find_targets([Path(), Path("absent")])
    }
    assert sizes["b.onnx"] == len("b.onnx")
    assert sizes["bundles/x/1"] == len("bundles/x/1/model.onnx")
    assert sizes["absent"] == 0


def test_a_bundle_whose_manifest_is_a_pipe_is_an_unreadable_bundle(
    folder: Path,
) -> None:
    (folder / "bundles/x/1/manifest.json").unlink()
    os.mkfifo(folder / "bundles/x/1/manifest.json")
    for parent in ("bundles/x/1", "bundles"):
        assert paths_found_in(parent) == ["bundles/x/1"]
    (target,) = find_targets([Path("bundles")])
    assert isinstance(examine(target), Unreadable)
