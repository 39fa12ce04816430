"""Which files and bundles the paths of a command line mean. Opens none of them.

Knows no rule.
"""

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
    """A file or a bundle's folder to verify; `problem` is the sentence that says why it cannot
    be.
    """

    path: Path
    problem: str = ""

    @property
    def bytes(self) -> int:
        """The size of its ONNX file, as far as it can be told without opening it."""
        file = self.path / MODEL_FILE if self.path.is_dir() else self.path
        try:
            return file.stat().st_size
        except OSError:
            return 0


def find_targets(paths: Iterable[Path]) -> tuple[Target, ...]:
    """Every file and bundle that is meant, each once, in the order of their paths.

    A folder with a manifest is a bundle; another one is searched, at any depth, for bundles and
    .onnx files. Hidden files and folders are not looked at unless they are named. What is not
    there, and a folder that holds nothing, is a target with a problem.
    """
    found: dict[str, Target] = {}
    for path in paths:
        for target in _meant_by(path):
            found.setdefault(os.path.abspath(target.path), target)
    return tuple(sorted(found.values(), key=lambda target: target.path.parts))


def _meant_by(path: Path) -> Iterator[Target]:
    if not path.is_dir() or is_bundle(path):
        yield _target(path)
        return
    inside = [*_search(path)]
    yield from inside or [Target(path=path, problem=f"{path} holds no {SUFFIX} file and no bundle")]


def _search(folder: Path) -> Iterator[Target]:
    unread: list[OSError] = []
    for here, folders, files in os.walk(folder, onerror=unread.append):
        visible = [name for name in folders if not name.startswith(".")]
        bundles = [name for name in visible if is_bundle(Path(here, name))]
        # os.walk goes where this list says
        folders[:] = [name for name in visible if name not in bundles]
        models = [
            name for name in files if name.lower().endswith(SUFFIX) and not name.startswith(".")
        ]
        yield from (_target(Path(here, name)) for name in (*bundles, *models))
    for error in unread:
        yield Target(
            path=Path(error.filename), problem=f"{error.filename} cannot be read: {error.strerror}"
        )


def _target(path: Path) -> Target:
    # A pipe or a device may have no end.
    odd = path.exists() and not (path.is_file() or path.is_dir())
    return Target(path=path, problem=f"{path} is neither a file nor a folder" if odd else "")
