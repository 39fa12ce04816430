from __future__ import annotations

import json

import numpy as np
import pytest

from evalmode.service.errors import BadRequest
from evalmode.service.protocol.response import OutputTensor, classify, encode_response

LOGITS = np.array([[0.1, 2.5, -1.0], [3.0, 3.0, 0.0]], np.float32)
NAMED = {"model_name": "m", "model_version": "1", "digest": "0" * 64}
LABELS = ("hu", "nl:x", "fi")


def test_json_outputs_are_row_major_lists_that_read_back_to_the_same_bits():
    encoded = encode_response(
        [OutputTensor(name="logits", data=LOGITS, binary=False)], **NAMED, request_id="\ud83d"
    )
    response = json.loads(encoded.body)
    assert encoded.json_length is None
    assert (response["model_name"], response["model_version"], response["id"]) == (
        "m",
        "1",
        "\ud83d",
    )
    assert response["parameters"] == {"digest": "0" * 64}
    (output,) = response["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 3])
    assert np.array(output["data"], np.float32).tobytes() == LOGITS.tobytes()


def test_binary_outputs_follow_the_json_in_their_order():
    texts = np.array(["é", b"\xff"], dtype=object)
    encoded = encode_response(
        [
            OutputTensor(name="a", data=texts, binary=True),
            OutputTensor(name="b", data=np.array([True]), binary=False),
            OutputTensor(name="c", data=LOGITS.T, binary=True),
        ],
        **NAMED,
    )
    assert encoded.json_length is not None
    response = json.loads(encoded.body[: encoded.json_length])
    assert "id" not in response
    a, b, c = response["outputs"]
    assert (a["datatype"], a["parameters"]) == ("BYTES", {"binary_data_size": 11})
    assert b["data"] == [True]
    assert "data" not in c
    raw = encoded.body[encoded.json_length :]
    assert raw == b"\2\0\0\0\xc3\xa9\1\0\0\0\xff" + LOGITS.T.tobytes()
    assert len(raw) == a["parameters"]["binary_data_size"] + c["parameters"]["binary_data_size"]


def test_classes_are_written_best_first_and_equal_ones_by_their_index():
    classes = classify(LOGITS, 2, labels=LABELS, name="logits")
    assert classes.tolist() == [
        ["2.5:1:nl:x", "0.10000000149011612:0:hu"],
        ["3.0:0:hu", "3.0:1:nl:x"],
    ]


def test_a_count_above_the_classes_returns_all_and_labels_of_another_number_are_left_out():
    assert classify(LOGITS, 9, labels=("a",), name="x").shape == (2, 3)
    assert classify(LOGITS[:, :2], 1, labels=LABELS, name="x").tolist() == [["2.5:1"], ["3.0:0"]]
    assert classify(np.array([4, 5]), 3, labels=None, name="x").tolist() == [["4:0"], ["5:0"]]


def test_nan_is_the_worst_class():
    classes = classify(np.array([[np.nan, -np.inf, 1.0]]), 3, labels=None, name="x")
    assert classes.tolist() == [["1.0:2", "-inf:1", "nan:0"]]


@pytest.mark.parametrize(
    "data", [np.array([[True]]), np.array([["a"]], dtype=object), np.zeros((1, 2, 3))]
)
def test_an_output_without_classes_is_refused(data: np.ndarray):
    with pytest.raises(BadRequest, match='output "x" has no classes'):
        classify(data, 1, labels=None, name="x")
