"""Keeps modules out of the process that a library imports only if they are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """While the context is open, the import of a module fails as if it were not installed.

    A module that is loaded already stays. The imports of other threads fail too.
    """
    if name in sys.modules:
        yield
        return
    # Python's own way to say so: an import that meets None raises ModuleNotFoundError.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
