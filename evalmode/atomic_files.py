"""Writing so that a kill, or a power cut, at any instant leaves what was there before or all of
what is new.

Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write one file whole, over the one that may stand there.

    Raises OSError, and leaves what was there, when it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft_of(path).write_bytes(data)
        settle(path)
    except OSError:
        with suppress(OSError):
            draft_of(path).unlink(missing_ok=True)
        raise


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files over those in `folder`; the last of them says that the others are whole.

    All are written before the first is put in place: without room the old ones stay. The last one
    is away while the others change. Raises OSError, whose `filename` is the file that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in contents]
    for path in paths:
        # A folder cannot be replaced by a file, and that must not come out halfway.
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for path, data in zip(paths, contents.values(), strict=True):
        try:
            draft_of(path).write_bytes(data)
            _flush(draft_of(path))
        except OSError as error:
            error.filename = str(path)  # a write itself names none
            for draft in map(draft_of, paths):
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
            raise
    paths[-1].unlink(missing_ok=True)
    for path in paths:
        settle(path)


def draft_of(path: Path) -> Path:
    """Where to write a file before `settle` puts it at `path`."""
    # One name, not one for each process: what a killed run left there, the next one overwrites.
    return path.with_name(f".{path.name}.new")


def settle(path: Path) -> None:
    """Put the finished draft of `path` in its place."""
    _flush(draft_of(path))
    draft_of(path).replace(path)
    _flush(path.parent)


def write_folder(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files whole; `target` must not exist. Raises OSError, and leaves nothing
    behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, data in contents.items():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).write_bytes(data)
            _flush(building / name)
        building.chmod(0o755)  # mkdtemp's 0700 would lock out the user that the service runs as
        _flush(building)
        building.rename(target)
    except BaseException:  # an interrupt from the keyboard leaves nothing behind either
        shutil.rmtree(building, ignore_errors=True)
        raise
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
