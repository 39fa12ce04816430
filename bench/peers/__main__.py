"""Compares this project's server with others: one graph, one client, one machine, in one run.

    python bench/peers bundles/languages/1
    python bench/peers bundles/languages/1 --quick --peers evalmode,plain --models text

Every server is measured in each round, in another order each time, so that a drift of the machine
does not favour one of them. Ratios are within a round, to plain FastAPI at its better of one and
two processes. The figures are written as JSON, a Markdown table and a PNG. docs/performance.md has
the method.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from environments import NotInstalledError, environment
from formats import Scores
from load import NoLoadGeneratorError, require_wrk
from measuring import Plan, Sample, measure_ceiling, measure_peer
from peers import COMMON, PEERS, PLAIN, Peer, python_of_bench
from processes import ServerError
from report import describe_machine, write_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from workloads import Workload, rows_workload, text_workload

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peers"
ITEMS, QUICK_ITEMS = 256, 32
MODELS = ("text", "rows")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python bench/peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [peer.name for peer in PEERS]
    parser.add_argument("bundle", type=Path, help="a bundle that classifies texts: NAME/VERSION")
    parser.add_argument("--peers", default=",".join(names), help="of these: %(default)s")
    parser.add_argument(
        "--models",
        default=",".join(MODELS),
        help="text: the bundle over JSON; rows: four layers of 256 over v2 (default: both)",
    )
    parser.add_argument("--concurrency", help="connections (default: 1,8,64)")
    parser.add_argument("--seconds", type=int, help="of each load, whole seconds (default: 4)")
    parser.add_argument("--rounds", type=int, help="(default: 3)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 8, 1 s, 1 round")
    parser.add_argument(
        "--out", type=Path, default=BUILD / "results", help="(default: %(default)s)"
    )
    parser.add_argument("--no-chart", action="store_true", help="no PNG, which matplotlib draws")
    arguments = parser.parse_args()

    quick = arguments.quick
    arguments.concurrency = arguments.concurrency or ("8" if quick else "1,8,64")
    arguments.seconds = arguments.seconds or (1 if quick else 4)
    arguments.rounds = arguments.rounds or (1 if quick else 3)
    if arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--seconds and --rounds must be at least 1")
    try:
        arguments.concurrency = [int(count) for count in arguments.concurrency.split(",")]
    except ValueError:
        parser.error(f"--concurrency must be numbers with commas, got {arguments.concurrency!r}")
    if min(arguments.concurrency) < 1:
        parser.error("--concurrency must be at least 1")
    for option, known in (("peers", names), ("models", MODELS)):
        values = getattr(arguments, option).split(",")
        for value in values:
            if value not in known:
                parser.error(f"--{option} has no {value!r}: these are {', '.join(known)}")
        setattr(arguments, option, values)
    if not (arguments.bundle / "manifest.json").is_file():
        parser.error(f"{arguments.bundle}/manifest.json is not there: BUNDLE is NAME/VERSION")
    return arguments


def install(peers: list[Peer], console: Console) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each peer by its name, and the reason for each that has none."""
    pythons, reasons = {}, {}
    for peer in peers:
        if peer.environment is None:
            pythons[peer.name] = python_of_bench()
            continue
        with console.status(f"install {peer.title}"):
            try:
                requirements = [*peer.requirements, *COMMON]
                pythons[peer.name] = environment(peer.environment, requirements, build=BUILD)
            except NotInstalledError as error:
                reasons[peer.name] = f"not installed: {error}"
                console.print(f"{peer.title}: {reasons[peer.name]}", markup=False)
    return pythons, reasons


