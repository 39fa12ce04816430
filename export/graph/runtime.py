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
import os
import select
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import onnx

from evalmode.export.graph.weight import Array

TIME_S = 20.0  # of one answer; the first one waits for the runtime to be loaded, too
MEMORY_BYTES = 4 << 30  # of address space, of which the runtime's libraries take a part
ELEMENTS = 1024  # of any tensor on the way
_LENGTH = struct.Struct("<q")  # before each message; -1 where nothing is decided


def computed(model: onnx.ModelProto) -> Array | None:
    """The last output of a model without inputs, or None where it is not decided.

    All values that the nodes make are outputs of the model, the wanted one last. With optimisation
    it runs with that output alone: nodes whose values are asked for would not be fused or folded.
    """
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    del alone.graph.output[:-1]
    with _lock:
        answer = _child.ask(model.SerializeToString(), alone.SerializeToString())
    return None if answer is None else np.load(io.BytesIO(answer), allow_pickle=False)


class _Child:
    """One process that answers models, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, *models: bytes) -> bytes | None:
        end = time.monotonic() + TIME_S
        try:
            if self._process is None:
                self._process = subprocess.Popen(
                    # -P: a file named onnx.py in the working directory is not imported.
                    [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            assert self._process.stdin is not None
            for model in models:
                self._process.stdin.write(_LENGTH.pack(len(model)) + model)
            self._process.stdin.flush()
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, end))
            return None if length < 0 else self._read(length, end)
        except (OSError, EOFError):  # a TimeoutError is an OSError
            self.close()
            return None

    def _read(self, count: int, end: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, data = self._process.stdout.fileno(), b""
        while len(data) < count:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(descriptor, count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def close(self) -> None:
        """End the process; a later question starts another one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was not written yet
                continue


_child = _Child()
_lock = threading.Lock()  # files are verified in several threads
atexit.register(_child.close)


def main() -> None:
    """The child: answer each pair of models with the bytes of an .npy file, until there are no
    more.
    """
    import resource

    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a library may print

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    while header := questions.read(_LENGTH.size):
        model = questions.read(*_LENGTH.unpack(header))
        alone = questions.read(*_LENGTH.unpack(questions.read(_LENGTH.size)))
        try:
            array = _run(model, alone)
        except Exception:  # whatever the runtime raises for nodes that it refuses
            array = None
        if array is None:
            answers.write(_LENGTH.pack(-1))
        else:
            file = io.BytesIO()
            np.save(file, array)
            answers.write(_LENGTH.pack(file.tell()) + file.getvalue())
        answers.flush()


def _run(model: bytes, alone: bytes) -> Array | None:
    import onnxruntime as ort

    results = []
    for data, level in (
        (model, ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
        (alone, ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    ):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
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
