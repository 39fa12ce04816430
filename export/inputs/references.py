"""The user's own code, by reference: `package.module:factory` and `package.module:sample_inputs`.

His packages win: his folder stands first on the path, and nothing of ours is imported by a bare
name such as `model`. Knows no rule and no ONNX.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evalmode.errors import EvalmodeError

# Where the line that raised is not the user's own: this package, the standard library, installed
# packages.
_NOT_THE_USERS = (
    str(Path(__file__).parent.parent),  # the export room
    "<frozen",
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)


class UserCodeFailed(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UserCodeFailed"
    """The user's own code cannot be imported or called; the message names the reference, the error
    and its line.
    """


def is_reference(text: str) -> bool:
    """Whether `text` is meant as `package.module:attribute` and not as a path."""
    return ":" in text and not Path(text).exists()


def load_reference(reference: str) -> Any:
    """What `package.module:attribute` names. Raises UserCodeFailed in one sentence."""
    name, _, attribute = reference.partition(":")
    if not name or not attribute:
        raise UserCodeFailed(f"{reference!r} must read package.module:attribute")
    here = str(Path.cwd())
    if sys.path[0] != here:
        sys.path.insert(0, here)
    with _told(f"{reference} cannot be imported"):
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    return found


def load_module(reference: str) -> nn.Module:
    """The module that a factory returns, or that the reference names. Never calls `.eval()`."""
    found = load_reference(reference)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UserCodeFailed(
                f"{reference} must be a function that returns an nn.Module, it is {_kind(found)}"
            )
        with _told(f"{reference}() failed"):
            found = found()
    if not isinstance(found, nn.Module):
        raise UserCodeFailed(f"{reference}() must return an nn.Module, it returned {_kind(found)}")
    return found


def load_in_eval_mode(reference: str) -> nn.Module:
    """The module of `load_module`, after `.eval()` was called on it."""
    module = load_module(reference)
    with _told(f"{reference}() cannot be put into eval mode"):
        module.eval()  # and not what it returns: an overridden train() may return nothing
    return module


def load_samples(reference: str) -> list[Any]:
    """The samples that `reference` names or returns: one (a mapping, a tuple, a tensor), or a list
    of several.
    """
    found = load_reference(reference)
    if callable(found) and not isinstance(found, Tensor | Mapping):
        with _told(f"{reference}() failed"):
            found = found()
    samples = list(found) if isinstance(found, list) else [found]
    if not samples:
        raise UserCodeFailed(f"{reference} must hold a sample at least, it is an empty list")
    return samples


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever the user's code raises becomes one sentence with the line of his that raised it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the report's
            yield
    except (Exception, SystemExit) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserCodeFailed(f"{what}: {type(error).__name__}: {reason}{_line(error)}") from error


def _line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    return f" (at {Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
