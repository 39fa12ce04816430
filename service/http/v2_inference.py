"""An inference request as rows for the engine, and the answers of these rows as output tensors.

A text model takes `text`, or the inputs of its graph instead. Besides the outputs of its graph it
has `probabilities`, the best `label`, and for texts `truncated`. Any other model has the inputs and
outputs of its graph alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.manifest import TensorSpec
from evalmode.service.batching.bucket import Job
from evalmode.service.errors import BadRequest, RunFailed, TextTooLong
from evalmode.service.models.model import WHOLE, Model
from evalmode.service.models.scores import ranking, softmax
from evalmode.service.models.tensors import non_finite_input
from evalmode.service.models.text import LOGITS
from evalmode.service.protocol.datatypes import BYTES, Array
from evalmode.service.protocol.request import InferRequest, InputTensor, RequestedOutput
from evalmode.service.protocol.response import OutputTensor, classify
from evalmode.service.settings import setting_named
from evalmode.service.strict_json import shown

TEXT = TensorSpec(name="text", datatype=BYTES, shape=(-1,))

# The outputs that a text model has besides those of its graph.
_PROBABILITIES, _LABEL, _TRUNCATED = "probabilities", "label", "truncated"


class PreparedRequest(NamedTuple):
    """A request that its model can answer.

    Attributes:
        model: the model that answers.
        jobs: the rows for the engine, each with its bucket.
        outputs: the outputs of the response, in their order.
        truncated: for each text whether it was cut; None for a request without texts.
    """

    model: Model
    jobs: Sequence[Job]
    outputs: Sequence[RequestedOutput]
    truncated: Sequence[bool] | None


def inputs_of(model: Model) -> tuple[TensorSpec, ...]:
    """The inputs of a model; a text model takes either the first one or all the others."""
    return (TEXT, *model.inputs) if model.is_text else model.inputs


def outputs_of(model: Model) -> tuple[TensorSpec, ...]:
    """The outputs of a model: those of its graph, and for a text model the derived ones."""
    if not model.is_text:
        return model.outputs
    graph_outputs = {spec.name: spec for spec in model.outputs}
    derived_outputs = (
        TensorSpec(name=_PROBABILITIES, datatype="FP64", shape=graph_outputs[LOGITS].shape),
        TensorSpec(name=_LABEL, datatype=BYTES, shape=(-1,)),
        TensorSpec(name=_TRUNCATED, datatype="BOOL", shape=(-1,)),
    )
    # An output of the graph with such a name is served, not replaced.
    new_outputs = [spec for spec in derived_outputs if spec.name not in graph_outputs]
    return (*model.outputs, *new_outputs)


def only_input(model: Model) -> TensorSpec | None:
    """The input that a raw body fills: the text, or the only input of a graph; otherwise None."""
    if model.is_text:
        return TEXT
    return model.inputs[0] if len(model.inputs) == 1 else None


def is_batched(model: Model) -> bool:
    """Whether the rows of a request are batched independently of one another."""
    return WHOLE not in model.measured


def prepare(model: Model, request: InferRequest, *, max_rows: int) -> PreparedRequest:
    """The rows of a request. Raises BadRequest, naming the field, for one that `model` cannot take.

    In this order a request is refused for

    1. more rows than `max_rows`, where the first dimension of a tensor counts rows;
    2. an output that the model does not have;
    3. tensors that are not what the model takes;
    4. a text beside other tensors, or one that is not a text, not UTF-8 or too long.
    """
    if is_batched(model):
        for tensor in request.inputs:
            if tensor.shape and tensor.shape[0] > max_rows:
                raise BadRequest(
                    f"{tensor.path}.shape.0 must be at most {max_rows}, the rows of a request, got"
                    f" {tensor.shape[0]}: split them, or raise {setting_named('max_rows')}",
                    field=f"{tensor.path}.shape.0",
                )

    # A graph of tensors may have an input of this name, too.
    text: InputTensor | None = None
    if model.is_text:
        text = next((tensor for tensor in request.inputs if tensor.name == TEXT.name), None)

    output_names = [spec.name for spec in outputs_of(model)]
    if text is None and model.is_text and _TRUNCATED not in [spec.name for spec in model.outputs]:
        # Ids are never cut, so there is nothing to say about them.
        output_names.remove(_TRUNCATED)
    for output in request.outputs:
        if output.name not in output_names:
            raise BadRequest(
                f"{output.path}.name must be one of {', '.join(output_names)}, got"
                f" {shown(output.name)}",
                field=f"{output.path}.name",
            )
    outputs = request.outputs
    if not outputs:
        # A request that names no outputs gets all of them.
        outputs = tuple(
            [RequestedOutput(name, request.binary_output, None, "outputs") for name in output_names]
        )

    if text is None:
        jobs = model.tensor_jobs({tensor.name: tensor.data for tensor in request.inputs})
        return PreparedRequest(model, jobs, outputs, None)

    for tensor in request.inputs:
        if tensor is not text:
            raise BadRequest(
                "inputs must be the text alone, or tensors without it, got also"
                f" {shown(tensor.name)}",
                field="inputs",
            )
    try:
        jobs, truncated = model.text_rows(_texts_of(text), truncate=request.truncate)
    except TextTooLong as error:
        # The error names a text of /v1, `inputs.3`; here texts are the elements of a tensor.
        field = f"{text.path}.data.{error.index}"
        raise BadRequest(f"{field} {error.problem}", field=field) from error
    return PreparedRequest(model, jobs, outputs, truncated)


def _texts_of(tensor: InputTensor) -> list[str]:
    """The texts of an input of shape [N] or [N, 1]."""
    if tensor.datatype != BYTES:
        raise BadRequest(
            f"{tensor.path}.datatype must be {BYTES} for {TEXT.name}, got {tensor.datatype}",
            field=f"{tensor.path}.datatype",
        )
    if not tensor.shape or tensor.shape[1:] not in ((), (1,)):
        raise BadRequest(
            f"{tensor.path}.shape must be [N] or [N, 1], a text a row, got {list(tensor.shape)}",
            field=f"{tensor.path}.shape",
        )
    texts: list[str] = []
    for index, element in enumerate(tensor.data.ravel()):
        try:
            texts.append(element if isinstance(element, str) else element.decode())
        except UnicodeDecodeError as error:
            field = f"{tensor.path}.data.{index}"
            raise BadRequest(f"{field} is not UTF-8", field=field) from error
    return texts


def output_tensors(prepared: PreparedRequest, answers: Sequence[Tensors]) -> list[OutputTensor]:
    """The outputs of the response, from the answers of the rows in their order.

    NaN is an error in a requested output, in JSON and in binary, and is ignored in any other one.
    Raises RunFailed, or BadRequest where numbers of the request itself are not finite.
    """
    model = prepared.model
    requested_names = {output.name for output in prepared.outputs}

    # Outputs of the graph.
    graph_names = sorted([spec.name for spec in model.outputs if spec.name in requested_names])
    tensors: dict[str, Array] = {**model.join(answers, outputs=graph_names)}
    for output in prepared.outputs:
        tensor = tensors.get(output.name)
        if tensor is not None and tensor.dtype.kind == "f":
            is_nan = np.isnan(tensor)
            if is_nan.any():
                _refuse(prepared, is_nan, output=f"output {output.name!r}", problem="NaN")

    # Outputs that are computed from the logits.
    derived_names = requested_names.difference(graph_names)
    from_logits = sorted(derived_names & {_PROBABILITIES, _LABEL})
    if from_logits:
        logits = np.concatenate([answer[LOGITS] for answer in answers])  # (N, C)
        is_finite = np.isfinite(logits)
        if not is_finite.all():
            _refuse(
                prepared,
                ~is_finite,
                output=f"output {LOGITS!r}, the source of {' and '.join(map(repr, from_logits))},",
                problem="numbers that are not finite",
            )
        if _PROBABILITIES in from_logits:
            tensors[_PROBABILITIES] = softmax(logits)
        if _LABEL in from_logits:
            labels = np.array(model.labels or (), dtype=object)
            tensors[_LABEL] = labels[ranking(logits)[:, 0]]
    if prepared.truncated is not None and _TRUNCATED in derived_names:
        tensors[_TRUNCATED] = np.array(prepared.truncated, dtype=np.bool_)

    written: list[OutputTensor] = []
    for output in prepared.outputs:
        data = tensors[output.name]
        if output.class_count is not None:
            data = classify(data, output.class_count, labels=model.labels, name=output.name)
        written.append(OutputTensor(output.name, data, output.binary))
    return written


def _refuse(prepared: PreparedRequest, faults: Array, *, output: str, problem: str) -> NoReturn:
    """Raise for the first row of an output in which a number is at fault.

    Numbers of the request that are not finite are the client's mistake, others are the model's.
    """
    row = 0
    in_row = ""
    # A model that is not batched answers a request as one job, and its rows are not told apart.
    if is_batched(prepared.model):
        row = int(np.argwhere(faults)[0][0])
        in_row = f" in row {row}"
    name = non_finite_input(prepared.jobs[row][1].inputs)
    if name is not None:
        raise BadRequest(
            f"input {name!r} holds numbers that are not finite{in_row}, and so does {output}",
            field=name,
        )
    raise RunFailed(
        f"the model's {output} holds {problem}{in_row}: leave it out of outputs to get the others"
    )