def run(
    workloads: list[Workload],
    peers: list[Peer],
    plan: Plan,
    *,
    pythons: dict[str, Path],
    reasons: dict[str, str],
    console: Console,
) -> list[Sample]:
    """All samples. A server that failed is a sample with the reason, and is not started again."""
    samples: list[Sample] = []
    references: dict[str, list[Scores]] = {}
    failed = {
        (name, workload.name): text for name, text in reasons.items() for workload in workloads
    }
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(workloads) * plan.rounds * (1 + len(peers))
        task = progress.add_task("", total=total)
        for workload in workloads:
            for round_number in range(plan.rounds):
                title = f"{workload.name}, round {round_number + 1} of {plan.rounds}"
                progress.update(task, description=f"{title}: ceiling")
                samples.append(measure_ceiling(workload, plan, round_number=round_number))
                progress.advance(task)
                # The first round begins with the first server, which is the reference of answers.
                for peer in peers if round_number % 2 == 0 else reversed(peers):
                    key = (peer.name, workload.name)
                    if workload.name in peer.formats and key not in failed:
                        try:
                            samples += measure_peer(
                                peer,
                                workload,
                                plan,
                                round_number=round_number,
                                python=pythons[peer.name],
                                references=references,
                                progress=lambda step, name=f"{title}: {peer.title}": (
                                    progress.update(task, description=f"{name}, {step}")
                                ),
                            )
                        except ServerError as error:
                            failed[key] = str(error)
                            console.print(f"{title}: {peer.title}: {error}", markup=False)
                    progress.advance(task)
    for (name, workload_name), reason in failed.items():
        peer = next(peer for peer in peers if peer.name == name)
        samples += [
            Sample(
                peer=name,
                workload=workload_name,
                format=form.name,
                connections=0,
                round=0,
                error=reason,
            )
            for form in peer.formats.get(workload_name, ())
        ]
    return samples


def draw_chart(report: Path, chart: Path, console: Console) -> None:
    """Draw the PNG in an environment that has matplotlib."""
    try:
        with console.status("install matplotlib"):
            python = environment("chart", ["matplotlib"], build=BUILD)
        script = Path(__file__).with_name("chart.py")
        subprocess.run([str(python), str(script), str(report), str(chart)], check=True)
    except (NotInstalledError, subprocess.CalledProcessError) as error:
        console.print(f"no chart: {error}", markup=False)


def interrupt(*_: object) -> NoReturn:
    """End as Ctrl-C does: every context is left, and so every server is ended."""
    raise KeyboardInterrupt


def main() -> None:
    """Measure, and write the report."""
    arguments = parse_arguments()
    console = Console()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        require_wrk()
        count = QUICK_ITEMS if arguments.quick else ITEMS
        workloads = []
        if "text" in arguments.models:
            workloads.append(text_workload(arguments.bundle, count=count))
        if "rows" in arguments.models:
            with console.status("export four layers of 256, once"):
                workloads.append(rows_workload(BUILD, count=count))
    except (NoLoadGeneratorError, ValueError, RuntimeError) as error:
        sys.exit(str(error))

    # One of the two processes is the base of all ratios, so either name brings both.
    names = {*arguments.peers, *(PLAIN if set(PLAIN) & set(arguments.peers) else ())}
    peers = [peer for peer in PEERS if peer.name in names]
    plan = Plan(
        concurrency=arguments.concurrency, seconds=arguments.seconds, rounds=arguments.rounds
    )
    pythons, reasons = install(peers, console)
    machine = describe_machine(pythons)
    samples = run(workloads, peers, plan, pythons=pythons, reasons=reasons, console=console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = arguments.out / "peers.json"
    content = {
        "machine": machine,
        "plan": vars(plan),
        "workloads": {workload.name: workload.title for workload in workloads},
        "titles": {peer.name: peer.title for peer in peers},
        "notes": [peer.note for peer in peers if peer.note],
        "samples": [vars(sample) for sample in samples],
    }
    report.write_text(json.dumps(content, indent=1) + "\n")
    table = arguments.out / "peers.md"
    write_report(table, content, samples)
    console.print(table.read_text(), markup=False, highlight=False, soft_wrap=True)
    if not arguments.no_chart:
        draw_chart(report, arguments.out / "peers.png", console)
    console.print(f"written to {arguments.out}", markup=False, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
