"""The output of `evalmode predict --output`: a file that a later run of the same command continues.

The file `answers.jsonl` has a record beside it, `answers.jsonl.evalmode.json`. The record holds the
digest of the model that answered, the flags that answers depend on, and what identifies the input.
A run continues a file only if all of these are the same. A killed run may leave half a line, which
is cut off.
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

# The key of an error, as `encode_line` of service/ndjson.py writes it. It cannot be part of a text,
# because JSON escapes quotes inside a string. Searching for it is faster than parsing every line.
_ERROR_KEY = b',"error":'


def is_error(line: bytes) -> bool:
    """Whether this line says that its text could not be answered."""
    return _ERROR_KEY in line


def identity_of(file: Path) -> dict[str, object]:
    """What identifies an input: its size, and the sha256 of its first and last mebibyte.

    A hash of the whole file would take minutes if it is large.
    """
    with file.open("rb") as input_file:
        sha256 = hashlib.sha256(input_file.read(_BLOCK_BYTES))
        size = input_file.seek(0, os.SEEK_END)
        input_file.seek(max(0, size - _BLOCK_BYTES))
        sha256.update(input_file.read(_BLOCK_BYTES))
    return {"bytes": size, "sha256_of_ends": sha256.hexdigest()}


class AnswersFile:
    """An open file of answers. Opening it continues an earlier run, or raises EvalmodeError.

    `answer_options` are what the answers depend on besides the model. They hold the flags and, as
    `input`, the identity of the input; None for an input that cannot be read twice.

    Attributes:
        lines: the number of lines in the file.
        errors: the number of lines whose text could not be answered.
        digest: the digest of the model that answered them; None before the first answer.
    """

    def __init__(self, path: Path, *, answer_options: Mapping[str, object]) -> None:
        self.path = path
        self.digest: str | None = None
        self.lines = self.errors = 0
        self._answer_options = dict(answer_options)
        self._record_path = path.with_name(f"{path.name}.evalmode.json")
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
                self._continue_earlier_run()
        except BaseException:
            self._file.close()
            raise

    def write(self, lines: list[bytes], *, digest: str | None) -> None:
        """Append lines. When this returns, they are in the file.

        `digest` is that of the model that answered; None if all lines are errors without a model.
        Raises EvalmodeError if another model answered the earlier lines, or if writing fails.
        """
        if digest is not None and self.digest not in (None, digest):
            raise EvalmodeError(
                f"the model that answers now has the digest {digest[:16]}, and the {self.lines}"
                f" lines in {self.path} are from {str(self.digest)[:16]}: serve that model again,"
                " or choose another --output"
            )
        try:
            # The record is written before the first line, because a file without a record cannot be
            # continued. It is written again when the first model answers.
            if self.lines == 0 or self.digest is None:
                self.digest = digest
                record = {"digest": digest, **self._answer_options}
                write_file(self._record_path, (json.dumps(record, indent=2) + "\n").encode())
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
        # Closing flushes the buffer. It is empty, unless `write` has failed and reported it.
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

    def _continue_earlier_run(self) -> None:
        """Count the lines of an earlier run, and cut off the last one if it is not complete.

        Raises EvalmodeError unless that run had the same options and the same input.
        """
        if self._answer_options.get("input") is None:
            raise EvalmodeError(
                f"{self.path} exists, and it can only be continued from a regular file: choose"
                " another --output"
            )
        try:
            record = json.loads(self._record_path.read_bytes())
            digest = record.pop("digest")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise EvalmodeError(
                f"{self.path} exists, and no {self._record_path.name} beside it records its origin:"
                " choose another --output"
            ) from error
        options = self._answer_options
        if record != options:
            # Merged as dictionaries, because a set would not keep the order of the names.
            names = {**record, **options}
            changed = [name for name in names if record.get(name) != options.get(name)]
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
    """Writes answers to stdout; the counterpart of AnswersFile.

    Nothing is recorded, so no later run can continue it.
    """

    lines = errors = 0
    digest: str | None = None
    how_to_continue = "output to stdout cannot be continued: use --output FILE"

    def write(self, lines: list[bytes], *, digest: str | None) -> None:
        """Write lines. `digest` is as in `AnswersFile.write`, and so are the errors."""
        if digest is not None and self.digest not in (None, digest):
            raise EvalmodeError(
                f"the model changed while it answered, to the digest {digest[:16]};"
                f" {self.how_to_continue}"
            )
        if digest:
            self.digest = digest
        unwritten = memoryview(b"".join(lines))
        try:
            # Without Python's buffer, which Python flushes again at exit. If the pipe has no reader
            # any more, that prints a second error.
            while unwritten:
                written_bytes = os.write(sys.stdout.fileno(), unwritten)
                unwritten = unwritten[written_bytes:]
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
