"""The answers that `evalmode predict --output` writes, so that a run that ended early can go on.
Knows no model.

Beside it stands a small file that says what it holds: which model answered, how it was asked, and
of which input. Only whole lines count: what a killed run wrote of its last line is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from evalmode.atomic_files import write_file
from evalmode.errors import EvalmodeError

_BLOCK_BYTES = 1 << 20
_ERROR_KEY = b',"error":'  # as our lines spell it; inside a string its quotes would be escaped


def is_error(line: bytes) -> bool:
    """Whether this line of answers says that its text could not be answered."""
    return _ERROR_KEY in line


def identity_of(file: Path) -> dict[str, object]:
    """What tells this input from another: its size, and the sha256 of its first and last
    mebibyte.
    """
    with file.open("rb") as opened:
        hashed = hashlib.sha256(opened.read(_BLOCK_BYTES))
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _BLOCK_BYTES))
        hashed.update(opened.read(_BLOCK_BYTES))
    return {"bytes": size, "sha256_of_ends": hashed.hexdigest()}


class AnswersFile:
    """An open file of answers: `lines` are in it, `errors` of them say that a text could not be
    answered.

    `asked` is what the answers depend on beside the model: a file that was begun for something else
    is refused.
    """

    def __init__(self, path: Path, *, asked: Mapping[str, object]) -> None:
        self.path = path
        self.digest: str | None = None
        self.lines = self.errors = 0
        self._asked = dict(asked)
        self._beside = path.with_name(f"{path.name}.evalmode.json")
        self._file = self._opened()
        try:
            self._find_place()
        except BaseException:
            self._file.close()
            raise

    def write(self, lines: list[bytes], *, digest: str | None) -> None:
        """Append these answers of the model with this digest; None: no model was asked.

        They are in the file when this returns.
        """
        if digest is not None and self.digest not in (None, digest):
            raise EvalmodeError(
                f"the model that answers now has the digest {digest[:16]}, and the {self.lines}"
                f" lines in {self.path} are of {str(self.digest)[:16]}: serve that one again, or"
                " begin another --output"
            )
        try:
            if self.lines == 0 or self.digest is None:
                self.digest = digest
                write_file(
                    self._beside,
                    (json.dumps({"digest": digest, **self._asked}, indent=2) + "\n").encode(),
                )
            self._file.write(b"".join(lines))
            self._file.flush()
        except OSError as error:
            raise EvalmodeError(
                f"{self.path} cannot be written: {error.strerror}; {self.way_on}"
            ) from error
        self.lines += len(lines)
        self.errors += sum(map(is_error, lines))

    @property
    def way_on(self) -> str:
        """How to go on from here, as the end of a sentence."""
        return f"{self.lines} lines are in {self.path}, and the same command goes on from there"

    def close(self) -> None:
        """Let the file go."""
        with contextlib.suppress(OSError):  # what could not be written was said when it was
            self._file.close()

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self) -> IO[bytes]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab+")
        except OSError as error:
            raise EvalmodeError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise EvalmodeError(f"{self.path} is being written by another process") from error
        return file

    def _find_place(self) -> None:
        """Check that what stands in the file is ours to go on with, and cut off a line that was
        begun.
        """
        if os.fstat(self._file.fileno()).st_size == 0:
            return
        if self._asked.get("input") is None:
            raise EvalmodeError(
                f"{self.path} exists, and an input that is no file cannot be read again: choose"
                " another --output"
            )
        try:
            said = json.loads(self._beside.read_bytes())
            digest, asked = said.pop("digest"), said
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise EvalmodeError(
                f"{self.path} exists, and no {self._beside.name} beside it says what it holds:"
                " choose another --output"
            ) from error
        if asked != self._asked:
            changed = [
                name
                for name in {**asked, **self._asked}
                if asked.get(name) != self._asked.get(name)
            ]
            raise EvalmodeError(
                f"{self.path} was begun with another {' and '.join(changed)}: ask the same, or"
                " choose another --output"
            )
        self.digest = digest
        whole_bytes = 0
        self._file.seek(0)
        for line in self._file:
            if line.endswith(b"\n"):
                whole_bytes += len(line)
                self.lines += 1
                self.errors += is_error(line)
        self._file.truncate(whole_bytes)


class Stdout:
    """Answers for the next program in a pipe: nothing is kept, so nothing can be gone on with."""

    lines = errors = 0
    digest: str | None = None
    way_on = "what was not written to a file cannot be gone on with: use --output FILE"

    def write(self, lines: list[bytes], *, digest: str | None) -> None:
        """Write these answers of the model with this digest; None: no model was asked."""
        if digest is not None and self.digest not in (None, digest):
            raise EvalmodeError(
                f"the model changed while it answered, to the digest {digest[:16]}; {self.way_on}"
            )
        self.digest = digest or self.digest
        view = memoryview(b"".join(lines))
        try:
            # no buffer that would be flushed once more at exit, into a pipe that has no reader
            while view:
                view = view[os.write(sys.stdout.fileno(), view) :]
        except OSError as error:
            raise EvalmodeError(
                f"stdout cannot be written: {error.strerror}; {self.way_on}"
            ) from error
        self.lines += len(lines)
        self.errors += sum(map(is_error, lines))

    def __enter__(self) -> Stdout:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        pass
