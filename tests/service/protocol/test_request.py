from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from evalmode.bundle.manifest import TensorSpec
from evalmode.service.errors import BadRequest
from evalmode.service.protocol.request import InferRequest, parse_infer_request

TEXT = TensorSpec(name="text", datatype="BYTES", shape=(-1,))
IDS = {"name": "ids", "datatype": "INT64", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}


def parse(body: Any, raw: bytes = b"", **arguments: Any) -> InferRequest:
    head = body if isinstance(body, bytes) else json.dumps(body).encode()
    if raw:
        arguments.setdefault("json_length", str(len(head)))
    return parse_infer_request(head + raw, **{"max_top_k": 10, **arguments})


def refusal(body: Any, raw: bytes = b"", **arguments: Any) -> str:
    with pytest.raises(BadRequest) as error:
        parse(body, raw, **arguments)
    return str(error.value)


def body_of(**changes: Any) -> dict[str, Any]:
    return {
        "inputs": [{key: value for key, value in {**IDS, **changes}.items() if value is not ...}]
    }


def test_a_tensor_is_read_flat_or_nested():
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]):
        tensor = parse(body_of(data=data)).inputs[0]
        assert (tensor.name, tensor.datatype, tensor.shape) == ("ids", "INT64", (2, 3))
        assert tensor.data.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert tensor.data.dtype == np.int64


def test_missing_fields_have_their_defaults_and_unknown_ones_are_ignored():
    request = parse(
        {**body_of(), "model_name": "languages", "id": None, "outputs": None, "parameters": None}
    )
    assert (
        request.id,
        request.outputs,
        request.binary_output,
        request.truncate,
        request.timeout_s,
    ) == (
        None,
        (),
        False,
        True,
        None,
    )


@pytest.mark.parametrize("key", ["input", "ouputs", "parameter", "paramters", "Inputs"])
def test_a_misspelt_field_of_the_request_is_refused(key: str):
    with pytest.raises(BadRequest) as refusal:
        parse({**body_of(), key: []})
    assert str(refusal.value).startswith(f"{key} is not a field of this request: did you mean ")
    assert refusal.value.field == key


@pytest.mark.parametrize("key", ["model_name", "model_version", "user", "x" * 1000, "", "ids"])
def test_fields_that_clients_add_to_the_request_are_ignored(key: str):
    assert parse({**body_of(), key: "x"}).inputs[0].name == "ids"


def test_an_unknown_field_of_a_tensor_is_refused():
    with pytest.raises(BadRequest) as refusal:
        parse(body_of(paramters={}))
    assert str(refusal.value) == (
        "inputs.0.paramters is not a field of inputs.0, which has name, shape, datatype,"
        " parameters, data"
    )
    with pytest.raises(BadRequest) as refusal:
        parse({**body_of(), "outputs": [{"name": "a"}, {"name": "b", "classification": 3}]})
    assert str(refusal.value) == (
        "outputs.1.classification is not a field of outputs.1, which has name, parameters"
    )
    assert refusal.value.field == "outputs.1.classification"


def test_parameters_of_the_request_are_read():
    request = parse(
        {
            **body_of(),
            "id": "7",
            "parameters": {
                "binary_data_output": True,
                "truncate": False,
                "timeout": 1500,
                "priority": 1,
            },
            "outputs": [
                {"name": "a"},
                {"name": "b", "parameters": {"binary_data": False, "classification": 3}},
            ],
        }
    )
    assert (request.id, request.binary_output, request.truncate, request.timeout_s) == (
        "7",
        True,
        False,
        0.0015,
    )
    assert [(output.name, output.binary, output.class_count) for output in request.outputs] == [
        ("a", True, None),
        ("b", False, 3),
    ]


def test_raw_tensors_follow_the_json_in_their_order():
    ids, scale = np.arange(6), np.array([0.5], np.float32)
    request = parse(
        {
            "inputs": [
                {**IDS, "data": None, "parameters": {"binary_data_size": 48}},
                {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["é"]},
                {
                    "name": "scale",
                    "datatype": "FP32",
                    "shape": [1],
                    "parameters": {"binary_data_size": 4},
                },
            ]
        },
        ids.astype("<i8").tobytes() + scale.astype("<f4").tobytes(),
    )
    assert request.inputs[0].data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert request.inputs[1].data.tolist() == ["é"]
    assert request.inputs[2].data.tolist() == [0.5]


