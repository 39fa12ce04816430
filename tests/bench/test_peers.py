"""`bench/peers` on a tiny bundle: the parts that need no environment of a peer."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "bench" / "peers"
BUNDLE = ROOT / "tests" / "bundle" / "written_by" / "schema_1" / "small" / "1"

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


def run(*arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PEERS, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **options}
    )


def in_bench(program: str, *arguments: object) -> str:
    """What a program prints that imports the bench's own modules."""
    paths = os.pathsep.join([str(PEERS), str(PEERS / "served")])
    environment = {**os.environ, "PYTHONPATH": f"{paths}{os.pathsep}{ROOT}"}
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_the_bench_imports_nothing_of_this_project() -> None:
    for path in PEERS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("evalmode") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("evalmode"), path


def test_the_front_end_that_peers_use_gives_the_ids_of_the_bundle() -> None:
    program = """
import json, sys
from pathlib import Path
from front_end import open_front_end
from workloads import draw_texts
from evalmode.bundle.frontend import NgramSpec, open_frontend
folder = Path(sys.argv[1])
spec = json.loads((folder / "manifest.json").read_text())["frontend"]
ours, theirs = open_frontend(NgramSpec(**spec), None), open_front_end(folder)
texts = [*draw_texts(64), "", "  a  12 ", "e\\u0301", "x" * 1000]
print(all((ours.encode(text).ids == theirs.encode(text)).all() for text in texts))
"""
    assert in_bench(program, BUNDLE) == "True"


def test_a_change_of_the_last_bit_changes_the_scores_and_still_agrees() -> None:
    program = """
from formats import RowV2, TextJson
one = TextJson("/").scores({}, b'{"predictions": [{"label": "a", "top": [{"score": 0.25}]}]}')
other = TextJson("/").scores(
    {}, b'{"predictions": [{"label": "a", "top": [{"score": 0.25000000000000006}]}]}'
)
far = RowV2("/").scores({}, b'{"outputs": [{"data": [1.0, 2.0]}]}')
nested = RowV2("/").scores({}, b'{"outputs": [{"data": [[1.0, 2.5]]}]}')
print(one == other, one.agrees_with(other), far.agrees_with(nested), one.agrees_with(far))
"""
    assert in_bench(program) == "False True False False"


def test_binary_rows_and_json_rows_have_the_same_spelling_of_equal_bits() -> None:
    program = """
import json
import numpy as np
from formats import HEADER_LENGTH, RowBinary, RowV2
logits = np.random.default_rng(0).normal(size=8).astype("<f4")
text = json.dumps({"outputs": [{"data": logits.tolist()}]}).encode()
header = b'{"outputs": []}'
binary = RowBinary("/").scores({HEADER_LENGTH: str(len(header))}, header + logits.tobytes())
print(RowV2("/").scores({}, text) == binary)
"""
    assert in_bench(program) == "True"


def test_processor_time_memory_and_the_end_include_processes_that_left_their_parent(
    tmp_path: Path,
) -> None:
    server = tmp_path / "server.py"
    server.write_text("""
import http.server, os, subprocess, sys
busy = "x = 0\\nwhile True: x += 1"
# The shell ends at once, so its child has left the tree.
subprocess.run(["sh", "-c", f'{sys.executable} -c "$0" & ', busy], check=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
""")
    program = """
import sys, time
from formats import Request
from processes import free_ports, is_alive, processes_of, running
[port] = free_ports(1)
command = [sys.executable, sys.argv[1], str(port)]
with running(command, port=port, first=Request(path="/", body=b""), environment={}) as server:
    pids = processes_of(server.pid, server.mark)
    before = server.cpu_s()
    deadline = time.monotonic() + 10
    while server.cpu_s() < before + 0.1 and time.monotonic() < deadline:
        time.sleep(0.02)
    used, memory = server.cpu_s() - before, server.memory_mb()
print(len(pids), used >= 0.1, memory > 5, any(map(is_alive, pids)))
"""
    assert in_bench(program, server) == "2 True True False"


