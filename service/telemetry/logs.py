"""What the server writes to stderr: a line an event, JSON for machines, coloured for people.

Whoever logs passes names, counts and digests. What a caller asked is never logged: a traceback
shows code and no values, and an event holds no text of a request. No request and no end waits for
long on whoever reads the lines: where nobody does, lines are lost, and the next one says how many.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from typing import TYPE_CHECKING, Literal, TextIO

import structlog

from evalmode.service.batching.observer import Observer

if TYPE_CHECKING:
    from evalmode.service.batching.bucket import Bucket
    from evalmode.service.batching.proof import Violation

_log = structlog.get_logger("evalmode.service")

# How long a line waits for a reader, before it is given up with all that follow until there is room
# again.
_PATIENCE_MS = 250
# As UTF-8 no more than 4,096 bytes: so much a pipe with any room takes without waiting.
_PIECE_CHARACTERS = 1_024


def configure_logs(form: Literal["auto", "json", "console"]) -> None:
    """Send structlog's events, and the warnings of every library that uses `logging`, to stderr in
    one form.

    What is logged while a request is answered carries its `request_id`, whoever logs it.
    """
    if sys.stderr is None:  # closed by whoever started us
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for good; it takes the place that a socket would get
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not console:
        shared.append(structlog.processors.format_exc_info)
    handler = LineHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=_renderer(console=console), foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("evalmode").setLevel(logging.INFO)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _renderer(*, console: bool) -> structlog.types.Processor:
    if not console:
        return structlog.processors.JSONRenderer(ensure_ascii=False)
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        # the default one prints local variables: callers' texts
        exception_formatter=structlog.dev.plain_traceback,
    )


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream with a descriptor; loses those for which its reader leaves no
    room.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lost = 0
        self._cut = ""
        self._room = select.poll()
        self._room.register(stream.fileno(), select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it as lost."""
        try:
            if self._lost and self._room.poll(0):
                sentence = f"{self._lost} lines before this one were lost: nobody read them"
                missed = logging.LogRecord(
                    "evalmode.service", logging.WARNING, "", 0, sentence, None, None
                )
                self._lost = 0
                self._write(self._cut + self.format(missed))
            if self._lost or not self._write(self.format(record)):
                self._lost += 1
        except Exception:
            self.handleError(record)

    def _write(self, line: str) -> bool:
        line += self.terminator
        for start in range(0, len(line), _PIECE_CHARACTERS):
            if not self._room.poll(_PATIENCE_MS):
                self._cut = self.terminator if start else self._cut
                return False
            self.stream.write(line[start : start + _PIECE_CHARACTERS])
            self.stream.flush()
        self._cut = ""
        return True


class ViolationLog(Observer):
    """Logs each violation of determinism, with enough to run its batch again."""

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """A row had other bits in a batch than alone: which model, which rows, in which order, in
        how many places.
        """
        if violation is None:
            return
        _log.error(
            "determinism violation",
            model=bucket.model,
            version=bucket.version,
            digest=bucket.digest,
            bucket=bucket.label,
            row=violation.row_digest,
            batch=list(violation.batch_digests),
            place=violation.position,
            places=violation.batch_size,
            expected=violation.expected_sha256,
            actual=violation.actual_sha256,
        )
