"""Which bundles lie below a folder, and whether one has changed since it was looked at. Opens none
and trusts no name.

A folder says nothing by its name: who a bundle is stands in its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from evalmode.bundle.manifest import MANIFEST_FILE, Manifest

# Path below the folder, size, time of change in ns, and inode, of every file: another one whenever
# a file is written.
Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]

_PATTERNS = ("*", "*/*")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A bundle's folder as it was found: who its manifest says it is (None: it cannot be read), and
    its signature.
    """

    path: Path
    identity: tuple[str, str] | None
    signature: Signature


def look(root: Path, *, known: Mapping[Path, Folder]) -> list[Folder]:
    """The bundles' folders, by path: `root` itself, or those one or two levels below it that are
    not hidden.

    What has not changed since it was `known` is not read again.
    """
    found = []
    for path in _paths(root):
        before, signature = known.get(path), _signature(path)
        if before is not None and before.signature == signature:
            found.append(before)
        else:
            found.append(Folder(path=path, identity=_identity(path), signature=signature))
    return found


def _paths(root: Path) -> list[Path]:
    if (root / MANIFEST_FILE).is_file():
        return [root]
    paths = {
        file.parent for pattern in _PATTERNS for file in root.glob(f"{pattern}/{MANIFEST_FILE}")
    }
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _identity(path: Path) -> tuple[str, str] | None:
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return manifest.name, manifest.version


def _signature(path: Path) -> Signature:
    return tuple(sorted(_files(path)))


def _files(path: Path) -> Iterator[tuple[str, int, int, int]]:
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            try:
                found = file.stat()
            except OSError:  # gone since it was listed, or a link that leads nowhere
                yield str(file.relative_to(path)), -1, 0, 0
            else:
                yield str(file.relative_to(path)), found.st_size, found.st_mtime_ns, found.st_ino
