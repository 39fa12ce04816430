"""Why torch's exporter gave up, in one sentence that names the model's own line and a way out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from evalmode.export.module.lines import chain, innermost_line

_DATA_DEPENDENT = "GuardOnDataDependentSymNode"
_UNTRACEABLE = ("unhashable type: non-nested SymInt", "SymInt", "FakeTensor")


def refusal(
    error: BaseException,
    inputs: Mapping[str, Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> str:
    """The reason of an exporter's error, where in the model it lies, and what can be done."""
    causes = list(chain(error))
    innermost = causes[-1] if len(causes) > 1 else error
    names = [type(cause).__name__ for cause in causes]
    text = next((str(cause) for cause in causes[1:] if str(cause)), str(error))
    place = next((line for cause in reversed(causes) if (line := _line(cause))), "")
    at = f" (at {place})" if place else ""
    if _DATA_DEPENDENT in names:
        return (
            f"its way depends on numbers that are computed{at}, and a graph has one way for all"
            " inputs: compute both and choose with torch.where, or let a mask stand for what is"
            " left out"
        )
    if match := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(innermost)):
        node = _node(causes)
        path, kind = _module(node)
        of = f" in {path or '(root)'} ({kind})" if kind else ""
        return (
            f"ONNX has no operator for {match[1]}{of}{at}: use one that it has, or compute it from"
            " others (in eval mode a random operator is often a plain one)"
        )
    if match := re.search(r"inferred a static shape of (\d+) for dimension \S*?\['(\w+)'\]", text):
        place_of = re.search(r"shape\[(\d+)\]", text)
        axis = dynamic_axes.get(match[2], {}).get(int(place_of[1]) if place_of else 0, "")
        return (
            f"its code makes {axis or 'an axis'} of {match[2]} the fixed size {match[1]}, by a loop"
            " over it or a size that becomes a number: compute with x.shape and whole tensors, or"
            f" declare it fixed (--dynamic-axes, with _ in its place){at}"
        )
    if any(word in text for word in _UNTRACEABLE) and place:
        return (
            f"a size that varies is used as a plain number{at}: {_first(text)}; compute with it, or"
            " declare its axis fixed (--dynamic-axes, with _ in its place)"
        )
    if " not in VR[" in text:
        return (
            f"a table or a buffer of a fixed size is read at a size that varies ({_first(text)}):"
            f" make it for the longest input in the constructor{at}"
        )
    if re.fullmatch(r"aten\.[\w.]+", _first(text)):
        return f"torch's exporter cannot trace {_first(text)}{at}: compute it from other operators"
    return f"{_first(text) or names[-1]}{at}"


def _first(text: str) -> str:
    """The first line of torch's text; where it only announces a list, with its first item."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    if lines[0].endswith(":"):
        item = next((line for line in lines[1:] if line.startswith("- ")), "")
        return f"{lines[0]} {item}".strip()
    return lines[0]


def _line(error: BaseException) -> str:
    """The model's line: where the error was raised, or where the step that failed was traced."""
    if line := innermost_line(traceback.extract_tb(error.__traceback__)):
        return line
    node = _node([error])
    return _traced_line(node.stack_trace or "") if node is not None else ""


def _traced_line(stack: str) -> str:
    frames = [
        traceback.FrameSummary(name, int(number), "", line=line)
        for name, number, line in re.findall(r'File "([^"]+)", line (\d+), in .*\n +(.*)', stack)
    ]
    return innermost_line(frames)


def _node(causes: list[BaseException]) -> fx.Node | None:
    """The step of the trace that could not be written: a variable of the function that gave up."""
    for cause in causes:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node):
                return node
    return None


def _module(node: fx.Node | None) -> tuple[str, str]:
    """The path and the class of the module that a step was traced in."""
    stack: dict[str, Any] = {} if node is None else node.meta.get("nn_module_stack", {})
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    return path.removeprefix("L['self']."), str(getattr(kind, "__name__", kind)).rpartition(".")[2]