def test_a_server_that_ends_is_reported_with_its_last_line() -> None:
    program = """
import sys
from formats import Request
from processes import ServerError, free_ports, running
[port] = free_ports(1)
command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
try:
    with running(command, port=port, first=Request(path="/", body=b""), environment={}):
        pass
except ServerError as error:
    print(error)
"""
    assert in_bench(program) == "it ended: no such model"


def test_an_environment_that_cannot_be_made_gives_the_last_line_of_the_installer() -> None:
    program = """
import sys
from environments import NotInstalledError, run
try:
    run([sys.executable, "-c", "print('trying'); raise SystemExit('no matching version')"])
except NotInstalledError as error:
    print(error)
"""
    assert in_bench(program) == "no matching version"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([BUNDLE, "--peers", "plain,absent"], "--peers has no 'absent': these are evalmode"),
        ([BUNDLE, "--models", "images"], "--models has no 'images'"),
        ([BUNDLE, "--concurrency", "1,x"], "--concurrency must be numbers with commas"),
        ([BUNDLE, "--concurrency", "0"], "--concurrency must be at least 1"),
        (["absent"], "absent/manifest.json is not there"),
    ],
)
def test_a_mistaken_option_is_refused_in_one_sentence(
    arguments: list[object], sentence: str
) -> None:
    process = run(*arguments)
    assert process.returncode == 2
    assert sentence in process.stderr
    assert "Traceback" not in process.stderr


def test_without_wrk_the_bench_says_how_to_install_it(tmp_path: Path) -> None:
    process = run(BUNDLE, "--quick", PATH=str(tmp_path))
    assert process.returncode == 1
    assert "wrk is not installed" in process.stderr
    assert "Traceback" not in process.stderr


@needs_wrk
def test_a_quick_run_writes_the_figures_of_each_server(tmp_path: Path) -> None:
    arguments = [BUNDLE, "--quick", "--peers", "evalmode,plain", "--models", "text"]
    process = run(*arguments, "--out", tmp_path, "--no-chart")
    assert process.returncode == 0, process.stdout + process.stderr
    samples = json.loads((tmp_path / "peers.json").read_text())["samples"]
    by_peer = {sample["peer"]: sample for sample in samples}
    assert list(by_peer) == ["ceiling", "evalmode", "plain", "plain-2"]
    for name in ("evalmode", "plain", "plain-2"):
        sample = by_peer[name]
        assert sample["error"] == ""
        assert sample["errors"] == 0
        assert sample["per_s"] > 0
        assert 0 < sample["p50_ms"] <= sample["p95_ms"] <= sample["p99_ms"]
        assert sample["cpu_us"] > 0
        assert sample["memory_mb"] > 20
        assert sample["cold_start_s"] > 0
        assert sample["compared"] > 0
    assert by_peer["evalmode"]["changed"] == 0
    table = (tmp_path / "peers.md").read_text()
    assert "| FastAPI, 2 processes |" in table
    assert "(1.00)" in table


@needs_wrk
def test_an_interrupted_run_leaves_no_server(tmp_path: Path) -> None:
    command = [sys.executable, PEERS, BUNDLE, "--peers", "plain", "--models", "text"]
    command += ["--seconds", "1", "--no-chart", "--out", tmp_path]
    environment = {**os.environ, "BENCH_TEST": str(tmp_path)}
    marked = f"BENCH_TEST={tmp_path}".encode()

    def children() -> list[str]:
        """The command lines of all processes that this run has started."""
        lines = []
        for folder in Path("/proc").iterdir():
            try:
                if marked in (folder / "environ").read_bytes().split(b"\0"):
                    lines.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # no process, or one that has ended
                continue
        return lines

    with subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not any("on_plain:app" in line for line in children()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130
    assert children() == []
