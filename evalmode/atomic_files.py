"""Atomic writes: after a crash at any moment there is the old content or all of the new."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file, in place of the one that is there.

    Raises OSError when it cannot be written, and leaves the old one as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _draft_of(path).write_bytes(data)
        _publish(path)
    except OSError:
        with suppress(OSError):
            _draft_of(path).unlink(missing_ok=True)
        raise


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files in place of those in `folder`. The last one marks the others as complete.

    1. All drafts are written. Where the disk is full, the old files stay.
    2. The last file is removed, so that a crash from here on shows.
    3. Each draft is moved into place, the last file at the end.

    Raises OSError, whose `filename` is the file that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in contents]
    for path in paths:
        # A folder cannot be replaced by a file. This must not show after half of the files.
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for path, data in zip(paths, contents.values(), strict=True):
        try:
            _draft_of(path).write_bytes(data)
            _flush(_draft_of(path))
        except OSError as error:
            error.filename = str(path)  # the error of a write has no file name
            for draft in map(_draft_of, paths):
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
            raise
    paths[-1].unlink(missing_ok=True)
    for path in paths:
        _publish(path)


def write_folder(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files completely or not at all; `target` must not exist.

    Raises OSError, and leaves nothing behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, data in contents.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(data)
            _flush(draft / name)
        # mkdtemp's 0700 would lock out the user that the service runs as.
        draft.chmod(0o755)
        _flush(draft)
        draft.rename(target)
    except BaseException:  # Ctrl-C leaves nothing behind either
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _flush(target.parent)


def _draft_of(path: Path) -> Path:
    """Where a file is written before it is moved to `path`."""
    # One name, and not one for each process: the next run overwrites what a killed one left there.
    return path.with_name(f".{path.name}.new")


def _publish(path: Path) -> None:
    """Move the finished draft of `path` into place."""
    # The content must be on the disk before its name is, and the name before this returns.
    _flush(_draft_of(path))
    _draft_of(path).replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
