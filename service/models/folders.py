"""Finds the bundles below a folder, and whether one has changed since the last look. Opens none.

The name of a folder means nothing: the identity of a bundle is in its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from evalmode.bundle.errors import BundleError
from evalmode.bundle.manifest import MANIFEST_FILE, Manifest
from evalmode.bundle.store import is_bundle, read_file

# For each file of a folder: its path there, its size, the time of its last change in ns, and its
# inode. The signature differs whenever a file was written.
FilesSignature: TypeAlias = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The folder of a bundle.

    Attributes:
        path: its path.
        identity: the name and the version in its manifest; None if that cannot be read.
        signature: the signature of its files.
    """

    path: Path
    identity: tuple[str, str] | None
    signature: FilesSignature


def find_folders(root: Path, *, earlier: Mapping[Path, Folder]) -> list[Folder]:
    """The folders of bundles, sorted by path: `root` itself, or those one or two levels below it.
    Hidden folders are left out.

    A manifest is read again only if the signature differs from that in `earlier`, the folders of
    the last look by path.
    """
    if is_bundle(root):
        paths = [root]
    else:
        paths = []
        for pattern in (f"*/{MANIFEST_FILE}", f"*/*/{MANIFEST_FILE}"):
            for file in root.glob(pattern):
                parts = file.parent.relative_to(root).parts
                if not any(part.startswith(".") for part in parts):
                    paths.append(file.parent)

    folders = []
    for path in sorted(paths):
        folder, signature = earlier.get(path), signature_of(path)
        if folder is None or folder.signature != signature:
            identity: tuple[str, str] | None = None
            with suppress(BundleError, ValidationError):
                manifest = Manifest.model_validate_json(read_file(path / MANIFEST_FILE))
                identity = manifest.name, manifest.version
            folder = Folder(path=path, identity=identity, signature=signature)
        folders.append(folder)
    return folders


def signature_of(path: Path) -> FilesSignature:
    """The signature of the files of a folder now."""
    files = []
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            relative_path = str(file.relative_to(path))
            try:
                status = file.stat()
            except OSError:
                # The file was deleted since it was listed, or it is a broken link.
                files.append((relative_path, -1, 0, 0))
            else:
                files.append((relative_path, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(files))
