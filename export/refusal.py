"""Why torch's exporter gave up, in one sentence: the reason, the model's own line, and a way out.

The kinds of errors, in the order in which they are recognised:

1. A branch on data.
2. An operator that ONNX does not have.
3. An axis that the model's code makes a fixed size.
4. A size that varies, used as a plain Python number.
5. A table that is too short for a size that varies.
6. An operator that the exporter cannot trace.
7. Any other error: the first line of its text.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping

from torch import Tensor, fx

from evalmode.export.module.lines import chain, innermost_line

_DATA_DEPENDENT = "GuardOnDataDependentSymNode"
_UNTRACEABLE = ("unhashable type: non-nested SymInt", "SymInt", "FakeTensor")


def refusal(
    error: BaseException,
    inputs: Mapping[str, Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> str:
    """The reason of an exporter's error, where in the model it arises, and what can be done.

    `inputs` and `dynamic_axes` are those of the export: the sentence names the axes by them.
    """
    causes = list(chain(error))
    innermost = causes[-1] if len(causes) > 1 else error
    names = [type(cause).__name__ for cause in causes]
    # The exporter's own error is outermost and says little: torch's text is in its causes.
    text = next((str(cause) for cause in causes[1:] if str(cause)), str(error))
    summary = _first_line(text)
    line = ""
    for cause in reversed(causes):
        line = _model_line(cause)
        if line:
            break
    at = f" (at {line})" if line else ""

    if _DATA_DEPENDENT in names:
        return (
            f"its code branches on numbers that are computed{at}, and a graph runs the same steps"
            " for all inputs: compute both branches and choose with torch.where, or use a mask for"
            " what is left out"
        )

    if match := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(innermost)):
        # The module in which the failed step was traced, if the step is known.
        node = _failed_node(causes)
        stack = {} if node is None else node.meta.get("nn_module_stack", {})
        subject = match[1]
        if stack:
            path, module_class = list(stack.values())[-1]
            path = path.removeprefix("L['self'].") or "(root)"
            kind = str(getattr(module_class, "__name__", module_class)).rpartition(".")[2]
            subject += f" in {path} ({kind})"
        return (
            f"ONNX has no operator for {subject}{at}: use one that it has, or compute it from"
            " others (in eval mode a random operator is often a plain one)"
        )

    if match := re.search(r"inferred a static shape of (\d+) for dimension \S*?\['(\w+)'\]", text):
        size, input_name = match[1], match[2]
        index = re.search(r"shape\[(\d+)\]", text)
        axis = dynamic_axes.get(input_name, {}).get(int(index[1]) if index else 0, "an axis")
        return (
            f"its code makes {axis} of {input_name} the fixed size {size}, by a loop over it or a"
            " size that becomes a number: compute with x.shape and whole tensors, or declare it"
            f" fixed (--dynamic-axes, with _ in its place){at}"
        )

    if any(word in text for word in _UNTRACEABLE) and line:
        return (
            f"a size that varies is used as a plain number{at}: {summary}; compute with it, or"
            " declare its axis fixed (--dynamic-axes, with _ in its place)"
        )

    if " not in VR[" in text:  # torch's "value range" of a symbolic size
        return (
            f"a table or a buffer of a fixed size is read at a size that varies ({summary}):"
            f" make it for the longest input in the constructor{at}"
        )

    if re.fullmatch(r"aten\.[\w.]+", summary):
        return f"torch's exporter cannot trace {summary}{at}: compute it from other operators"

    return f"{summary or names[-1]}{at}"


def _first_line(text: str) -> str:
    """The first line of torch's text, with the first item of a list that it introduces."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    if lines[0].endswith(":"):
        item = next((line for line in lines[1:] if line.startswith("- ")), "")
        return f"{lines[0]} {item}".strip()
    return lines[0]


def _model_line(error: BaseException) -> str:
    """The model's line at which the error was raised, or at which the failed step was traced.

    Empty if neither is in the model's code.
    """
    line = innermost_line(traceback.extract_tb(error.__traceback__))
    node = _failed_node([error])
    if line or node is None:
        return line
    # A step of a trace carries the stack at which it was traced, as the text of a traceback.
    frames = []
    pattern = r'File "([^"]+)", line (\d+), in .*\n +(.*)'
    for file, number, source in re.findall(pattern, node.stack_trace or ""):
        frames.append(traceback.FrameSummary(file, int(number), "", line=source))
    return innermost_line(frames)


def _failed_node(causes: list[BaseException]) -> fx.Node | None:
    """The step of the trace that could not be written; None if it is not known.

    torch's error does not hold the step. The function that raised it has a local variable `node`.
    """
    for cause in causes:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node):
                return node
    return None
