"""Signals and failures while a real server process starts, or while it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from evalmode.bundle.frontend import NgramFrontEnd, collate
from evalmode.service.process.signals import Signals
from evalmode.service.process.supervisor import settings_as_json
from evalmode.service.settings import Settings
from tests.service import processes
from tests.service.bundles import SPEC, make_bundle, tiny_model
from tests.service.moody_model import ENDLESS, moody_model

PROGRAM = (str(Path(__file__).with_name("tiny_server.py")),)
WAIT_S = 30


@pytest.fixture
def run():
    @contextmanager
    def running(**settings: object) -> Iterator[object]:
        with processes.running(Path("tiny"), program=PROGRAM, drain_s=0, **settings) as server:
            yield server

    return running


ENDING = """
import os, signal
from evalmode.service.errors import StartFailed
from evalmode.service.process.signals import Signals

with Signals() as signals:
    signals.send_to(lambda number: None)
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_signal_after_the_end_does_not_change_the_exit_code():
    assert (
        subprocess.run([sys.executable, "-c", ENDING], timeout=WAIT_S, check=False).returncode == 0
    )


def processor_s(pid: int) -> float:
    """The seconds of processor time that a process has used."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_a_signal_ends_a_start_whose_model_never_answers(tmp_path, workers, number):
    endless = collate([NgramFrontEnd(SPEC).encode(ENDLESS).ids], length=4)
    bundle = make_bundle(
        tmp_path,
        model=moody_model(tiny_model(), SPEC),
        change=lambda answer: replace(answer, inputs=endless, text=ENDLESS),
    )
    process = subprocess.Popen(
        [sys.executable, *processes.SERVER],
        # Without a trial the model runs in the server process itself.
        env=processes.environment(bundle, workers=workers, load_timeout_s=0),
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + WAIT_S
    try:
        # After 2 s of processor time, more than a start takes, the model runs.
        while True:
            loading = [int(child) for child in children.read_text().split()] or [process.pid]
            if len(loading) == workers and all(processor_s(pid) > 2 for pid in loading):
                break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        _, lines = process.communicate(timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, lines
    assert "Traceback" not in lines
    assert not any(Path(f"/proc/{pid}").exists() for pid in loading)


def test_a_signal_ends_a_start_while_modules_are_imported():
    # Without a handler the kernel would drop the signal in the first process of a container.
    process = subprocess.Popen([sys.executable, "-m", "evalmode", "serve", "absent"])
    try:
        while True:
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                break
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


def test_without_a_signal_the_previous_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_pipe_of_the_log_does_not_hold_up_the_end(run):
    with run() as server:
        log = os.open(f"/proc/{server.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(log, b"#" * 4096)
        os.close(log)
        server.terminate()
        assert server.process.wait(WAIT_S) == 0


def test_a_worker_whose_supervisor_ended_first_ends_with_0():
    ours, theirs = socket.socketpair()
    with socket.socket() as listener, theirs:
        listener.bind(("127.0.0.1", 0))
        start = b'{"unloaded": [], "shared_folder": null}'
        ours.sendall(settings_as_json(Settings()).encode() + b"\n" + start + b"\n")
        ours.close()
        descriptors = (listener.fileno(), theirs.fileno())
        worker = subprocess.run(
            [sys.executable, *PROGRAM, *map(str, descriptors)],
            pass_fds=descriptors,
            timeout=WAIT_S,
            check=False,
        )
    assert worker.returncode == 0
