"""What the server writes to stderr: a line for each event, JSON for machines, coloured for people.

Events hold names, counts and digests, and never a text of a request. A traceback shows code and no
values.

Logging never blocks the server for long. While nothing reads the lines, they are lost, and the next
line that is read says how many.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog
from pydantic_core import PydanticSerializationError, to_json

from evalmode.service.batching.observer import Observer

if TYPE_CHECKING:
    from evalmode.service.batching.bucket import Bucket
    from evalmode.service.batching.proof import Violation

_log = structlog.get_logger("evalmode.service")

# What every line about the current request has: its id, and that of its trace. structlog's own
# variables are one for each field, and each line looks through all of them.
request_fields: ContextVar[Mapping[str, str]] = ContextVar(
    "request_fields", default=MappingProxyType({})
)

# The methods of loggers whose names are not those of their levels.
_LEVELS = {"warn": "warning", "exception": "error"}

# How long a line waits for its reader. Then it is lost, and so are later ones until there is room.
_PATIENCE_MS = 250
# A pipe that is ready for writing takes this many without blocking.
_PIECE_BYTES = 4_096


def configure_logs(form: Literal["auto", "json", "console"]) -> None:
    """Send structlog's events, and the warnings of all libraries that use `logging`, to stderr.

    `form` is the form of the lines; "auto" is "console" on a terminal and else "json". Whatever is
    logged while a request is answered carries its `request_id`.
    """
    if sys.stderr is None:
        # The parent process has closed it. Its descriptor must not become that of a socket.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    is_console = form == "console" or (form == "auto" and sys.stderr.isatty())
    processors: list[structlog.types.Processor] = [_describe]
    renderer: structlog.types.Processor
    if is_console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The default formatter prints local variables, which hold the texts of requests.
            exception_formatter=structlog.dev.plain_traceback,
        )
    else:
        processors.append(structlog.processors.format_exc_info)
        renderer = _render_json

    handler = LineHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=processors)
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("evalmode").setLevel(logging.INFO)
    # Our own events are written as they are rendered, without a `LogRecord`: each request has one.
    structlog.configure(
        processors=[*processors, renderer],
        logger_factory=lambda name: LineLogger(handler, name),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )


def _describe(
    logger: Any, level: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    """The event with what is bound to its request, and its level, logger and time.

    One processor instead of structlog's four, because each request has a line.
    """
    event = {**request_fields.get(), **event}
    event["level"] = _LEVELS.get(level, level)
    record: logging.LogRecord | None = event.get("_record")
    event["logger"] = logger.name if record is None else record.name
    event["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return event


def _render_json(_logger: object, _level: str, event: structlog.types.EventDict) -> str:
    try:
        return to_json(event, fallback=repr).decode()
    except PydanticSerializationError:
        # Half a surrogate pair, which UTF-8 cannot encode. Here it becomes an escape.
        return json.dumps(event, default=repr)


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream with a file descriptor. A line is lost if its reader is too slow."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lost = 0
        # The end of a line that was written only in part; empty if the last line is complete.
        self._missing_end = ""
        self._line_lock = threading.Lock()
        self._descriptor = stream.fileno()
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it as lost."""
        try:
            self.write_line(self.format(record))
        except Exception:
            self.handleError(record)

    def write_line(self, line: str) -> None:
        """Write a line, or count it as lost. Safe to use from several threads."""
        with self._line_lock:
            # After lost lines, the first line says how many. Without a reader nothing waits here.
            if self._lost and self._poll.poll(0):
                message = f"{self._lost} lines before this one were lost: nothing read them"
                lost_record = logging.LogRecord(
                    "evalmode.service", logging.WARNING, "", 0, message, None, None
                )
                self._lost = 0
                self._write(self._missing_end + self.format(lost_record))
            if self._lost or not self._write(line):
                self._lost += 1

    def _write(self, line: str) -> bool:
        """Write a line; False if its reader left no room in time."""
        unwritten = (line + self.terminator).encode("utf-8", "backslashreplace")
        is_begun = False
        while unwritten:
            if not self._poll.poll(_PATIENCE_MS):
                if is_begun:
                    self._missing_end = self.terminator
                return False
            # Past the stream, whose buffer costs as much time as the write.
            written_bytes = os.write(self._descriptor, unwritten[:_PIECE_BYTES])
            unwritten = unwritten[written_bytes:]
            is_begun = True
        self._missing_end = ""
        return True


class LineLogger:
    """The end of structlog's chain: writes rendered events to a handler."""

    def __init__(self, handler: LineHandler, name: str) -> None:
        self._handler = handler
        self.name = name

    def info(self, line: str) -> None:
        """Write a line. One that cannot be written, because stderr is closed, is lost."""
        with suppress(OSError, ValueError):
            self._handler.write_line(line)

    debug = warning = error = critical = exception = info


class ViolationLog(Observer):
    """Logs each violation of determinism, with all that is needed to run its batch again."""

    def proved(self, bucket: Bucket, violation: Violation | None) -> None:
        """A row was run again alone; log it if it had other bits in its batch."""
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
