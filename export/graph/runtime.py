"""Constants that ONNX Runtime itself computes, in a child process with limits of time and memory.

The runtime itself must compute the values that decide a mode. Other implementations saturate,
reorder and round differently. The child runs the nodes with optimisation off and on. It answers
only if both runs agree, and if no intermediate array holds floating-point numbers, on which
execution providers differ. If the child aborts, hangs or meets a limit, that value is undecided,
and the next value gets a new child.
"""

from __future__ import annotations

import atexit
import io
import threading
from collections.abc import Iterator

import numpy as np
import onnx

from evalmode.child_process import Child, ChildLost, bound_address_space, serve
from evalmode.export.graph.weight import Array

TIME_S = 20.0  # for one answer; the first one includes loading the runtime
MEMORY_BYTES = 128 << 20  # beyond what the child has taken before it runs anything
ELEMENTS = 1024  # of each array, intermediate ones too


def compute(model: onnx.ModelProto) -> Array | None:
    """The last output of a model without inputs, or None if it is not decided.

    The outputs of all nodes must be outputs of the model, so that the child sees each of them.
    """
    with _lock:
        try:
            messages = list(_child.ask(model.SerializeToString(), time_s=TIME_S))
        except ChildLost:
            return None
    return np.load(io.BytesIO(messages[0]), allow_pickle=False) if messages else None


_child = Child(f"{__name__}:main")
_lock = threading.Lock()  # files are verified in several threads
atexit.register(_child.close)


def main() -> None:
    """The child's main function: answer each model with the bytes of an .npy file, or nothing."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # fatal errors only
    bound_address_space(MEMORY_BYTES)
    serve(_answer)


def _answer(model_bytes: bytes) -> Iterator[bytes]:
    try:
        array = _run(model_bytes)
    except Exception:  # the runtime raises many types for nodes that it refuses
        return
    if array is not None:
        file = io.BytesIO()
        np.save(file, array)
        yield file.getvalue()


def _run(model_bytes: bytes) -> Array | None:
    import onnxruntime as ort

    # The optimised run has the last output only: the runtime does not fuse or fold a node whose
    # value is an output.
    optimisable = onnx.load_model_from_string(model_bytes)
    del optimisable.graph.output[:-1]
    results = []
    for model, level in (
        (model_bytes, ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
        (optimisable.SerializeToString(), ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    ):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        arrays = session.run(None, {})
        for array in arrays:
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biu":
                return None
            if array.size > ELEMENTS:
                return None
        results.append(arrays[-1])
    plain, optimised = results
    if (plain.dtype, plain.shape) != (optimised.dtype, optimised.shape):
        return None
    return plain if plain.tobytes() == optimised.tobytes() else None
