"""What a model takes and gives over the Open Inference Protocol, and how a request for it becomes
rows and back.

A text model takes `text`, or its graph's own tensors, and gives beside its graph's outputs what /v1
gives: the `probabilities`, the best `label`, and whether the text was `truncated`. Any other model
takes and gives its graph's own tensors. Knows no HTTP and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.manifest import TensorSpec
from evalmode.service.batching.bucket import Job
from evalmode.service.errors import BadRequest, RunFailed, TextTooLong
from evalmode.service.models.model import WHOLE, Model
from evalmode.service.models.tensors import non_finite_input
from evalmode.service.models.text import LOGITS, best, softmax
from evalmode.service.protocol.datatypes import BYTES, Array
from evalmode.service.protocol.request import AskedOutput, InferRequest, InputTensor
from evalmode.service.protocol.response import OutputTensor, classify
from evalmode.service.settings import setting_named
from evalmode.service.strict_json import shown

TEXT = TensorSpec(name="text", datatype=BYTES, shape=(-1,))

_PROBABILITIES, _LABEL, _TRUNCATED = "probabilities", "label", "truncated"


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRequest:
    """A request that its model can answer: the rows to run, and where they were texts, which of
    them were cut.
    """

    model: Model
    jobs: Sequence[Job]
    outputs: Sequence[AskedOutput]
    truncated: Sequence[bool] | None


def inputs_of(model: Model) -> tuple[TensorSpec, ...]:
    """What the model takes; a text model takes either the first of them or the others."""
    return (TEXT, *model.inputs) if model.is_text else model.inputs


def outputs_of(model: Model) -> tuple[TensorSpec, ...]:
    """What the model gives."""
    return (*model.outputs, *_derived(model))


def only_input(model: Model) -> TensorSpec | None:
    """The input that a raw body fills: the text, or the graph's only one; None where there are
    several.
    """
    if model.is_text:
        return TEXT
    return model.inputs[0] if len(model.inputs) == 1 else None


def is_batched(model: Model) -> bool:
    """Whether the rows of a request may be answered apart from one another."""
    return WHOLE not in model.row_counts


def prepare(model: Model, request: InferRequest, *, max_rows: int) -> PreparedRequest:
    """The rows of a request. Raises BadRequest, naming the field, where this model cannot answer
    it.
    """
    if is_batched(model):
        _require_rows(request.inputs, max_rows)
    text = next(
        (tensor for tensor in request.inputs if model.is_text and tensor.name == TEXT.name), None
    )
    outputs = _asked(model, request, of_text=text is not None)
    if text is None:
        jobs = model.tensor_jobs({tensor.name: tensor.data for tensor in request.inputs})
        return PreparedRequest(model=model, jobs=jobs, outputs=outputs, truncated=None)
    if len(request.inputs) > 1:
        other = next(tensor for tensor in request.inputs if tensor is not text)
        raise BadRequest(
            f"inputs must be the text alone, or tensors without it, got also {shown(other.name)}",
            field="inputs",
        )
    texts = _texts(text)
    try:
        jobs, truncated = model.text_rows(texts, truncate=request.truncate)
    except TextTooLong as error:
        field = f"{text.field}.data.{error.index}"  # here the texts are the elements of a tensor
        raise BadRequest(f"{field} {error.problem}", field=field) from error
    return PreparedRequest(model=model, jobs=jobs, outputs=outputs, truncated=truncated)


def answered(prepared: PreparedRequest, answers: Sequence[Tensors]) -> list[OutputTensor]:
    """The outputs that the request names, from the answers of the rows in their order.

    NaN in one of them is an error, in JSON and in binary; in any other output it does not matter.
    Raises RunFailed, or BadRequest where the request's own numbers are not finite.
    """
    own = {spec.name for spec in prepared.model.outputs}
    names = {output.name for output in prepared.outputs}
    tensors = prepared.model.join(answers, outputs=sorted(names & own))
    for output in prepared.outputs:
        if output.name in tensors and tensors[output.name].dtype.kind == "f":
            _require(prepared, ~np.isnan(tensors[output.name]), f"output {output.name!r}", "NaN")
    tensors |= _derivatives(prepared, answers, names - own)
    return [_written(output, tensors[output.name], prepared.model) for output in prepared.outputs]


def _require(prepared: PreparedRequest, usable: Array, output: str, what: str) -> None:
    """Raise for the first row of an output whose numbers are not all `usable`."""
    if usable.all():
        return
    batched = is_batched(prepared.model)
    row = int(np.argwhere(~usable)[0][0]) if batched else 0
    place = f" in row {row}" if batched else ""
    name = non_finite_input(prepared.jobs[row][1].inputs)
    if name is not None:
        raise BadRequest(
            f"input {name!r} holds numbers that are not finite{place}, and so does {output}",
            field=name,
        )
    raise RunFailed(
        f"the model's {output} holds {what}{place}: leave it out of outputs to get the others"
    )


def _derived(model: Model) -> tuple[TensorSpec, ...]:
    """What a text model gives beside its graph's outputs; a graph's own output of such a name is
    that output.
    """
    if not model.is_text:
        return ()
    own = {spec.name: spec for spec in model.outputs}
    derived = (
        TensorSpec(name=_PROBABILITIES, datatype="FP64", shape=own[LOGITS].shape),
        TensorSpec(name=_LABEL, datatype=BYTES, shape=(-1,)),
        TensorSpec(name=_TRUNCATED, datatype="BOOL", shape=(-1,)),
    )
    return tuple(spec for spec in derived if spec.name not in own)


def _asked(model: Model, request: InferRequest, *, of_text: bool) -> tuple[AskedOutput, ...]:
    """The outputs that the request names, or all that apply. Raises BadRequest for a name that the
    model has not.
    """
    own = {spec.name for spec in model.outputs}
    offered = [
        spec.name
        for spec in outputs_of(model)
        if of_text or spec.name != _TRUNCATED or _TRUNCATED in own
    ]
    for output in request.outputs:
        if output.name not in offered:
            raise BadRequest(
                f"{output.field}.name must be one of {', '.join(offered)}, got"
                f" {shown(output.name)}",
                field=f"{output.field}.name",
            )
    return request.outputs or tuple(
        AskedOutput(name=name, binary=request.binary_output, classes=None, field="outputs")
        for name in offered
    )


def _require_rows(inputs: Sequence[InputTensor], max_rows: int) -> None:
    for tensor in inputs:
        if tensor.shape and tensor.shape[0] > max_rows:
            raise BadRequest(
                f"{tensor.field}.shape.0 must be at most {max_rows}, the rows of a request, got"
                f" {tensor.shape[0]}: split them, or raise {setting_named('max_rows')}",
                field=f"{tensor.field}.shape.0",
            )


def _texts(tensor: InputTensor) -> list[str]:
    """The texts of an input of shape [N] or [N, 1]."""
    if tensor.datatype != BYTES:
        raise BadRequest(
            f"{tensor.field}.datatype must be {BYTES} for {TEXT.name}, got {tensor.datatype}",
            field=f"{tensor.field}.datatype",
        )
    if tensor.shape[1:] not in ((), (1,)) or not tensor.shape:
        raise BadRequest(
            f"{tensor.field}.shape must be [N] or [N, 1], a text a row, got {list(tensor.shape)}",
            field=f"{tensor.field}.shape",
        )
    return [
        _decoded(element, f"{tensor.field}.data.{place}")
        for place, element in enumerate(tensor.data.ravel())
    ]


def _decoded(element: str | bytes, field: str) -> str:
    if isinstance(element, str):
        return element
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{field} is not UTF-8", field=field) from error


def _derivatives(
    prepared: PreparedRequest, answers: Sequence[Tensors], names: set[str]
) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    if from_logits := sorted(names & {_PROBABILITIES, _LABEL}):
        logits = np.concatenate([answer[LOGITS] for answer in answers])  # (N, C)
        output = f"output {LOGITS!r}, the source of {' and '.join(map(repr, from_logits))},"
        _require(prepared, np.isfinite(logits), output, "numbers that are not finite")
        # Each row from its own answer, as /v1 does it: the number of rows beside it must not change
        # a bit.
        rows = [softmax(answer[LOGITS][0].tolist()) for answer in answers]
        tensors[_PROBABILITIES] = np.array(rows, dtype=np.float64)
        labels = prepared.model.labels or ()
        tensors[_LABEL] = np.array([labels[best(row, 1)[0]] for row in rows], dtype=object)
    if prepared.truncated is not None:
        tensors[_TRUNCATED] = np.array(prepared.truncated, dtype=np.bool_)
    return tensors


def _written(output: AskedOutput, data: Array, model: Model) -> OutputTensor:
    if output.classes is not None:
        data = classify(data, output.classes, labels=model.labels, name=output.name)
    return OutputTensor(name=output.name, data=data, binary=output.binary)
