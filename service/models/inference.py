"""How a bucket runs its rows: stacked into one batch, run, and split into answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from evalmode.bundle.errors import InputsRefused, ModelRunFailed
from evalmode.bundle.known_answers import Run, Tensors
from evalmode.service.batching.bucket import Row
from evalmode.service.errors import BadRequest, RunFailed

_REASON_CHARACTERS = 200


def run_of_rows(
    run: Run, *, is_text: bool, whole: bool
) -> Callable[[Sequence[Row]], Sequence[Tensors]]:
    """The `run` of a bucket: it gives each row's answer.

    With `whole` there is one row, a whole request, and its answer is not split. The function raises
    BadRequest for inputs that the model cannot compute with, and RunFailed for any other failure.
    NaN is an answer here: it concerns only the requests that want the output that holds it.
    """

    def run_rows(rows: Sequence[Row]) -> Sequence[Tensors]:
        try:
            outputs = run(_stack(rows))
        except InputsRefused as error:
            if is_text:  # ids were checked earlier, so the inputs are not at fault
                raise RunFailed("the model failed on the rows of this request") from error
            raise BadRequest(
                f"the model cannot compute with these inputs: {_reason(error)}"
            ) from error
        except ModelRunFailed as error:
            raise RunFailed("the model failed on the rows of this request") from error
        return [outputs] if whole else _split(outputs, len(rows))

    return run_rows


def _stack(rows: Sequence[Row]) -> Tensors:
    if len(rows) == 1:
        return rows[0].inputs
    return {name: np.concatenate([row.inputs[name] for row in rows]) for name in rows[0].inputs}


def _split(outputs: Tensors, rows: int) -> list[Tensors]:
    """The answer of each row, with a leading dimension of 1: copies, so that an answer that is kept
    does not keep the whole batch.
    """
    for name, tensor in outputs.items():
        if tensor.shape[:1] != (rows,):
            raise RunFailed(
                f"the model answered {rows} rows with {name!r} of shape {[*tensor.shape]}"
            )
    if rows == 1:
        return [outputs]
    return [
        {name: tensor[row : row + 1].copy() for name, tensor in outputs.items()}
        for row in range(rows)
    ]


def _reason(error: ModelRunFailed) -> str:
    """The runtime's reason on one line, without the paths of its own source files."""
    message = str(error.__cause__ or error)
    message = message.rpartition("Status Message: ")[2].rpartition(" was false. ")[2]
    is_source = re.compile(r"/|::|\.(h|cc|cpp|cu|cuh):\d+$").search
    words = [word for word in message.split() if not is_source(word)]
    return " ".join(words)[:_REASON_CHARACTERS] or "it says no more"
