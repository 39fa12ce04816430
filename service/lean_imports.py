"""Makes imports of libraries cheaper: what this server does not use is not loaded or not built."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel


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


@contextmanager
def deferred_models() -> Iterator[None]:
    """While the context is open, a new class of pydantic is built when it is first used."""
    BaseModel.model_config["defer_build"] = True
    try:
        yield
    finally:
        del BaseModel.model_config["defer_build"]
