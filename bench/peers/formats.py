"""How one text, or one row of ids, travels to a server and back.

A format turns an item into the body of a request, and the answer into its scores. A score keeps
the spelling that the server gave it, so two answers have equal scores only if all bits are equal.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

JSON_TYPE = "application/json"
HEADER_LENGTH = "inference-header-content-length"

# Servers pad to other lengths and join other rows, so their last bits differ. A wrong front end or
# a wrong mask differs by far more.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Request:
    """A POST request. `headers` lack the host and the length of the body."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": JSON_TYPE})


@dataclass(frozen=True)
class Scores:
    """The label of a text, or None, and the scores as the server spelled them."""

    label: str | None
    numbers: tuple[str, ...]

    def agrees_with(self, other: Scores) -> bool:
        """Whether both are answers of one model for one item, up to rounding."""
        pairs = list(zip(self.numbers, other.numbers, strict=False))
        if not pairs or self.label != other.label:
            return False
        return all(abs(float(left) - float(right)) < TOLERANCE for left, right in pairs)


class Format(ABC):
    """One way to ask for one item. `name` is the column of the report."""

    name = "json"

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def request(self, item: Any) -> Request:
        """The request for a text, or for the ids of one row."""

    @abstractmethod
    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        """The scores of an answer. Raises KeyError, IndexError or ValueError for another body."""

    def json_request(self, content: Any) -> Request:
        """A request whose body is JSON, without spaces."""
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return Request(path=self.path, body=text.encode())


class TextJson(Format):
    """`{"inputs": [text]}` -> `{"predictions": [{"label": ..., "top": [...]}]}`, or the list."""

    def request(self, item: str) -> Request:
        return self.json_request({"inputs": [item]})

    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        answer = parse(body)
        predictions = answer if isinstance(answer, list) else answer["predictions"]
        prediction = predictions[0]
        return Scores(prediction["label"], tuple(best["score"] for best in prediction["top"]))


class TextV2(Format):
    """A BYTES tensor `text` -> the tensors `label` and `score`."""

    def __init__(self, path: str, *, shape: Sequence[int] = (1,)) -> None:
        super().__init__(path)
        self.shape = list(shape)

    def request(self, item: str) -> Request:
        tensor = {"name": "text", "shape": self.shape, "datatype": "BYTES", "data": [item]}
        return self.json_request({"inputs": [tensor]})

    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        outputs = {output["name"]: output["data"] for output in parse(body)["outputs"]}
        return Scores(flat(outputs["label"])[0], tuple(flat(outputs["score"])))


class RowJson(Format):
    """`{"input_ids": [ids], "attention_mask": [mask]}` -> `{"logits": [row]}`."""

    def request(self, item: Sequence[int]) -> Request:
        mask = [1] * len(item)
        return self.json_request({"input_ids": [list(item)], "attention_mask": [mask]})

    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        return Scores(None, tuple(flat(parse(body)["logits"])))


class RowList(Format):
    """`{"rows": [{"input_ids": ids, "attention_mask": mask}]}` -> `[{"logits": row}]`."""

    def request(self, item: Sequence[int]) -> Request:
        row = {"input_ids": list(item), "attention_mask": [1] * len(item)}
        return self.json_request({"rows": [row]})

    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        return Scores(None, tuple(parse(body)[0]["logits"]))


class RowV2(Format):
    """The tensors `input_ids` and `attention_mask` -> the tensor `logits`, all of them in JSON."""

    def request(self, item: Sequence[int]) -> Request:
        shape = [1, len(item)]
        ids = {"name": "input_ids", "shape": shape, "datatype": "INT64", "data": list(item)}
        mask = {**ids, "name": "attention_mask", "data": [1] * len(item)}
        return self.json_request({"inputs": [ids, mask]})

    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        return Scores(None, tuple(flat(parse(body)["outputs"][0]["data"])))


class RowBinary(Format):
    """The same tensors as raw little-endian numbers behind a header in JSON."""

    name = "binary"

    def request(self, item: Sequence[int]) -> Request:
        ids = np.array(item, "<i8").tobytes()
        mask = np.ones(len(item), "<i8").tobytes()
        inputs = [
            {
                "name": name,
                "shape": [1, len(item)],
                "datatype": "INT64",
                "parameters": {"binary_data_size": len(data)},
            }
            for name, data in (("input_ids", ids), ("attention_mask", mask))
        ]
        parameters = {"binary_data_output": True}
        header = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
        headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
        return Request(path=self.path, body=header + ids + mask, headers=headers)

    def scores(self, headers: Mapping[str, str], body: bytes) -> Scores:
        logits = np.frombuffer(body[int(headers[HEADER_LENGTH]) :], "<f4")
        return Scores(None, tuple(map(repr, logits.tolist())))


def parse(body: bytes) -> Any:
    """The JSON of an answer, whose numbers with a point stay strings, digit by digit."""
    return json.loads(body, parse_float=str, parse_constant=str)


def flat(data: Any) -> list[Any]:
    """The elements of `data`, which some servers nest by the shape of a tensor."""
    if not isinstance(data, list):
        return [data]
    return [element for part in data for element in flat(part)]
