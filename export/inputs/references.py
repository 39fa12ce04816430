"""Load the user's own code: `package.module:factory`, `package.module:sample_inputs`.

The working folder comes first on the import path. So a user's package with the name of one of ours,
such as `model`, is the one that is loaded.
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

# Files that hold no line of the user's: this package, the standard library, installed packages.
_OTHER_FILES = (
    str(Path(__file__).parent.parent),  # the room `export`
    "<frozen",
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)


class UserCodeFailed(EvalmodeError):  # noqa: N818 - read as a sentence: "raise UserCodeFailed"
    """The user's own code cannot be imported or called.

    The message names the reference, the error and the line.
    """


def is_reference(text: str) -> bool:
    """Whether `text` is a reference such as `package.module:attribute`, and not a path."""
    return ":" in text and not Path(text).exists()


def load_reference(reference: str) -> Any:
    """The object that `package.module:attribute` names. Raises UserCodeFailed."""
    module_name, _, attribute_path = reference.partition(":")
    if not module_name or not attribute_path:
        raise UserCodeFailed(f"{reference!r} must have the form package.module:attribute")
    folder = str(Path.cwd())
    if sys.path[0] != folder:
        sys.path.insert(0, folder)
    with _user_errors(f"{reference} cannot be imported"):
        value: Any = importlib.import_module(module_name)
        for name in attribute_path.split("."):
            value = getattr(value, name)
    return value


def load_module(reference: str) -> nn.Module:
    """The module that `reference` names, or that the function there returns.

    Never calls `.eval()`. Raises UserCodeFailed.
    """
    value = load_reference(reference)
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise UserCodeFailed(
            f"{reference} must be a function that returns an nn.Module, got {_type_name(value)}"
        )
    with _user_errors(f"{reference}() failed"):
        module = value()
    if not isinstance(module, nn.Module):
        raise UserCodeFailed(
            f"{reference}() must return an nn.Module, it returned {_type_name(module)}"
        )
    return module


def load_in_eval_mode(reference: str) -> nn.Module:
    """The module of `load_module`, after `.eval()` was called on it."""
    module = load_module(reference)
    with _user_errors(f"{reference}() cannot be put into eval mode"):
        # The result of eval() is not used: an overridden train() may return nothing.
        module.eval()
    return module


def load_samples(reference: str) -> list[Any]:
    """The samples that `reference` names, or that the function there returns.

    One sample is a mapping, a tuple or a tensor; several are a list. Raises UserCodeFailed.
    """
    value = load_reference(reference)
    if callable(value) and not isinstance(value, Tensor | Mapping):
        with _user_errors(f"{reference}() failed"):
            value = value()
    samples = list(value) if isinstance(value, list) else [value]
    if not samples:
        raise UserCodeFailed(f"{reference} must hold at least one sample, got an empty list")
    return samples


@contextmanager
def _user_errors(problem: str) -> Iterator[None]:
    """Turn any error of the user's code into UserCodeFailed, with the user's line that raised it.

    What the code prints goes to stderr, because stdout is for the report.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        reason = str(error).strip().partition("\n")[0]
        frames = traceback.extract_tb(error.__traceback__)
        user_frames = [frame for frame in frames if not frame.filename.startswith(_OTHER_FILES)]
        where = ""
        if user_frames:
            where = f" (at {Path(user_frames[-1].filename).name}:{user_frames[-1].lineno})"
        raise UserCodeFailed(f"{problem}: {type(error).__name__}: {reason}{where}") from error


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
