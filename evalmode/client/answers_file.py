"""The output of `evalmode predict --output`: a file that a later run of the same command continues.

Beside `answers.jsonl` stands `answers.jsonl.evalmode.json`. It records the digest of the model that
answered, the flags that answers depend on, and what identifies the input. A run continues a file
only where all of these are the same. A killed run may leave half a line, which is cut off.
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

from evalmode.atomic_files import write_file
from evalmode.errors import EvalmodeError

_BLOCK_BYTES = 1 << 20

# As `encode_line` of service/ndjson.py writes it. Inside a string the quotes would be escaped, so
# this is a key. It is faster than parsing every line of a large file.
_ERROR_KEY = b',"error":'


def is_error(line: bytes) -> bool:
    """Whether this line says that its text could not be answered."""
    return _ERROR_KEY in line


def identity_of(file: Path) -> dict[str, object]:
    """What identifies an input: its size, and the sha256 of its first and last mebibyte.

    A hash of all of it would take minutes for a large file.
    """
    with file.open("rb") as opened:
        sha256 = hashlib.sha256(opened.read(_BLOCK_BYTES))
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _BLOCK_BYTES))
        sha256.update(opened.read(_BLOCK_BYTES))
    return {"bytes": size, "sha256_of_ends": sha256.hexdigest()}


class AnswersFile:
    """An open file of answers. Opening it continues an earlier run, or raises EvalmodeError.

    `question` is what the answers depend on beside the model: the flags and, as `input`, the
    identity of the input, or None for one that cannot be read twice.

    Attributes:
        lines: the number of lines in the file.
        errors: the number of lines whose text could not be answered.
        digest: the digest of the model that answered them; None before the first answer.
    """

    def __init__(self, path: Path, *, question: Mapping[str, object]) -> None:
        self.path = path
        self.digest: str | None = None
        self.lines = self.errors = 0
        self._question = dict(question)
        self._record = path.with_name(f"{path.name}.evalmode.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
        except OSError as error:
            raise EvalmodeError(f"{path} cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EvalmodeError(f"{path} is being written by another process") from error
            if os.fstat(self._file.fileno()).st_size > 0:
                self._continue()
        except BaseException:
            self._file.close()
            raise

    def write(self, lines: list[bytes], *, digest: str | None) -> None:
        """Append lines, which are in the file when this returns.

        `digest` is that of the model that answered, None for lines that no model has seen. Raises
        EvalmodeError when it is not the model of the lines before, or when writing fails.
        """
        if digest is not None and self.digest not in (None, digest):
            raise EvalmodeError(
                f"the model that answers now has the digest {digest[:16]}, and the {self.lines}"
                f" lines in {self.path} are from {str(self.digest)[:16]}: serve that model again,"
                " or choose another --output"
            )
        try:
            # The record comes before the first line: a file with lines but no record cannot be
            # continued.
            if self.lines == 0 or self.digest is None:
                self.digest = digest
                record = {"digest": digest, **self._question}
                write_file(self._record, (json.dumps(record, indent=2) + "\n").encode())
            self._file.write(b"".join(lines))
            self._file.flush()
        except OSError as error:
            raise EvalmodeError(
                f"{self.path} cannot be written: {error.strerror}; {self.how_to_continue}"
            ) from error
        self.lines += len(lines)
        self.errors += sum(map(is_error, lines))

    @property
    def how_to_continue(self) -> str:
        """What to do after a failure, as the end of a sentence."""
        return f"{self.lines} lines are in {self.path}, and the same command continues from there"

    def close(self) -> None:
        """Close the file, so that another process may write it."""
        # Closing flushes. What cannot be flushed was reported when it was written.
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _continue(self) -> None:
        """Count the lines of an earlier run, and cut off the last one if it is not complete.

        Raises EvalmodeError unless that run asked the same question about the same input.
        """
        if self._question.get("input") is None:
            raise EvalmodeError(
                f"{self.path} exists, and it can only be continued from a regular file: choose"
                " another --output"
            )
        try:
            record = json.loads(self._record.read_bytes())
            digest = record.pop("digest")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise EvalmodeError(
                f"{self.path} exists, and no {self._record.name} beside it records its origin:"
                " choose another --output"
            ) from error
        if record != self._question:
            changed = [
                name
                for name in {**record, **self._question}
                if record.get(name) != self._question.get(name)
            ]
            raise EvalmodeError(
                f"{self.path} was begun with another {' and '.join(changed)}: use the same, or"
                " choose another --output"
            )

        self.digest = digest
        complete_bytes = 0
        self._file.seek(0)
        for line in self._file:
            if line.endswith(b"\n"):
                complete_bytes += len(line)
                self.lines += 1
                self.errors += is_error(line)
        self._file.truncate(complete_bytes)


class Stdout:
    """Answers for the next program of a pipe; the counterpart of AnswersFile.

    Nothing is recorded, so no later run can continue it.
    """

    lines = errors = 0
    digest: str | None = None
    how_to_continue = "output to stdout cannot be continued: use --output FILE"

    def write(self, lines: list[bytes], *, digest: str | None) -> None:
        """Write lines; `digest` is that of the model that answered, None where no model did."""
        if digest is not None and self.digest not in (None, digest):
            raise EvalmodeError(
                f"the model changed while it answered, to the digest {digest[:16]};"
                f" {self.how_to_continue}"
            )
        self.digest = digest or self.digest
        view = memoryview(b"".join(lines))
        try:
            # Without Python's buffer, which would be flushed again at exit: into a pipe without a
            # reader that prints a second error.
            while view:
                view = view[os.write(sys.stdout.fileno(), view) :]
        except OSError as error:
            raise EvalmodeError(
                f"stdout cannot be written: {error.strerror}; {self.how_to_continue}"
            ) from error
        self.lines += len(lines)
        self.errors += sum(map(is_error, lines))

    def __enter__(self) -> Stdout:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass
