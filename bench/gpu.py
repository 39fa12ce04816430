"""Measures a bundle on a GPU or on another processor, and prints JSON.

    python bench/gpu.py BUNDLE [--provider cuda|cpu] [--known-answers]

The script needs onnxruntime-gpu (or onnxruntime) and numpy, and nothing of this project. So it can
be copied beside a bundle onto a machine that has a GPU. It measures, once with the deterministic
settings (TF32 off, CUBLAS_WORKSPACE_CONFIG=:16:8) and once with the defaults of the provider (TF32
on):

- whether its answers are identical to the known answers in the bundle, which those of an exact
  bundle are under both settings, and how far they are from these and from those of the CPU;
- at which row counts of 1..64, and at which lengths, a row keeps the bits that it has alone;
- which floating-point nodes ran on the CPU although the provider is another one;
- rows per second at 1, 8 and 64 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Tensors = Mapping[str, np.ndarray]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SETTINGS = ("deterministic", "default")
IDENTICAL = "identical to the known answers"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
ROW_COUNTS = range(1, 65)
TIMED_ROWS = (1, 8, 64)
ROWS_PER_LENGTH = 8
# At each row count the rows are rotated so often.
ROTATIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle: the folder NAME/VERSION")
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--settings", choices=SETTINGS, help="only these, in this process")
    parser.add_argument(
        "--known-answers", action="store_true", help="compare the answers, and measure nothing else"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    arguments = parser.parse_args()
    for name in ("manifest.json", "model.onnx", "known_answers.npz"):
        if not (arguments.bundle / name).is_file():
            parser.error(f"{arguments.bundle / name} is not there: BUNDLE is a folder NAME/VERSION")
    # torch's wheels bring CUDA and cuDNN; this finds them without torch being imported.
    if arguments.provider == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    if PROVIDERS[arguments.provider] not in ort.get_available_providers():
        available = ", ".join(ort.get_available_providers())
        parser.error(f"provider {arguments.provider} is not available here, these are: {available}")
    if arguments.settings is None:
        # A process for each settings, because cuBLAS reads its variable once.
        reports = {settings: measure_in_process(settings) for settings in SETTINGS}
    else:
        report = measure(
            arguments.bundle,
            arguments.provider,
            arguments.settings,
            known_answers_only=arguments.known_answers,
            timed_s=arguments.seconds,
        )
        reports = {arguments.settings: report}
    manifest = json.loads((arguments.bundle / "manifest.json").read_bytes())
    full_report = {
        "bundle": f"{manifest['name']}/{manifest['version']}",
        "provider": PROVIDERS[arguments.provider],
        "onnxruntime": ort.__version__,
        "device": device_name(),
        "processor": {"architecture": platform.machine(), "instructions": vector_instructions()},
        **reports,
    }
    print(json.dumps(full_report, indent=2))


def measure_in_process(settings: str) -> Any:
    """What this script reports under these settings, with its own arguments beside them.

    It is the last line that the process wrote if it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != WORKSPACE}
    if settings == "deterministic":
        environment[WORKSPACE] = ":16:8"
    command = [sys.executable, __file__, *sys.argv[1:], "--settings", settings]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return {"error": lines[-1]}
    return json.loads(process.stdout)[settings]