def test_a_raw_body_fills_the_only_input():
    request = parse(b"", "Ez egy rövid mondat.".encode(), json_length="0", only_input=TEXT)
    assert request.inputs[0].data.tolist() == ["Ez egy rövid mondat.".encode()]
    assert request.inputs[0].shape == (1,)
    assert request.binary_output
    for shape, expected in (
        ((-1, 2), (3, 2)),
        ((-1, -1), (1, 6)),
        ((2, 3), (2, 3)),
        ((1, -1, 2), (1, 3, 2)),
    ):
        spec = TensorSpec(name="x", datatype="FP32", shape=shape)
        raw = np.arange(6, dtype="<f4").tobytes()
        assert parse(b"", raw, json_length="0", only_input=spec).inputs[0].shape == expected


@pytest.mark.parametrize(
    ("shape", "raw", "sentence"),
    [
        ((-1, 2), b"\0" * 12, "must be 8 bytes"),
        ((-1, 2), b"", "must be 8 bytes for 2 elements of FP32, got 0"),
        ((-1, -1, -1), b"\0" * 12, "more than one dimension that varies"),
        ((3, 2), b"\0" * 12, "must be 24 bytes"),
    ],
)
def test_a_raw_body_of_the_wrong_size_is_refused(shape: tuple[int, ...], raw: bytes, sentence: str):
    spec = TensorSpec(name="x", datatype="FP32", shape=shape)
    assert sentence in refusal(b"", raw, json_length="0", only_input=spec)


