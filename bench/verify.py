"""Measures the time and the memory of the verifier.

    python bench/verify.py [--large]

The cases are the corpus of the onnx wheel, and files of 100 and 1,900 MB. Each figure comes from a
fresh process of the real command. Then it measures how long a server reads the operators of a model
before it opens the model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from rich.console import Console
from rich.table import Table

from evalmode.bundle.operators import check_operators

EVALMODE = Path(sys.executable).parent / "evalmode"


def write_corpus(folder: Path) -> int:
    """Write every node model of the onnx wheel to a file. Returns how many there are."""
    cases = load_model_tests(kind="node")
    for index, case in enumerate(cases):
        if case.model is not None:
            onnx.save(case.model, folder / f"{index:04}_{case.name}.onnx")
    return len(list(folder.iterdir()))


def write_large(path: Path, megabytes: int) -> None:
    """Write a chain of matrix products whose weights have this size together."""
    side, count = 5000, max(1, megabytes // 100)
    weights = [
        numpy_helper.from_array(
            np.random.default_rng(index).random((side, side), dtype=np.float32), f"w{index}"
        )
        for index in range(count)
    ]
    names = ["x", *(f"h{index}" for index in range(count))]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"/{i}")
        for i in range(count)
    ]
    ends = [helper.make_tensor_value_info(name, 1, ["n", side]) for name in (names[0], names[-1])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), ir_version=9
    )
    path.write_bytes(model.SerializeToString())


def many_nodes() -> bytes:
    """A model of 1,000 nodes and 100 MB."""
    nodes, weights, value = [], [numpy_helper.from_array(np.array(False), "mode")], "x"
    for index in range(250):
        outputs = [f"{kind}{index}" for kind in ("product", "norm", "drop", "turn")]
        weight = np.zeros((316, 316), np.float32)
        weights.append(numpy_helper.from_array(weight, f"layers.{index}.weight"))
        inputs = [value, *outputs]
        nodes += [
            helper.make_node("MatMul", [inputs[0], weights[-1].name], [outputs[0]]),
            helper.make_node("LayerNormalization", [inputs[1], "scale"], [outputs[1]], axis=-1),
            helper.make_node("Dropout", [inputs[2], "", "mode"], [outputs[2]]),
            helper.make_node("Transpose", [inputs[3]], [outputs[3]], perm=[0, 2, 1, 3]),
        ]
        value = outputs[-1]
    for index, node in enumerate(nodes):
        node.name = f"layers.{index // 4}/{node.op_type}_{index}"
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    imports = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


# Linux counts the memory of a parent for a forked child. So this small process starts the command.
_MEASURING = (
    "import resource, subprocess, sys, time\nstarted = time.perf_counter()\ncode ="
    " subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\nprint(time.perf_counter()"
    " - started, code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def measure_verify(path: Path) -> tuple[float, int, float]:
    """The seconds, the exit code, and the largest resident set in MiB."""
    command = [sys.executable, "-c", _MEASURING, EVALMODE, "verify", path, "--format", "json"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, code, resident = process.stdout.split()[-3:]
    return float(seconds), int(code), int(resident) / 1024


def main() -> None:
    """Measure and print one line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--large", action="store_true", help="also write and verify a file of 1,900 MB"
    )
    arguments = parser.parse_args()
    table = Table("case", "seconds", "exit code", "largest resident set, MiB")
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        cases = [(f"{write_corpus(corpus)} node models", corpus)]
        for megabytes in (100, 1900) if arguments.large else (100,):
            write_large(Path(name) / f"{megabytes}.onnx", megabytes)
            cases.append((f"one file of {megabytes} MB", Path(name) / f"{megabytes}.onnx"))
        for title, path in cases:
            seconds, code, resident = measure_verify(path)
            table.add_row(title, f"{seconds:.2f}", str(code), f"{resident:.0f}")
    Console().print(table)
    model = many_nodes()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        check_operators(model)
        seconds.append(time.perf_counter() - started)
    Console().print(
        f"operators of 1,000 nodes in {len(model) / 1e6:.0f} MB: {min(seconds) * 1000:.0f} ms to"
        " read before a model is served"
    )


if __name__ == "__main__":
    main()
