"""How a bucket runs its rows: joined into one batch, run, and split into answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from evalmode.bundle.errors import InputsRefused, ModelRunFailed
from evalmode.bundle.known_answers import Run, Tensors
from evalmode.service.batching.bucket import Row
from evalmode.service.errors import BadRequest, RunFailed
from evalmode.service.models.tensors import split_rows
from evalmode.service.models.text import LOGITS, BatchScores, TextAnswer

_REASON_CHARACTERS = 200

# A word of ONNX Runtime's messages that names its own source: a path, a C++ name, or FILE.cc:LINE.
_SOURCE_WORD = re.compile(r"/|::|\.(h|cc|cpp|cu|cuh):\d+$")


def run_of_rows(
    run: Run, *, is_text: bool, whole: bool
) -> Callable[[Sequence[Row]], Sequence[Tensors]]:
    """The `run` of a bucket: a function that returns the answer of each row.

    Rows of texts may have several lengths; they are padded to the longest. With `whole` a row is a
    whole request, so there is one row, and its answer is not split. The
    function raises BadRequest for inputs that the model cannot compute with, and RunFailed for any
    other failure. NaN is an answer here: only requests that want its output are concerned.
    """

    def run_rows(rows: Sequence[Row]) -> Sequence[Tensors]:
        # One row, the common case, needs no copy.
        if len(rows) == 1:
            inputs = rows[0].inputs
        else:
            inputs = {name: _joined([row.inputs[name] for row in rows]) for name in rows[0].inputs}
        try:
            outputs = run(inputs)
        except InputsRefused as error:
            # The ids of texts were checked earlier, so the inputs are not at fault.
            if is_text:
                raise RunFailed("the model failed on the rows of this request") from error
            raise BadRequest(
                f"the model cannot compute with these inputs: {_reason(error)}"
            ) from error
        except ModelRunFailed as error:
            raise RunFailed("the model failed on the rows of this request") from error
        if whole:
            return [outputs]
        for name, tensor in outputs.items():
            if tensor.shape[:1] != (len(rows),):
                raise RunFailed(
                    f"the model answered {len(rows)} rows with {name!r} of shape {[*tensor.shape]}"
                )
        answers = split_rows(outputs, len(rows))
        if is_text and LOGITS in outputs:
            batch = BatchScores(outputs[LOGITS])
            return [
                TextAnswer(answer, batch=batch, index=index) for index, answer in enumerate(answers)
            ]
        return answers

    return run_rows


def _joined(tensors: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    """Tensors of one row each, (1, T, ...), as one (B, T, ...).

    Where T varies, zeros follow the shorter rows: the id of padding, and the mask of a position
    that does not count.
    """
    if len({tensor.shape for tensor in tensors}) == 1:
        return np.concatenate(tensors)
    longest = max(tensors, key=lambda tensor: tensor.shape[1])
    joined = np.zeros((len(tensors), *longest.shape[1:]), longest.dtype)
    for row, tensor in zip(joined, tensors, strict=True):
        row[: tensor.shape[1]] = tensor[0]
    return joined


def _reason(error: ModelRunFailed) -> str:
    """The reason that ONNX Runtime gives, on one line and without the paths of its source files.

    In ONNX Runtime 1.31 its message is "... Status Message: SOURCE CONDITION was false. REASON", or
    only the last part of that.
    """
    message = str(error.__cause__ or error)
    message = message.rpartition("Status Message: ")[2].rpartition(" was false. ")[2]
    words = [word for word in message.split() if not _SOURCE_WORD.search(word)]
    return " ".join(words)[:_REASON_CHARACTERS] or "ONNX Runtime gives no reason"
