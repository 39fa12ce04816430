"""How the command line speaks: exit codes, sentences on stderr, consoles, and text that goes out
byte for byte.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

# 0 done, 1 a check found something, 2 the input cannot be used (one sentence on stderr says why).
FOUND, UNUSABLE = 1, 2


def help_of(command: Callable[..., object]) -> str:
    """A command's docstring with each paragraph in one line, for the terminal to wrap."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def complain(sentence: object) -> None:
    """One sentence on stderr; what the encoding of stderr cannot say is spelled out."""
    print(f"evalmode: {sentence}", file=sys.stderr)


def open_console(*, stderr: bool = False) -> Any:
    """A Rich console. Rich is imported here and not above: a command that prints nothing need not
    wait for it.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # a terminal of another encoding gets escapes, and not a traceback
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return Console(stderr=stderr)


def write(text: str) -> None:
    """Text for programs on stdout, in UTF-8 whatever the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(encoded(text))
    sys.stdout.buffer.flush()


def encoded(text: str) -> bytes:
    """The text in UTF-8; half a surrogate pair, as of a path that is no UTF-8, becomes the escape
    that JSON reads.
    """
    return text.encode("utf-8", "backslashreplace")