def test_a_raw_body_for_a_model_of_several_inputs_is_refused():
    assert "needs a model of one input" in refusal(b"", b"abc", json_length="0")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is empty: it must be JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (
            b'{"inputs": [{"name": "x", "shape": ' + b"[" * 900 + b"]" * 900 + b"}]}",
            "inputs.0.datatype must be one of",
        ),
        (b'{"inputs": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a is a number of 5000 digits"),
        ([], "the body must be a JSON object, got a list"),
        ({}, "inputs must hold at least 1 tensor"),
        ({"inputs": []}, "inputs must hold at least 1 tensor"),
        ({"inputs": {}}, "inputs must be a list of tensors, got an object"),
        ({"inputs": [3]}, "inputs.0 must be an object, got 3"),
        ({"inputs": [{}]}, "inputs.0.name must be a string, got nothing"),
        ({"inputs": [IDS, IDS]}, 'inputs.1.name is "ids", the name of an earlier tensor'),
        ({**body_of(), "id": 7}, "id must be a string, got 7"),
        ({**body_of(), "parameters": 7}, "parameters must be an object, got 7"),
        (
            {**body_of(), "parameters": {"truncate": 1}},
            "parameters.truncate must be true or false, got 1",
        ),
        (
            {**body_of(), "parameters": {"binary_data_output": "x"}},
            "parameters.binary_data_output must be true or false",
        ),
        (
            {**body_of(), "parameters": {"timeout": -1}},
            "parameters.timeout must be an integer from 0",
        ),
        ({**body_of(), "outputs": "x"}, "outputs must be a list of tensors"),
        ({**body_of(), "outputs": [{"name": "a"}, {"name": "a"}]}, "outputs.1.name is"),
        (
            {**body_of(), "outputs": [{"name": "a", "parameters": {"classification": 0}}]},
            "outputs.0.parameters.classification must be an integer from 1 to 10, got 0",
        ),
        (
            {**body_of(), "outputs": [{"name": "a", "parameters": {"classification": True}}]},
            "outputs.0.parameters.classification must be an integer from 1 to 10, got true",
        ),
        (
            {
                **body_of(),
                "outputs": [{"name": "a", "parameters": {"shared_memory_region": "r"}}],
            },
            "outputs.0.parameters.shared_memory_region: this server offers no shared memory",
        ),
        (body_of(datatype=...), "inputs.0.datatype must be one of BOOL, UINT8"),
        (body_of(datatype="BF16"), "inputs.0.datatype must be one of"),
        (body_of(datatype=["INT64"]), "inputs.0.datatype must be one of"),
        (
            body_of(shape=...),
            "inputs.0.shape must be a list of at most 32 integers, got nothing",
        ),
        (body_of(shape=[1] * 33), "inputs.0.shape must be a list of at most 32 integers"),
        (body_of(shape=[0, 3]), "inputs.0.shape.0 must be an integer from 1"),
        (
            body_of(shape=[2, -1]),
            "inputs.0.shape.1 must be an integer from 1 to 2147483647, got -1",
        ),
        (body_of(shape=[2, True]), "inputs.0.shape.1 must be an integer"),
        (body_of(shape=[2, 3.0]), "inputs.0.shape.1 must be an integer"),
        (body_of(shape=[2**31 - 1] * 32), "must hold the"),
        (body_of(shape=[2, 2**31]), "inputs.0.shape.1 must be an integer"),
        (body_of(data=...), "inputs.0 must have either data, or the parameter binary_data_size"),
        (body_of(data=7), "inputs.0.data must be a list, got 7"),
        (body_of(data=[1, 2]), "inputs.0.data must hold the 6 elements of shape [2, 3], got 2"),
        (body_of(data=[[1, 2, 3], [4, 5]]), "at depth 1 not every list has 3 elements"),
        (body_of(data=[[1, 2], [3, 4], [5, 6]]), "at depth 0 not every list has 2 elements"),
        (
            body_of(data=[[1, 2, 3], [4, 5, [6]]]),
            "inputs.0.data.5 must be an integer within INT64, got a list",
        ),
        (body_of(data=[[1, 2, 3], 4]), "at depth 1 not every list"),
        (
            body_of(data=[1, 2, 3, 4, 5, 6.0]),
            "inputs.0.data.5 must be an integer within INT64, got 6.0",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_a_sentence_that_names_the_field(body: Any, sentence: str):
    assert sentence in refusal(body)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ([-1], "inputs.0.parameters.binary_data_size must be an integer from 0 to 8"),
        ([9], "inputs.0.parameters.binary_data_size must be an integer from 0 to 8, got 9"),
        ([True], "inputs.0.parameters.binary_data_size must be an integer"),
        ([8.0], "inputs.0.parameters.binary_data_size must be an integer"),
        ([4], "inputs.0.data must be 8 bytes for 1 elements of INT64, got 4"),
        ([8, 8], "inputs.1.parameters.binary_data_size must be an integer from 0 to 0, got 8"),
        ([None], "inputs.0 must have either data"),
    ],
)
def test_a_size_that_the_body_does_not_have_is_refused(sizes: list[Any], sentence: str):
    inputs = [
        {
            "name": str(index),
            "datatype": "INT64",
            "shape": [1],
            "parameters": {"binary_data_size": size},
        }
        for index, size in enumerate(sizes)
    ]
    assert sentence in refusal({"inputs": inputs}, b"\0" * 8)


def test_bytes_that_no_input_claims_are_refused():
    assert "inputs claim 0 of the 3 bytes behind the JSON" in refusal(body_of(), b"abc")


def test_a_tensor_as_json_and_as_bytes_is_refused():
    assert "must have either data" in refusal(
        body_of(parameters={"binary_data_size": 48}), b"\0" * 48
    )


@pytest.mark.parametrize("header", ["-1", "x", "", "²", "1.0", "999", "9" * 5000])
def test_a_json_length_that_is_not_a_length_is_refused(header: str):
    assert "header inference-header-content-length must be the length of the JSON" in refusal(
        body_of(), json_length=header
    )


def test_a_nested_tensor_of_a_million_elements_costs_no_more_than_its_elements():
    rows = [[7] * 1000] * 1000
    assert parse(body_of(shape=[1000, 1000], data=rows)).inputs[0].data.sum() == 7_000_000
