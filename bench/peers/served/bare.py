"""The ceiling: ONNX Runtime on ready rows, without HTTP, with the best threads and batch.

    BENCH_MODEL=bundles/languages/1 python served/bare.py ITEMS SECONDS

ITEMS is a JSON file of texts, or of rows of ids. The rows are encoded, sorted by length, and padded
before the time is taken. One line of JSON has the figures of the best way.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx_model import OnnxModel, cores

BATCHES = (1, 2, 4, 8, 16, 32, 64)
# The part of the measured time that each way is tried for.
TRIAL = 1 / 10

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Way:
    """So many threads of Python that run sessions of so many threads on batches of this size."""

    runners: int
    threads: int
    batch: int


def batches_of(model: OnnxModel, rows: list[np.ndarray], size: int) -> list[Inputs]:
    """The rows in batches of `size`, each padded to its longest row."""
    rows = sorted(rows, key=len)
    batches = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        length = len(part[-1])
        input_ids = np.zeros((len(part), length, *part[0].shape[1:]), np.int64)
        attention_mask = np.zeros((len(part), length), np.int64)
        for index, row in enumerate(part):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        inputs = {"input_ids": input_ids}
        if model.has_mask:
            inputs["attention_mask"] = attention_mask
        batches.append(inputs)
    return batches


def measure(
    models: list[OnnxModel], batches: list[Inputs], *, seconds: float
) -> tuple[float, list[float]]:
    """Rows a second, and the milliseconds of each run. Each model runs in a thread of its own."""
    runs_ms: list[list[float]] = [[] for _ in models]
    rows = [0] * len(models)
    for model in models:
        model.session.run(None, batches[-1])  # warm up: memory for the longest batch
    # Nothing can fail before the barrier, so no thread waits there for one that has failed.
    barrier = threading.Barrier(len(models))

    def run(index: int) -> None:
        session = models[index].session
        barrier.wait()
        deadline = time.perf_counter() + seconds
        # Each thread begins elsewhere, so that they do not run the long batches at once.
        position = index * len(batches) // len(models)
        while (started := time.perf_counter()) < deadline:
            inputs = batches[position % len(batches)]
            session.run(None, inputs)
            runs_ms[index].append(1000 * (time.perf_counter() - started))
            rows[index] += len(inputs["input_ids"])
            # A stride that has no factor with a power of two mixes short and long batches.
            position += 7

    started = time.perf_counter()
    with ThreadPoolExecutor(len(models)) as executor:
        list(executor.map(run, range(len(models))))  # raises what a run raised
    elapsed = time.perf_counter() - started
    return sum(rows) / elapsed, [milliseconds for runs in runs_ms for milliseconds in runs]


def main(items: Path, seconds: float) -> None:
    """Find the best way, measure it, and print."""
    folder = Path(os.environ["BENCH_MODEL"])
    by_threads = {
        threads: [OnnxModel(folder, threads=threads) for _ in range(runners)]
        for runners, threads in {(cores(), 1), (1, cores())}
    }
    first = by_threads[1][0]
    rows = [
        first.front_end.encode(item) if first.front_end is not None else np.array(item, np.int64)
        for item in json.loads(items.read_text())
    ]
    best, best_rate = None, 0.0
    for threads, models in by_threads.items():
        for batch in BATCHES:
            rate, _ = measure(models, batches_of(first, rows, batch), seconds=TRIAL * seconds)
            if rate > best_rate:
                best, best_rate = Way(runners=len(models), threads=threads, batch=batch), rate
    assert best is not None
    started = time.process_time()
    models, batches = by_threads[best.threads], batches_of(first, rows, best.batch)
    rate, _ = measure(models, batches, seconds=seconds)
    cpu_s = time.process_time() - started
    _, alone_ms = measure([first], batches_of(first, rows, 1), seconds=seconds)
    report: dict[str, Any] = {
        "rows_per_s": rate,
        "cpu_us": 1e6 * cpu_s / (rate * seconds),
        "p50_ms": float(np.percentile(alone_ms, 50)),
        "p95_ms": float(np.percentile(alone_ms, 95)),
        "p99_ms": float(np.percentile(alone_ms, 99)),
        "way": f"{best.runners} x {best.threads} threads, batches of {best.batch}",
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
