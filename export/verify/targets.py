"""Find the files and bundles that the paths of a command line name. None of them is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evalmode.bundle.manifest import MODEL_FILE
from evalmode.bundle.store import is_bundle

SUFFIX = ".onnx"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file or a bundle's folder to verify. If that is impossible, `problem` says why."""

    path: Path
    problem: str = ""

    @property
    def size_bytes(self) -> int:
        """The size of its ONNX file; 0 if its size cannot be read."""
        file = self.path / MODEL_FILE if self.path.is_dir() else self.path
        try:
            return file.stat().st_size
        except OSError:
            return 0


def find_targets(paths: Iterable[Path]) -> tuple[Target, ...]:
    """All files and bundles that the paths name, each once, sorted by path.

    A folder with a manifest is a bundle. Any other folder is searched, at any depth, for bundles
    and .onnx files; hidden files and folders are skipped there. A folder that holds nothing is a
    target with a problem.
    """
    targets: dict[str, Target] = {}
    for path in paths:
        if not path.is_dir() or is_bundle(path):
            inside = [_target(path)]
        else:
            inside = list(_search(path))
            if not inside:
                problem = f"{path} holds no {SUFFIX} file and no bundle"
                inside = [Target(path=path, problem=problem)]
        for target in inside:
            targets.setdefault(os.path.abspath(target.path), target)
    return tuple(sorted(targets.values(), key=lambda target: target.path.parts))


def _search(folder: Path) -> Iterator[Target]:
    errors: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=errors.append):
        visible = [name for name in folders if not name.startswith(".")]
        bundles = [name for name in visible if is_bundle(Path(parent, name))]
        # os.walk enters the folders that remain in this list. A bundle is one target, so it is not
        # searched for the .onnx file in it.
        folders[:] = [name for name in visible if name not in bundles]
        models = [
            name for name in files if name.lower().endswith(SUFFIX) and not name.startswith(".")
        ]
        for name in (*bundles, *models):
            yield _target(Path(parent, name))
    for error in errors:
        problem = f"{error.filename} cannot be read: {error.strerror}"
        yield Target(path=Path(error.filename), problem=problem)


def _target(path: Path) -> Target:
    # A pipe or a device may have no end.
    if path.exists() and not (path.is_file() or path.is_dir()):
        return Target(path=path, problem=f"{path} is neither a file nor a folder")
    return Target(path=path)
