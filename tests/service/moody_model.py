"""A tiny model with moods: some texts take it a while, one never ends, and one is answered with
NaN.

Its other answers have the bits that the model it is made of gives.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.frontend import NgramFrontEnd, NgramSpec

SLOW, SLUGGISH, ENDLESS, POISON = "⏳", "🐌", "∞", "☠"


_WIDTH = 512
_TURNS = {SLOW: 600, SLUGGISH: 15_000, ENDLESS: 1 << 40}  # some 20 ms, some 500 ms, and for ever


def moody_model(calm: bytes, spec: NgramSpec) -> bytes:
    """The model that `calm` is, with moods; `spec` is its front end's."""
    model = onnx.load_from_string(calm)
    node = helper.make_node
    model.graph.node[-1].output[0] = "calm"
    turns, spoiled = np.zeros(spec.vocabulary, np.int64), np.zeros(spec.vocabulary, np.float32)
    for text, count in _TURNS.items():
        turns[_own_id(text, spec)] = count
    spoiled[_own_id(POISON, spec)] = np.nan
    constants = {
        "turns": turns,
        "spoiled": spoiled,
        "on": np.array(True),
        "square": np.eye(_WIDTH, dtype=np.float32),
        "begun": np.ones((8, _WIDTH), np.float32),
        "nothing": np.zeros(1, np.float32),
        "ids": np.array([1, 2], np.int64),
    }
    body = helper.make_graph(
        [
            node("Identity", ["cond_in"], ["cond_out"]),
            node("MatMul", ["x_in", "square"], ["x_out"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn_in", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x_in", TensorProto.FLOAT, [8, _WIDTH]),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x_out", TensorProto.FLOAT, [8, _WIDTH]),
        ],
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in constants.items()
    )
    model.graph.node.extend(
        [
            node("Gather", ["turns", "input_ids"], ["turns_of_ids"]),
            node("ReduceMax", ["turns_of_ids"], ["turns_of_batch"], keepdims=0),
            node("Loop", ["turns_of_batch", "on", "begun"], ["turned"], body=body),
            node("ReduceSum", ["turned"], ["turned_sum"], keepdims=0),
            node("Mul", ["turned_sum", "nothing"], ["waited"]),
            node("Gather", ["spoiled", "input_ids"], ["spoiled_of_ids"]),
            node("ReduceSum", ["spoiled_of_ids", "ids"], ["spoiled_of_row"], keepdims=0),
            node("Unsqueeze", ["spoiled_of_row", "positions"], ["spoiled_of_rows"]),
            node("Add", ["calm", "waited"], ["calmed"]),
            node("Add", ["calmed", "spoiled_of_rows"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def _own_id(text: str, spec: NgramSpec) -> int:
    """The id of a text of one character: of its n-gram of one, the character behind the
    boundary.
    """
    return int(NgramFrontEnd(spec).encode(text).ids.reshape(-1, spec.orders)[1][0])
