"""The line of code that a message points at: the user's own, and neither torch's nor ours."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_LONGEST = 80  # characters of code in a message
_PACKAGES = Path(torch.__file__).parent.parent
# Where nobody looks for a fault of a model: these packages, this one, the standard library.
_NOT_THE_MODELS = (
    *(f"{_PACKAGES / name}{os.sep}" for name in ("torch", "onnx", "onnxscript", "onnx_ir")),
    f"{Path(__file__).parent.parent}{os.sep}",
    f"{sysconfig.get_path('stdlib')}{os.sep}collections",
    f"{sysconfig.get_path('stdlib')}{os.sep}contextlib",
    f"{sysconfig.get_path('stdlib')}{os.sep}functools",
    "<",
)


def is_models(filename: str) -> bool:
    """Whether a file is the model's: its author's, or a library's that it is made of."""
    return not filename.startswith(_NOT_THE_MODELS)


def innermost_line(frames: Iterable[traceback.FrameSummary]) -> str:
    """`net.py:12` and what stands there, of the innermost frame that is the model's; else empty."""
    lines = [frame for frame in frames if is_models(frame.filename)]
    if not lines:
        return ""
    text = " ".join((lines[-1].line or "").split())
    code = f": `{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}`" if text else ""
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}{code}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, the outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