def device_name() -> str | None:
    """The name of the GPU by nvidia-smi. None without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return process.stdout.strip() or None


def vector_instructions() -> list[str]:
    """The extensions of the instruction set that NumPy finds here beyond those it requires."""
    extensions: dict[str, Any] = np.show_config(mode="dicts")["SIMD Extensions"]
    return list(extensions.get("found", ()))


def measure(
    bundle: Path, provider: str, settings: str, *, known_answers_only: bool, timed_s: float
) -> dict[str, Any]:
    """All figures of a bundle on one provider, in this process."""
    session = open_session(bundle, provider, settings)
    answers = known_answers(bundle)
    compared = compare(session, open_session(bundle, "cpu", settings), answers)
    report = {
        "tf32": provider == "cuda" and settings != "deterministic",
        WORKSPACE: os.environ.get(WORKSPACE),
        "verdict": verdict(compared),
        "known_answers": compared,
        # Without another provider, no node falls back to the CPU.
        "float_nodes_left_to_the_cpu": (
            []
            if provider == "cpu"
            else float_nodes_on_cpu(bundle, provider, settings, answers[0][0])
        ),
    }
    if known_answers_only:
        return report
    rows = rows_by_length(bundle, answers)
    return report | {
        "row_counts": {
            str(length): stable_row_counts(session, singles) for length, singles in rows.items()
        },
        "rows_per_second": {
            str(length): {
                str(count): speed(session, singles, count, timed_s=timed_s) for count in TIMED_ROWS
            }
            for length, singles in rows.items()
        },
    }


def verdict(compared: Mapping[str, Any]) -> str:
    """Whether the answers are those in the bundle, in one line; `compared` is from `compare`."""
    recorded, count = compared["recorded"], compared["answers"]
    differing = count - recorded["bitwise_equal"]
    if not differing:
        return IDENTICAL
    difference = recorded["largest_difference_in_deviations"]
    return (
        f"{differing} of {count} known answers have other bits, by at most {difference:.2g}"
        " standard deviations"
    )


def open_session(
    bundle: Path, provider: str, settings: str, *, profile: str | None = None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    chosen: list[Any] = [PROVIDERS["cpu"]]
    if provider == "cuda":
        deterministic = settings == "deterministic"
        options.use_deterministic_compute = deterministic
        cuda = {"use_tf32": "0" if deterministic else "1"}
        chosen = [(PROVIDERS["cuda"], cuda), *chosen]
    session = ort.InferenceSession(bundle / "model.onnx", options, providers=chosen)
    # ONNX Runtime falls back to the CPU, with a line in its log, when CUDA cannot be opened.
    if PROVIDERS[provider] not in session.get_providers():
        raise SystemExit(f"{PROVIDERS[provider]} could not be opened: {session.get_providers()}")
    return session


def run(session: ort.InferenceSession, inputs: Tensors) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def known_answers(bundle: Path) -> list[tuple[Tensors, Tensors]]:
    """The inputs and outputs in the bundle, in their order; `0/input/NAME`, `0/output/NAME`."""
    answers: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
    with np.load(bundle / "known_answers.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            index, kind, *name = key.split("/", 2)
            if kind in ("input", "output"):
                parts = answers.setdefault(int(index), ({}, {}))
                parts[kind == "output"][name[0]] = arrays[key]
    if not answers:
        raise SystemExit(f"{bundle} holds no known answers, and without inputs nothing can be run")
    return [answers[index] for index in sorted(answers)]


def compare(
    session: ort.InferenceSession,
    on_cpu: ort.InferenceSession,
    answers: list[tuple[Tensors, Tensors]],
) -> dict[str, Any]:
    """How far this session's answers are from those of the CPU here, and from the recorded ones.

    A difference is max|d| over the standard deviation of all reference values of an output.
    """
    own = [run(session, inputs) for inputs, _ in answers]
    references = {
        "cpu_here": [run(on_cpu, inputs) for inputs, _ in answers],
        "recorded": [outputs for _, outputs in answers],
    }
    report: dict[str, Any] = {"answers": len(answers)}
    for name, reference in references.items():
        equal = sum(
            all(answer[key].tobytes() == expected[key].tobytes() for key in expected)
            for answer, expected in zip(own, reference, strict=True)
        )
        worst = 0.0
        for key in reference[0]:
            values = np.concatenate([answer[key].astype(np.float64).ravel() for answer in own])
            expected = np.concatenate(
                [answer[key].astype(np.float64).ravel() for answer in reference]
            )
            worst = max(
                worst, float(np.abs(values - expected).max()) / (float(expected.std()) or 1.0)
            )
        report[name] = {"bitwise_equal": equal, "largest_difference_in_deviations": worst}
    return report


def rows_by_length(
    bundle: Path, answers: list[tuple[Tensors, Tensors]]
) -> dict[int, list[dict[str, np.ndarray]]]:
    """Single rows at every length that the bundle serves: the known answers', cut or repeated.

    A length is the size of the first axis beside the batch that varies; 0 where none does.
    """
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    shapes = {item["name"]: item["shape"] for item in manifest["inputs"]}
    axes = {
        name: next((axis for axis, size in enumerate(shape) if axis and size == -1), None)
        for name, shape in shapes.items()
    }
    own_lengths = {
        next((array.shape[axis] for name, array in inputs.items() if (axis := axes[name])), 0)
        for inputs, _ in answers
    }
    ladder = (manifest.get("frontend") or {}).get("lengths") or sorted(own_lengths)
    rows: dict[int, list[dict[str, np.ndarray]]] = {}
    for length in ladder:
        for inputs, _ in answers[:ROWS_PER_LENGTH]:
            row = {}
            for name, array in inputs.items():
                if (axis := axes[name]) is not None:
                    index = np.arange(length) % array.shape[axis]
                    array = np.take(array, index, axis)
                row[name] = np.ascontiguousarray(array[:1])
            rows.setdefault(length, []).append(row)
    return rows


def stable_row_counts(
    session: ort.InferenceSession, rows: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """The row counts at which every row has the bits that it has alone, at each tried position."""
    alone = [run(session, row) for row in rows]
    unstable = []
    for count in ROW_COUNTS:
        # Each rotation gives the rows other neighbours and other positions.
        for shift in range(min(len(rows), ROTATIONS)):
            order = [(shift + position) % len(rows) for position in range(count)]
            answer = run(session, stacked(rows, order))
            same = all(
                answer[name][position].tobytes() == alone[index][name][0].tobytes()
                for position, index in enumerate(order)
                for name in answer
            )
            if not same:
                unstable.append(count)
                break
    stable = [count for count in ROW_COUNTS if count not in unstable]
    return {"stable": spans(stable), "unstable": spans(unstable)}


def stacked(rows: list[dict[str, np.ndarray]], order: list[int]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([rows[index][name] for index in order]) for name in rows[0]}


def spans(counts: list[int]) -> str:
    """The counts as ranges: `1-5, 7, 9-64`."""
    parts: list[list[int]] = []
    for count in counts:
        if parts and parts[-1][-1] == count - 1:
            parts[-1] = [parts[-1][0], count]
        else:
            parts.append([count])
    return ", ".join("-".join(map(str, part)) for part in parts)


def float_nodes_on_cpu(bundle: Path, provider: str, settings: str, inputs: Tensors) -> list[str]:
    """The nodes with a floating-point output that ran on the CPU, by a profile of one run."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(bundle, provider, settings, profile=f"{folder}/profile")
        run(session, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {}
    for event in events:
        details = event.get("args", {})
        floats = any(
            kind in ("float", "double", "float16", "bfloat16")
            for output in details.get("output_type_shape", ())
            for kind in output
        )
        if floats and details.get("provider") == PROVIDERS["cpu"]:
            nodes[f"{event['name'].removesuffix('_kernel_time')} ({details['op_name']})"] = None
    return list(nodes)


def speed(
    session: ort.InferenceSession,
    rows: list[dict[str, np.ndarray]],
    count: int,
    *,
    timed_s: float,
) -> float:
    """Rows per second, by the median time of a run."""
    batch = stacked(rows, [index % len(rows) for index in range(count)])
    seconds: list[float] = []
    end = time.perf_counter() + timed_s
    while time.perf_counter() < end or len(seconds) < 5:
        started = time.perf_counter()
        run(session, batch)
        seconds.append(time.perf_counter() - started)
    return round(count / float(np.median(seconds)), 1)


if __name__ == "__main__":
    main()
