"""Constants computed by ONNX Runtime itself, in a child process with limits of time and memory.

What decides a mode must be what the runtime computes, and not what another implementation does:
runtimes saturate, reorder and round differently. The child runs the nodes with optimisation off and
on. It answers only where both agree and nothing on the way is a floating-point number, on which
execution providers differ. Run as `python -m evalmode.export.graph.runtime`, with a model on stdin.
"""

from __future__ import annotations

import io
import resource
import subprocess
import sys

import numpy as np
import onnx

from evalmode.export.graph.weight import Array

TIME_S = 20.0
MEMORY_BYTES = 4 << 30  # of address space, of which the runtime's libraries take a part
ELEMENTS = 1024  # of any tensor on the way


def computed(model: onnx.ModelProto) -> Array | None:
    """The last output of a model without inputs, or None where it is not decided.

    All values that the nodes make are outputs of the model, the wanted one last.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", "evalmode.export.graph.runtime"],
            input=model.SerializeToString(),
            capture_output=True,
            timeout=TIME_S,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    if child.returncode != 0:  # the runtime refused the nodes, aborted, or met a limit
        return None
    array: Array = np.load(io.BytesIO(child.stdout), allow_pickle=False)
    return array


def main() -> int:
    """Answer with the bytes of an .npy file, or with exit code 1 where nothing is decided."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import onnxruntime as ort  # in the child alone

    ort.set_default_logger_severity(4)
    model = sys.stdin.buffer.read()
    answers = []
    for level in (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        # With optimisation, asking for every value would keep nodes from being fused or folded.
        wanted = outputs if level is ort.GraphOptimizationLevel.ORT_DISABLE_ALL else outputs[-1:]
        arrays = session.run(wanted, {})
        for array in arrays:
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biu":
                return 1
            if array.size > ELEMENTS:
                return 1
        answers.append(arrays[-1])
    plain, optimised = answers
    if plain.dtype != optimised.dtype or plain.shape != optimised.shape:
        return 1
    if plain.tobytes() != optimised.tobytes():
        return 1
    np.save(sys.stdout.buffer, plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
