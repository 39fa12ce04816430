"""What a bucket runs its rows with: stacked, run, taken apart, each answer looked at. Knows no
queue and no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from evalmode.bundle.errors import InputsRefused, ModelRunFailed
from evalmode.bundle.known_answers import Run, Tensors
from evalmode.service.batching.bucket import Row
from evalmode.service.errors import BadRequest, RequestError, RunFailed
from evalmode.service.models.tensors import non_finite_input
from evalmode.service.models.text import LOGITS

_REASON_CHARACTERS = 200


def answering(
    run: Run, *, is_text: bool, whole: bool
) -> Callable[[Sequence[Row]], list[Tensors | Exception]]:
    """What a bucket runs rows with: stacked, run, and taken apart into the answer of each row or
    what is wrong with it.

    Raises BadRequest for inputs that the model cannot compute with, and RunFailed for any other
    failure.
    """

    def answer(rows: Sequence[Row]) -> list[Tensors | Exception]:
        try:
            outputs = run(_stacked(rows))
        except InputsRefused as error:
            if is_text:  # ids are checked before they come here: it is not they that are at fault
                raise RunFailed("the model failed on the rows of this request") from error
            raise BadRequest(
                f"the model cannot compute with these inputs: {_reason(error)}"
            ) from error
        except ModelRunFailed as error:
            raise RunFailed("the model failed on the rows of this request") from error
        answers = [outputs] if whole else _taken_apart(outputs, len(rows))
        return [
            _not_finite(row) if _is_spoilt(found, is_text=is_text) else found
            for row, found in zip(rows, answers, strict=True)
        ]

    return answer


def _stacked(rows: Sequence[Row]) -> Tensors:
    if len(rows) == 1:
        return rows[0].inputs
    return {name: np.concatenate([row.inputs[name] for row in rows]) for name in rows[0].inputs}


def _taken_apart(outputs: Tensors, rows: int) -> list[Tensors]:
    """The answer of each row, with a leading dimension of 1: copies, so that one that is kept keeps
    no other.
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


def _is_spoilt(answer: Tensors, *, is_text: bool) -> bool:
    """Whether an answer holds NaN, or logits from which no probabilities can be made."""
    if is_text and not np.isfinite(answer[LOGITS]).all():
        return True
    return any(
        tensor.dtype.kind == "f" and bool(np.isnan(tensor).any()) for tensor in answer.values()
    )


def _not_finite(row: Row) -> RequestError:
    name = non_finite_input(row.inputs)
    if name is not None:
        return BadRequest(
            f"input {name!r} holds numbers that are not finite, and so would the answer", field=name
        )
    return RunFailed("the model answered a row of this request with numbers that are not finite")


def _reason(error: ModelRunFailed) -> str:
    """The runtime's reason on one line, without the places in its own source that it names."""
    said = (
        str(error.__cause__ or error)
        .rpartition("Status Message: ")[2]
        .rpartition(" was false. ")[2]
    )
    words = [word for word in said.split() if not re.search(r"/|::|\.(h|cc|cpp|cu|cuh):\d+$", word)]
    return " ".join(words)[:_REASON_CHARACTERS] or "it says no more"
