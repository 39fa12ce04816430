"""Which bundles lie below a folder, and whether one has changed since the last look. Opens none.

The name of a folder means nothing: the identity of a bundle is in its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from evalmode.bundle.errors import BundleError
from evalmode.bundle.manifest import MANIFEST_FILE, Manifest
from evalmode.bundle.store import is_bundle, read_file

# Path below the folder, size, time of change in ns, and inode, of every file: it changes whenever a
# file is written.
FilesSignature: TypeAlias = tuple[tuple[str, int, int, int], ...]

_PATTERNS = ("*", "*/*")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A bundle's folder: the identity in its manifest (None: it cannot be read), and the signature
    of its files.
    """

    path: Path
    identity: tuple[str, str] | None
    signature: FilesSignature


def look(root: Path, *, known: Mapping[Path, Folder]) -> list[Folder]:
    """The bundles' folders, by path: `root` itself, or those one or two levels below it that are
    not hidden.

    A manifest is read again only when the signature differs from the `known` one.
    """
    folders = []
    for path in _paths(root):
        folder, signature = known.get(path), _signature(path)
        if folder is None or folder.signature != signature:
            folder = Folder(path=path, identity=_identity(path), signature=signature)
        folders.append(folder)
    return folders


def _paths(root: Path) -> list[Path]:
    if is_bundle(root):
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
        manifest = Manifest.model_validate_json(read_file(path / MANIFEST_FILE))
    except (BundleError, ValidationError):
        return None
    return manifest.name, manifest.version


def _signature(path: Path) -> FilesSignature:
    return tuple(sorted(_files(path)))


def _files(path: Path) -> Iterator[tuple[str, int, int, int]]:
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            try:
                status = file.stat()
            except OSError:  # deleted since it was listed, or a broken link
                yield str(file.relative_to(path)), -1, 0, 0
            else:
                yield str(file.relative_to(path)), status.st_size, status.st_mtime_ns, status.st_ino
