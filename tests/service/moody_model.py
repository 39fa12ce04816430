"""A tiny model that is slow for some texts, never ends for one, and answers another with NaN.

Its answers to all other texts have the same bits as those of the original model.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.frontend import NgramFrontEnd, NgramSpec

SLOW, VERY_SLOW, ENDLESS, NAN_TEXT = "⏳", "🐌", "∞", "☠"

# The iterations of a loop: about 20 ms, about 500 ms, and no end within a test.
_ITERATIONS = {SLOW: 600, VERY_SLOW: 15_000, ENDLESS: 1 << 40}
_WIDTH = 512


def moody_model(original: bytes, spec: NgramSpec) -> bytes:
    """The model `original`, with a loop and with NaN for some texts; `spec` is its front end's."""
    model = onnx.load_from_string(original)
    node, info = helper.make_node, helper.make_tensor_value_info
    model.graph.node[-1].output[0] = "original_logits"

    # Tables of the two effects, read by the id of a character.
    iterations = np.zeros(spec.vocabulary, np.int64)
    for text, count in _ITERATIONS.items():
        iterations[_id_of_character(text, spec)] = count
    offsets = np.zeros(spec.vocabulary, np.float32)
    offsets[_id_of_character(NAN_TEXT, spec)] = np.nan
    constants = {
        "iterations": iterations,
        "offsets": offsets,
        "always": np.array(True),
        "square": np.eye(_WIDTH, dtype=np.float32),
        "start": np.ones((8, _WIDTH), np.float32),
        "zero_factor": np.zeros(1, np.float32),
        "ids": np.array([1, 2], np.int64),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in constants.items()
    )

    # Each iteration multiplies by the identity, so the result of the loop stays finite.
    body = helper.make_graph(
        [
            node("Identity", ["condition_in"], ["condition_out"]),
            node("MatMul", ["x_in", "square"], ["x_out"]),
        ],
        "iteration",
        [
            info("iteration_in", TensorProto.INT64, []),
            info("condition_in", TensorProto.BOOL, []),
            info("x_in", TensorProto.FLOAT, [8, _WIDTH]),
        ],
        [
            info("condition_out", TensorProto.BOOL, []),
            info("x_out", TensorProto.FLOAT, [8, _WIDTH]),
        ],
    )
    model.graph.node.extend(
        [
            # The batch runs as many iterations as its slowest text needs.
            node("Gather", ["iterations", "input_ids"], ["iterations_of_ids"]),
            node("ReduceMax", ["iterations_of_ids"], ["iterations_of_batch"], keepdims=0),
            node("Loop", ["iterations_of_batch", "always", "start"], ["looped"], body=body),
            # The result is multiplied by 0 and added, so that ONNX Runtime cannot remove the loop.
            node("ReduceSum", ["looped"], ["looped_sum"], keepdims=0),
            node("Mul", ["looped_sum", "zero_factor"], ["nothing"]),
            node("Add", ["original_logits", "nothing"], ["delayed_logits"]),
            # Each row gets the sum of its own offsets: 0, or NaN.
            node("Gather", ["offsets", "input_ids"], ["offsets_of_ids"]),
            node("ReduceSum", ["offsets_of_ids", "ids"], ["offset_of_row"], keepdims=0),
            node("Unsqueeze", ["offset_of_row", "positions"], ["offset_of_rows"]),
            node("Add", ["delayed_logits", "offset_of_rows"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def _id_of_character(text: str, spec: NgramSpec) -> int:
    """The id of a single character: that of its unigram, after the boundary character."""
    return int(NgramFrontEnd(spec).encode(text).ids.reshape(-1, spec.orders)[1][0])
