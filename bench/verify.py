"""How long the verifier takes: the onnx wheel's corpus, and files of 100 and 1,900 MB; and what
memory it holds. And how long a server reads the operators of a model before it opens it.

Each figure of the verifier is a fresh process of the real command. `python bench/verify.py
[--large]`; the machine is noisy.
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
    """Every node model of the onnx wheel, in a file each."""
    cases = load_model_tests(kind="node")
    for index, case in enumerate(cases):
        if case.model is not None:
            onnx.save(case.model, folder / f"{index:04}_{case.name}.onnx")
    return len(list(folder.iterdir()))


def write_large(path: Path, megabytes: int) -> None:
    """A chain of products whose weights have this size together."""
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
        made = [f"{kind}{index}" for kind in ("product", "norm", "drop", "turn")]
        weight = np.zeros((316, 316), np.float32)
        weights.append(numpy_helper.from_array(weight, f"layers.{index}.weight"))
        inputs = [value, *made]
        nodes += [
            helper.make_node("MatMul", [inputs[0], weights[-1].name], [made[0]]),
            helper.make_node("LayerNormalization", [inputs[1], "scale"], [made[1]], axis=-1),
            helper.make_node("Dropout", [inputs[2], "", "mode"], [made[2]]),
            helper.make_node("Transpose", [inputs[3]], [made[3]], perm=[0, 2, 1, 3]),
        ]
        value = made[-1]
    for index, node in enumerate(nodes):
        node.name = f"layers.{index // 4}/{node.op_type}_{index}"
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    imports = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


# A process that is forked from a large one counts its parent's memory as its own: a small one
# stands between.
_MEASURED = (
    "import resource, subprocess, sys, time\nstarted = time.perf_counter()\ncode ="
    " subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\nprint(time.perf_counter()"
    " - started, code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def verified(path: Path) -> tuple[float, int, float]:
    """Seconds, the exit code, and the largest resident set in MB."""
    command = [sys.executable, "-c", _MEASURED, EVALMODE, "verify", path, "--format", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, code, resident = done.stdout.split()[-3:]
    return float(seconds), int(code), int(resident) / 1024


def main() -> None:
    """Measure and print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--large", action="store_true", help="also write and verify a file of 1,900 MB"
    )
    asked = parser.parse_args()
    table = Table("case", "seconds", "exit code", "resident at most, MB")
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        cases = [(f"{write_corpus(corpus)} node models", corpus)]
        for megabytes in (100, 1900) if asked.large else (100,):
            write_large(Path(name) / f"{megabytes}.onnx", megabytes)
            cases.append((f"one file of {megabytes} MB", Path(name) / f"{megabytes}.onnx"))
        for title, path in cases:
            seconds, code, resident = verified(path)
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
