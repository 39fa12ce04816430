"""Which files and bundles the paths of a command line mean."""

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


def found(*paths: str) -> list[str]:
    return [target.path.as_posix() for target in find_targets(map(Path, paths))]


def test_a_folder_is_searched_for_models_and_bundles_in_the_order_of_their_paths(
    folder: Path,
) -> None:
    assert found(".") == ["a/deep/er/m.onnx", "a/z.ONNX", "b.onnx", "bundles/x/1"]


def test_a_bundle_is_one_target_and_what_it_holds_is_none(folder: Path) -> None:
    assert found("bundles/x/1") == ["bundles/x/1"]
    assert found("bundles") == ["bundles/x/1"]


def test_the_order_is_that_of_the_paths_and_not_of_the_arguments(folder: Path) -> None:
    assert found("b.onnx", "bundles", "a") == found("a", "b.onnx", "bundles")


def test_what_is_named_twice_is_examined_once(folder: Path) -> None:
    assert found("a", "a/z.ONNX", "./a/../a/z.ONNX", str(folder / "a/z.ONNX")) == [
        "a/deep/er/m.onnx",
        "a/z.ONNX",
    ]


def test_what_is_named_is_examined_whatever_it_is_called(folder: Path) -> None:
    assert found(".hidden", "a/._m.onnx", "a/weights.bin") == [
        ".hidden/m.onnx",
        "a/._m.onnx",
        "a/weights.bin",
    ]


def test_a_folder_that_holds_nothing_says_so(folder: Path) -> None:
    (target,) = find_targets([Path("empty")])
    assert target == Target(path=Path("empty"), problem="empty holds no .onnx file and no bundle")


def test_a_link_that_leads_back_ends_the_search_and_a_link_to_nowhere_is_a_target(
    folder: Path,
) -> None:
    (folder / "a/again").symlink_to(folder)
    (folder / "a/gone.onnx").symlink_to(folder / "nowhere")
    assert found("a") == ["a/deep/er/m.onnx", "a/gone.onnx", "a/z.ONNX"]


def test_a_pipe_is_not_read_and_a_path_that_is_not_there_is_unreadable(folder: Path) -> None:
    os.mkfifo(folder / "pipe.onnx")
    absent, pipe = map(examine, find_targets([Path("pipe.onnx"), Path("absent.onnx")]))
    assert isinstance(pipe, Unreadable)
    assert pipe.why == "pipe.onnx is neither a file nor a folder"
    assert isinstance(absent, Unreadable)
    assert "absent.onnx cannot be read: No such file" in absent.why


def test_the_size_of_a_target_is_that_of_its_model(folder: Path) -> None:
    sizes = {
        target.path.as_posix(): target.bytes for target in find_targets([Path(), Path("absent")])
    }
    assert sizes["b.onnx"] == len("b.onnx")
    assert sizes["bundles/x/1"] == len("bundles/x/1/model.onnx")
    assert sizes["absent"] == 0


def test_a_bundle_whose_manifest_is_a_pipe_is_a_broken_bundle_and_its_model_no_bare_file(
    folder: Path,
) -> None:
    (folder / "bundles/x/1/manifest.json").unlink()
    os.mkfifo(folder / "bundles/x/1/manifest.json")
    for above in ("bundles/x/1", "bundles"):
        assert found(above) == ["bundles/x/1"]
    (target,) = find_targets([Path("bundles")])
    assert isinstance(examine(target), Unreadable)
