"""What the server writes to stderr: a line an event, JSON for machines, coloured for people. Knows no event itself.

Whoever logs passes names, counts and digests. What a caller asked is never logged: a traceback shows code and no
values, and an event holds no text of a request.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog


def configure_logs(form: Literal["auto", "json", "console"]) -> None:
    """Send structlog's events, and the warnings of every library that uses `logging`, to stderr in one form.

    What is logged while a request is answered carries its `request_id`, whoever logs it.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not console:
        shared.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=_renderer(console=console), foreign_pre_chain=shared)
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
        exception_formatter=structlog.dev.plain_traceback,  # the default one prints local variables: callers' texts
    )
