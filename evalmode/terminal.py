"""Output of the command line: exit codes, errors on stderr, consoles, and text for programs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

# Exit codes, by which a CI job can distinguish a bad model from a typo. 0 is success. 1 is a
# finding: a rule failed, or a line could not be answered. 2 is input that cannot be used: one
# sentence on stderr says why.
EXIT_FINDINGS, EXIT_UNUSABLE = 1, 2


def help_of(command: Callable[..., object]) -> str:
    """A command's docstring with each paragraph on one line, for the terminal to wrap."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def print_error(sentence: object) -> None:
    """Print one sentence on stderr, after the name of the program."""
    print(f"evalmode: {sentence}", file=sys.stderr)


def open_console(*, stderr: bool = False) -> Any:
    """A Rich console on stdout or stderr."""
    # Rich takes about 50 ms to import, which a command without a table need not pay.
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A terminal whose encoding lacks a character gets its escape, and not a traceback.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return Console(stderr=stderr)


def write(text: str) -> None:
    """Write text for programs to stdout, in UTF-8 whatever the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(to_utf8(text))
    sys.stdout.buffer.flush()


def to_utf8(text: str) -> bytes:
    """The text in UTF-8. A lone surrogate, as of a path that is not UTF-8, becomes an escape."""
    return text.encode("utf-8", "backslashreplace")
