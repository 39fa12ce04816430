"""Constants computed by ONNX Runtime itself, in a child process with limits of time and memory.

What decides a mode must be what the runtime computes, and not what another implementation does:
runtimes saturate, reorder and round differently. The child runs the nodes with optimisation off and
on. It answers only where both agree and nothing on the way is a floating-point number, on which
execution providers differ. A child that aborts, hangs or meets a limit leaves that value undecided,
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

TIME_S = 20.0  # of one answer; the first one waits for the runtime to be loaded, too
MEMORY_BYTES = 128 << 20  # beyond what the child takes before it has run anything
ELEMENTS = 1024  # of any tensor on the way


def computed(model: onnx.ModelProto) -> Array | None:
    """The last output of a model without inputs, or None where it is not decided.

    All values that the nodes make are outputs of the model, the wanted one last.
    """
    with _lock:
        try:
            answer = list(_child.ask(model.SerializeToString(), time_s=TIME_S))
        except ChildLost:
            return None
    return np.load(io.BytesIO(answer[0]), allow_pickle=False) if answer else None


_child = Child(f"{__name__}:main")
_lock = threading.Lock()  # files are verified in several threads
atexit.register(_child.close)


def main() -> None:
    """The child: answer each model with the bytes of an .npy file, or with nothing."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    bound_address_space(MEMORY_BYTES)
    serve(_answer)


def _answer(question: bytes) -> Iterator[bytes]:
    try:
        array = _run(question)
    except Exception:  # whatever the runtime raises for nodes that it refuses
        return
    if array is not None:
        file = io.BytesIO()
        np.save(file, array)
        yield file.getvalue()


def _run(data: bytes) -> Array | None:
    import onnxruntime as ort

    # With optimisation it runs with the wanted output alone: nodes whose values are asked for would
    # not be fused or folded.
    alone = onnx.load_model_from_string(data)
    del alone.graph.output[:-1]
    results = []
    for model, level in (
        (data, ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
        (alone.SerializeToString(), ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    ):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = options.inter_op_num_threads = 1
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
