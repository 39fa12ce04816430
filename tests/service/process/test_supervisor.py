"""Several real server processes behind one port, with an application of a few lines: what ends is
replaced.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from evalmode.service.process.supervisor import settings_as_json
from evalmode.service.settings import Settings
from tests.service import processes

PROGRAM = (str(Path(__file__).with_name("tiny_server.py")),)
WAIT_S = 30
# A worker is back within 2 s on an idle machine; the tests of others may run beside this one.
BACK_S = 10
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def mode(tmp_path, monkeypatch) -> Path:
    """A file that says what a worker does when it starts."""
    monkeypatch.setenv("TINY_MODE", str(tmp_path / "mode"))
    return tmp_path / "mode"


@pytest.fixture
def run(gate, mode):
    @contextmanager
    def running(**settings: object) -> Iterator[object]:
        with processes.running(
            Path("tiny"), program=PROGRAM, **{"workers": 2, "drain_s": 0, **settings}
        ) as server:
            try:
                yield server
            finally:
                for worker in workers_of(server):
                    os.kill(worker, signal.SIGKILL)

    return running


def workers_of(server) -> set[int]:
    """The living children of the supervisor."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after[1]) == server.process.pid and after[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def asked(server) -> int:
    """The process that answers a new connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(GET.replace(b"host", b"connection: close\r\nhost"))
        return int(rest_of(connection).partition(b"pid ")[2])


def logged(server, event: str) -> dict[str, object]:
    """The next line of this event; others before it are passed over."""
    for line in server.process.stderr:
        found = json.loads(line)
        if found["event"] == event:
            return found
    raise AssertionError(f"{event!r} was never logged")


def begun(server) -> socket.socket:
    """A connection whose request some worker's application has begun to read; it answers once the
    gate is open.
    """
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(
        b"POST /gate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
    )
    assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
    connection.sendall(b"whole")
    return connection


def rest_of(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def ended(server) -> list[dict[str, object]]:
    """What was logged until the end, which is in good order."""
    _, lines = server.process.communicate(timeout=WAIT_S)
    assert server.process.returncode == 0, lines
    return [json.loads(line) for line in lines.splitlines()]


def test_all_workers_serve_on_one_port_and_this_is_said_once(run):
    with run(workers=3) as server:
        assert (server.started["workers"], server.started["bundle"]) == (3, "tiny")
        workers = workers_of(server)
        assert len(workers) == 3
        until(lambda: workers == {asked(server) for _ in range(50)}, "some worker never answers")
        server.terminate()
        assert [line["event"] for line in ended(server)] == ["draining"] * 3 + ["stopped"]


def test_settings_reach_the_workers_exactly_and_no_secret_is_on_a_command_line_or_in_an_environment(
    run, monkeypatch
):
    settings = Settings(
        api_keys="s3cret", drain_s=0.1 + 0.2, cors_origins=("https://a", "https://b"), bundle="ő"
    )
    monkeypatch.setenv("EVALMODE_TIMEOUT_S", "7")
    assert Settings(**json.loads(settings_as_json(settings))) == settings
    with run(api_keys="s3cret", drain_s=0.1 + 0.2) as server:
        told = httpx.get(f"{server.url}/settings").json()
        assert (told["key"], told["drain_s"]) == ("s3cret", 0.1 + 0.2)
        for worker in workers_of(server):
            assert b"s3cret" not in Path(f"/proc/{worker}/cmdline").read_bytes()


def test_a_killed_worker_is_replaced_and_only_its_requests_fail(run, gate):
    with run() as server:
        killed, left = workers_of(server)
        connections = [begun(server) for _ in range(40)]
        os.kill(killed, signal.SIGKILL)
        started = time.monotonic()
        assert logged(server, "a worker ended")["exit_code"] == -signal.SIGKILL
        assert all(asked(server) != killed for _ in range(20))
        replacement = logged(server, "a worker serves")["worker"]
        assert time.monotonic() - started < BACK_S
        assert workers_of(server) == {left, replacement}
        gate.touch()
        answers = []
        for connection in connections:
            try:
                answers.append(whole_or_nothing(connection))
            except OSError:
                answers.append(b"")
        whole = sum(answer.endswith(b"whole") for answer in answers)
        assert whole + answers.count(b"") == 40
        assert whole > 0
        server.terminate()
        ended(server)


def whole_or_nothing(connection: socket.socket) -> bytes:
    answer = b""
    with connection:
        while not answer.endswith(b"whole") and (received := connection.recv(65_536)):
            answer += received
    return answer


def test_what_waits_to_be_accepted_while_all_workers_die_is_answered_by_their_replacements(run):
    with run() as server:
        workers = workers_of(server)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        connections = [
            socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) for _ in range(30)
        ]
        for connection in connections:
            connection.sendall(GET.replace(b"host", b"connection: close\r\nhost"))
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert all(rest_of(connection).startswith(b"HTTP/1.1 200 ") for connection in connections)
        server.terminate()
        ended(server)


def test_sigterm_answers_what_every_worker_has_in_flight(run, gate):
    with run() as server:
        connections = [begun(server) for _ in range(64)]
        server.terminate()
        assert logged(server, "draining")
        gate.touch()
        assert all(rest_of(connection).endswith(b"whole") for connection in connections)
        ended(server)


def test_an_interrupt_from_the_terminal_reaches_the_workers_once_and_ends_all_in_good_order(
    run, gate
):
    with run(drain_s=WAIT_S) as server:
        assert os.getpgid(server.process.pid) not in {
            os.getpgid(worker) for worker in workers_of(server)
        }
        connection = begun(server)
        server.process.send_signal(signal.SIGINT)
        assert logged(server, "draining")
        gate.touch()
        assert rest_of(connection).endswith(b"whole")
        ended(server)


def test_without_their_supervisor_the_workers_answer_what_they_have_and_end(run, gate):
    with run() as server:
        workers = workers_of(server)
        folder = httpx.get(f"{server.url}/settings").json()["folder"]
        connection = begun(server)
        server.process.kill()
        server.process.wait()
        until(
            lambda: len([worker for worker in workers if is_running(worker)]) == 1,
            "the idle worker stays",
        )
        gate.touch()
        assert rest_of(connection).endswith(b"whole")
        until(lambda: not any(map(is_running, workers)), "a worker stays behind")
        until(lambda: not Path(folder).exists(), "the folder of the figures stays behind")


@pytest.mark.parametrize("loading", [False, True])
def test_a_signal_while_workers_are_loading_ends_them_all(mode, loading):
    mode.write_text("slow" if loading else "")
    environment = {
        **os.environ,
        "EVALMODE_WORKERS": "2",
        "EVALMODE_PORT": "0",
        "EVALMODE_LOG_FORMAT": "json",
    }
    process = subprocess.Popen(
        [sys.executable, *PROGRAM], env=environment, stderr=subprocess.PIPE, text=True
    )
    holder = type("Holder", (), {"process": process})
    until(lambda: len(workers_of(holder)) == 2, "no workers")
    workers = workers_of(holder)
    process.terminate()
    _, lines = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, lines
    assert not any(map(is_running, workers))


def test_a_worker_that_refuses_to_start_at_first_is_the_refusal_of_all(mode):
    mode.write_text("refuse")
    done = processes.ended(Path("tiny"), program=PROGRAM, workers=2)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "evalmode: the tiny server was told to refuse\n"


def test_a_port_in_use_is_the_refusal_of_all():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = processes.ended(Path("tiny"), program=PROGRAM, workers=2, port=port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


@pytest.mark.parametrize(
    ("said", "reason"),
    [("die", "SIGKILL: memory ran out"), ("refuse", "the tiny server was told to refuse")],
)
def test_replacements_that_fail_are_started_ever_later_and_the_others_go_on(
    run, mode, said, reason
):
    with run() as server:
        mode.write_text(said)
        killed, left = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        assert logged(server, "a worker ended")["worker"] == killed
        waits = []
        for _ in range(3):
            assert logged(server, "a worker ended")["reason"].startswith(reason)
            waits.append(logged(server, "waiting before the next start of a worker")["backoff_s"])
        assert waits == [0.2, 0.4, 0.8]
        assert asked(server) == left
        mode.write_text("")
        assert logged(server, "a worker serves")
        server.terminate()
        ended(server)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("die", "SIGKILL: memory ran out"),
        (f"die {signal.SIGSEGV:d}", "SIGSEGV: native code (ONNX Runtime, or a library of its"),
        ("exit 1", "an error that nothing caught; its traceback is above"),
    ],
)
def test_five_quick_deaths_of_a_worker_end_the_server_with_the_probable_cause(mode, said, reason):
    mode.write_text(said)
    done = processes.ended(Path("tiny"), program=PROGRAM, workers=2)
    assert done.returncode == 1
    *lines, sentence = done.stderr.splitlines()
    assert sentence.startswith(
        "evalmode: a worker ended 5 times in a row before it was ready, the last time because of"
        f" this: {reason}"
    )
    events = [json.loads(line) for line in lines if line.startswith("{")]
    ends = [event for event in events if event["event"] == "a worker ended"]
    assert 5 <= len(ends) <= 10
    assert all(end["reason"].startswith(reason) for end in ends)


def test_quick_deaths_while_another_worker_serves_end_nothing(run, mode):
    with run() as server:
        mode.write_text("die")
        killed, left = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        assert logged(server, "a worker ended")["worker"] == killed
        for count in range(1, 7):
            waiting = logged(server, "waiting before the next start of a worker")
            assert waiting["failures"] == count
        assert asked(server) == left
        mode.write_text("")
        assert logged(server, "a worker serves")


def test_a_worker_that_is_stuck_leaves_new_connections_to_others_until_it_is_well_again(run):
    with (
        run(stuck_grace_s=3600) as server,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as client,
    ):
        stuck = int(client.get("/").text.removeprefix("pid "))
        other = workers_of(server) - {stuck}
        client.get("/stuck?5for6")
        assert client.get("/readyz").status_code == 503
        line = logged(server, "a worker is not ready")
        assert (line["worker"], line["reason"]) == (
            stuck,
            "a batch exceeds its time limit by 5.0 s",
        )
        until(
            lambda: {asked(server) for _ in range(10)} == other,
            "the stuck worker takes connections",
        )
        assert httpx.get(f"{server.url}/readyz", timeout=WAIT_S).status_code == 200
        assert logged(server, "a worker is ready again")["worker"] == stuck
        until(
            lambda: asked(server) == stuck,
            "the worker takes no connections although it is well again",
        )
        server.terminate()
        ended(server)


def test_a_worker_that_is_stuck_for_good_ends_and_is_replaced_although_it_cannot_close(
    run, monkeypatch
):
    monkeypatch.setenv("TINY_CLOSING", "never")
    with run(stuck_grace_s=1) as server:
        with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
            stuck = int(client.get("/").text.removeprefix("pid "))
            client.get("/stuck?2for99")
        assert (
            logged(server, "leaving")["reason"]
            == "a batch exceeds its time limit by 2.0 s: this process needs a restart"
        )
        line = logged(server, "a worker ended")
        assert (line["worker"], line["exit_code"]) == (stuck, 70)
        logged(server, "a worker serves")
        until(lambda: len(workers_of(server)) == 2, "no replacement")
        server.terminate()
        ended(server)


def test_figures_of_all_workers_meet_in_a_folder_that_is_gone_afterwards(run):
    with run() as server:
        folder = Path(httpx.get(f"{server.url}/settings").json()["folder"])
        assert folder.is_dir()
        assert folder.stat().st_mode & 0o777 == 0o700
        dead = folder / f"gauge_livesum_{next(iter(workers_of(server)))}.db"
        dead.touch()
        os.kill(int(dead.stem.rpartition("_")[2]), signal.SIGKILL)
        until(lambda: not dead.exists(), "the gauges of a dead worker stay")
        server.terminate()
        ended(server)
        assert not folder.exists()
