"""Find the line of the model's code that a message names, among the lines of torch and others."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_SHOWN_CHARACTERS = 80  # of a line of code in a message

_SITE_PACKAGES = Path(torch.__file__).parent.parent
# Lines of these files are never the model's: the exporters, this package, parts of the standard
# library that call other code, and code without a file, such as "<string>".
_OTHER_FILES = (
    *(f"{_SITE_PACKAGES / name}{os.sep}" for name in ("torch", "onnx", "onnxscript", "onnx_ir")),
    f"{Path(__file__).parent.parent}{os.sep}",
    f"{sysconfig.get_path('stdlib')}{os.sep}collections",
    f"{sysconfig.get_path('stdlib')}{os.sep}contextlib",
    f"{sysconfig.get_path('stdlib')}{os.sep}functools",
    "<",
)


def is_models(filename: str) -> bool:
    """Whether a file is part of the model: code of its author, or of a library that it uses."""
    return not filename.startswith(_OTHER_FILES)


def innermost_line(frames: Iterable[traceback.FrameSummary]) -> str:
    """The innermost line of the model's code: its file, its number and the code in backquotes.

    Returns "" where none of the frames is the model's.
    """
    lines = [frame for frame in frames if is_models(frame.filename)]
    if not lines:
        return ""
    innermost = lines[-1]
    position = f"{Path(innermost.filename).name}:{innermost.lineno}"
    code = " ".join((innermost.line or "").split())
    if len(code) > _SHOWN_CHARACTERS:
        code = code[:_SHOWN_CHARACTERS] + "..."
    return f"{position}: `{code}`" if code else position


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors it was raised from, the outermost first."""
    visited: set[int] = set()
    current: BaseException | None = error
    # Causes may form a cycle.
    while current is not None and id(current) not in visited:
        visited.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
