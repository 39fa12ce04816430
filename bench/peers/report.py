"""The Markdown table: medians of the rounds, and ratios within a round to plain FastAPI."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import Sample
from peers import PEERS, PLAIN

HEAD = "| server | {loads} | CPU, us a request | memory, MiB | cold start, s | changed answers |"


def describe_machine(pythons: Mapping[str, Path]) -> dict[str, Any]:
    """The processor, the cores, and the version of each server and of its ONNX Runtime."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    versions = {}
    for peer in PEERS:
        if peer.name not in pythons:
            continue
        names = [peer.requirements[0].partition("[")[0] if peer.requirements else "fastapi"]
        names.append("onnxruntime")
        program = "import sys; from importlib.metadata import version; "
        program += "print(*(f'{name} {version(name)}' for name in sys.argv[1:]), sep=', ')"
        process = subprocess.run(
            [str(pythons[peer.name]), "-c", program, *names],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        versions[peer.name] = process.stdout.strip()
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "versions": versions,
    }


def ratios(samples: Sequence[Sample], of: Sequence[Sample]) -> list[float]:
    """For each sample, its rate by the better plain server's in its round and concurrency.

    `samples` are all of one workload. The plain servers take JSON alone, so binary requests are
    compared with JSON too. Empty where no plain server was measured.
    """
    values = []
    for sample in of:
        rates = [
            other.per_s
            for other in samples
            if other.peer in PLAIN
            and other.round == sample.round
            and other.connections == sample.connections
            and not other.error
        ]
        if rates:
            values.append(sample.per_s / max(rates))
    return values


def median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """The median of a figure over samples."""
    return statistics.median(figure(sample) for sample in samples)


def row(title: str, samples: Sequence[Sample], workload: Sequence[Sample], loads: list[int]) -> str:
    """The line of one server in one format; `workload` are the samples of all servers."""
    measured = [sample for sample in samples if not sample.error]
    if not measured:
        reason = samples[0].error.replace("|", "\\|").replace("\n", " ")
        return f"| {title} | {reason} |" + " |" * (len(loads) + 3)
    cells = []
    for connections in loads:
        part = [sample for sample in measured if sample.connections == connections]
        rate = f"{median(part, lambda sample: sample.per_s):,.0f}"
        if relative := ratios(workload, part):
            rate += f" ({statistics.median(relative):.2f})"
        percentiles = (
            median(part, lambda sample: sample.p50_ms),
            median(part, lambda sample: sample.p95_ms),
            median(part, lambda sample: sample.p99_ms),
        )
        cell = f"{rate}; {' / '.join(f'{value:.1f}' for value in percentiles)} ms"
        if errors := sum(sample.errors for sample in part):
            cell += f"; {errors} errors"
        cells.append(cell)
    most = [sample for sample in measured if sample.connections == max(loads)]
    compared = sum(sample.compared for sample in most)
    changed = sum(sample.changed for sample in most)
    share = f"{changed} of {compared:,}"
    share += f" ({100 * changed / compared:.1f} %)" if compared else ""
    cells += [
        f"{median(most, lambda sample: sample.cpu_us):,.0f}",
        f"{median(most, lambda sample: sample.memory_mb):,.0f}",
        f"{median(most, lambda sample: sample.cold_start_s):.2f}",
        share,
    ]
    return f"| {title} | {' | '.join(cells)} |"


def ceiling_row(samples: Sequence[Sample], workload: Sequence[Sample], loads: list[int]) -> str:
    """The line of ONNX Runtime alone: its best rate, its ratios, and a row alone on one thread."""
    rate = median(samples, lambda sample: sample.per_s)
    way = statistics.mode(sample.way for sample in samples)
    cells = []
    for connections in loads:
        part = [Sample(**{**vars(sample), "connections": connections}) for sample in samples]
        relative = ratios(workload, part)
        cells.append(f"{rate:,.0f}" + (f" ({statistics.median(relative):.2f})" if relative else ""))
    percentiles = [
        median(samples, lambda sample: sample.p50_ms),
        median(samples, lambda sample: sample.p95_ms),
        median(samples, lambda sample: sample.p99_ms),
    ]
    alone = " / ".join(f"{value:.2f}" for value in percentiles)
    cpu = f"{median(samples, lambda sample: sample.cpu_us):,.0f}"
    title = f"ceiling: {way}; one row alone {alone} ms"
    return f"| {title} | {' | '.join(cells)} | {cpu} |  |  |  |"


def write_report(path: Path, content: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write the table of each workload and format."""
    loads = list(content["plan"]["concurrency"])
    machine = content["machine"]
    lines = [
        f"{machine['cores']} cores of {machine['processor']}, the load generator included;"
        f" {content['plan']['rounds']} rounds of {content['plan']['seconds']} s.",
        "",
        "Requests/s (ratio to the better plain FastAPI); p50 / p95 / p99. CPU, memory and changed"
        f" answers are those at {max(loads)} connections.",
    ]
    for workload, title in content["workloads"].items():
        of_workload = [sample for sample in samples if sample.workload == workload]
        formats = sorted(
            {sample.format for sample in of_workload if sample.peer != "ceiling"}, reverse=True
        )
        for form in formats:
            columns = " | ".join(f"{count} connection{'s' if count > 1 else ''}" for count in loads)
            lines += ["", f"### {title}, {form}", "", HEAD.format(loads=columns)]
            lines.append("|" + "---|" * (len(loads) + 5))
            ceiling = [sample for sample in of_workload if sample.peer == "ceiling"]
            if ceiling:
                lines.append(ceiling_row(ceiling, of_workload, loads))
            for name, peer_title in content["titles"].items():
                part = [
                    sample
                    for sample in of_workload
                    if sample.peer == name and sample.format == form
                ]
                if part:
                    lines.append(row(peer_title, part, of_workload, loads))
    lines += ["", *(f"- {note}" for note in content["notes"]), ""]
    lines += [f"Versions: {name}: {versions}." for name, versions in machine["versions"].items()]
    path.write_text("\n".join(lines) + "\n")
