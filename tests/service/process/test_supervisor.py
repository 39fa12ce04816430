"""Several real server processes behind one port, with a tiny application."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from evalmode.service.process.supervisor import settings_as_json
from evalmode.service.settings import Settings
from tests.service import processes

PROGRAM = (str(Path(__file__).with_name("tiny_server.py")),)
WAIT_S = 30
# The time for a replacement. It takes 2 s on an idle machine; other tests may run at the same time.
REPLACED_S = 10
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def mode(tmp_path, monkeypatch) -> Path:
    """A file whose content says what a worker does when it starts, see `open_tiny`."""
    monkeypatch.setenv("TINY_MODE", str(tmp_path / "mode"))
    return tmp_path / "mode"


@pytest.fixture
def changes(tmp_path, monkeypatch) -> Path:
    """The file with a line for each change in each worker, see `change` of the tiny server."""
    monkeypatch.setenv("TINY_CHANGES", str(tmp_path / "changes"))
    return tmp_path / "changes"


@pytest.fixture
def run(gate, mode, changes):
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
    pids = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after[1]) == server.process.pid and after[0] != "Z":
            pids.add(int(stat.parent.name))
    return pids


def wait_until(condition: Callable[[], object], failure: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def answering_pid(server) -> int:
    """The id of the process that answers a new connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(GET.replace(b"host", b"connection: close\r\nhost"))
        return int(rest_of(connection).partition(b"pid ")[2])


def on_worker(server, path: str, worker: int) -> httpx.Response:
    """The answer of this worker to a GET."""
    while True:
        with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
            if client.get("/").text == f"pid {worker}":
                return client.get(path)


def next_event(server, event: str) -> dict[str, object]:
    """The fields of the next log line of this event. Earlier lines are skipped."""
    for line in server.process.stderr:
        fields = json.loads(line)
        if fields["event"] == event:
            return fields
    raise AssertionError(f"{event!r} was never logged")


def begin_request(server) -> socket.socket:
    """A connection whose request a worker has begun to read. The answer waits for the gate."""
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


def events_until_end(server) -> list[dict[str, object]]:
    """The log lines until the process ends, which it does with exit code 0."""
    _, lines = server.process.communicate(timeout=WAIT_S)
    assert server.process.returncode == 0, lines
    return [json.loads(line) for line in lines.splitlines()]


def test_all_workers_serve_on_one_port_and_the_log_says_so_once(run):
    with run(workers=3) as server:
        assert (server.started["workers"], server.started["bundle"]) == (3, "tiny")
        workers = workers_of(server)
        assert len(workers) == 3
        wait_until(
            lambda: workers == {answering_pid(server) for _ in range(50)},
            "some worker never answers",
        )
        server.terminate()
        assert [line["event"] for line in events_until_end(server)] == ["draining"] * 3 + [
            "stopped"
        ]


def test_settings_reach_the_workers_exactly_and_no_secret_is_on_a_command_line_or_in_an_environment(
    run, monkeypatch
):
    settings = Settings(
        api_keys="s3cret", drain_s=0.1 + 0.2, cors_origins=("https://a", "https://b"), bundle="ő"
    )
    monkeypatch.setenv("EVALMODE_TIMEOUT_S", "7")
    assert Settings(**json.loads(settings_as_json(settings))) == settings
    with run(api_keys="s3cret", drain_s=0.1 + 0.2) as server:
        fields = httpx.get(f"{server.url}/settings").json()
        assert (fields["key"], fields["drain_s"]) == ("s3cret", 0.1 + 0.2)
        for worker in workers_of(server):
            assert b"s3cret" not in Path(f"/proc/{worker}/cmdline").read_bytes()


def test_a_killed_worker_is_replaced_and_only_its_requests_fail(run, gate):
    with run() as server:
        killed, left = workers_of(server)
        connections = [begin_request(server) for _ in range(40)]
        os.kill(killed, signal.SIGKILL)
        started = time.monotonic()
        assert next_event(server, "a worker ended")["exit_code"] == -signal.SIGKILL
        assert all(answering_pid(server) != killed for _ in range(20))
        replacement = next_event(server, "a worker serves")["worker"]
        assert time.monotonic() - started < REPLACED_S
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
        events_until_end(server)


def whole_or_nothing(connection: socket.socket) -> bytes:
    answer = b""
    with connection:
        while not answer.endswith(b"whole") and (received := connection.recv(65_536)):
            answer += received
    return answer


def test_connections_that_wait_while_all_workers_die_are_answered_by_their_replacements(run):
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
        events_until_end(server)


def test_after_sigterm_every_worker_answers_its_requests_in_flight(run, gate):
    with run() as server:
        connections = [begin_request(server) for _ in range(64)]
        server.terminate()
        assert next_event(server, "draining")
        gate.touch()
        assert all(rest_of(connection).endswith(b"whole") for connection in connections)
        events_until_end(server)


def test_an_interrupt_from_the_terminal_reaches_the_workers_once_and_ends_all_gracefully(run, gate):
    with run(drain_s=WAIT_S) as server:
        assert os.getpgid(server.process.pid) not in {
            os.getpgid(worker) for worker in workers_of(server)
        }
        connection = begin_request(server)
        server.process.send_signal(signal.SIGINT)
        assert next_event(server, "draining")
        gate.touch()
        assert rest_of(connection).endswith(b"whole")
        events_until_end(server)


def test_workers_without_their_supervisor_answer_accepted_requests_and_end(run, gate):
    with run() as server:
        workers = workers_of(server)
        connection = begin_request(server)
        server.process.kill()
        server.process.wait()
        wait_until(
            lambda: len([worker for worker in workers if is_running(worker)]) == 1,
            "the idle worker does not end",
        )
        gate.touch()
        assert rest_of(connection).endswith(b"whole")
        wait_until(lambda: not any(map(is_running, workers)), "a worker does not end")


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
    wait_until(lambda: len(workers_of(holder)) == 2, "no workers")
    workers = workers_of(holder)
    process.terminate()
    _, lines = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, lines
    assert not any(map(is_running, workers))


def test_a_worker_that_refuses_the_first_start_ends_the_server_with_its_sentence(mode):
    mode.write_text("refuse")
    done = processes.ended(Path("tiny"), program=PROGRAM, workers=2)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "evalmode: the tiny server was told to refuse\n"


def test_a_port_in_use_ends_the_server_before_any_worker():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = processes.ended(Path("tiny"), program=PROGRAM, workers=2, port=port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


@pytest.mark.parametrize(
    ("start_mode", "reason"),
    [("die", "SIGKILL: memory ran out"), ("refuse", "the tiny server was told to refuse")],
)
def test_replacements_that_fail_are_started_after_growing_pauses_and_other_workers_still_serve(
    run, mode, start_mode, reason
):
    with run() as server:
        mode.write_text(start_mode)
        killed, left = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        assert next_event(server, "a worker ended")["worker"] == killed
        waits = []
        for _ in range(3):
            assert next_event(server, "a worker ended")["reason"].startswith(reason)
            waits.append(
                next_event(server, "waiting before the next start of a worker")["backoff_s"]
            )
        assert waits == [0.2, 0.4, 0.8]
        assert answering_pid(server) == left
        mode.write_text("")
        assert next_event(server, "a worker serves")
        server.terminate()
        events_until_end(server)


@pytest.mark.parametrize(
    ("start_mode", "reason"),
    [
        ("die", "SIGKILL: memory ran out"),
        (f"die {signal.SIGSEGV:d}", "SIGSEGV: native code (ONNX Runtime, or a library of its"),
        ("exit 1", "an error that nothing caught; its traceback is above"),
    ],
)
def test_five_quick_deaths_of_a_worker_end_the_server_with_the_probable_cause(
    mode, start_mode, reason
):
    mode.write_text(start_mode)
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


def keep_alive_pids(server, count: int) -> list[int]:
    """The process of each of `count` connections, which are opened at once and stay open."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
            )
            for _ in range(count)
        ]
        pids = []
        for connection in connections:
            connection.sendall(GET)
            answer = b""
            while b"pid " not in answer:
                answer += connection.recv(65_536)
            pids.append(int(answer.partition(b"pid ")[2]))
        return pids


@pytest.mark.parametrize("count", [8, 64, 400])
def test_workers_share_a_burst_of_connections(run, count):
    with run() as server:
        workers = workers_of(server)
        for worker in workers:
            on_worker(server, "/", worker)
        pids = Counter(keep_alive_pids(server, count))
        assert set(pids) == workers
        # One may have an eighth more than the other, and a few accepted at the same moment.
        assert min(pids.values()) >= 0.3 * count, pids


def test_a_worker_accepts_all_connections_while_another_does_not_run(run):
    with run() as server:
        stopped, other = workers_of(server)
        for worker in (stopped, other):
            on_worker(server, "/", worker)
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert set(keep_alive_pids(server, 64)) == {other}
        finally:
            os.kill(stopped, signal.SIGCONT)


def test_quick_deaths_while_another_worker_serves_end_nothing(run, mode):
    with run() as server:
        mode.write_text("die")
        killed, left = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        assert next_event(server, "a worker ended")["worker"] == killed
        for count in range(1, 7):
            waiting = next_event(server, "waiting before the next start of a worker")
            assert waiting["failures"] == count
        assert answering_pid(server) == left
        mode.write_text("")
        assert next_event(server, "a worker serves")


def test_a_stuck_worker_leaves_new_connections_to_others_until_it_recovers(run):
    with (
        run(stuck_grace_s=3600) as server,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as client,
    ):
        stuck = int(client.get("/").text.removeprefix("pid "))
        other = workers_of(server) - {stuck}
        client.get("/stuck?5for6")
        assert client.get("/readyz").status_code == 503
        line = next_event(server, "a worker is not ready")
        assert (line["worker"], line["reason"]) == (
            stuck,
            "a batch exceeds its time limit by 5.0 s",
        )
        wait_until(
            lambda: {answering_pid(server) for _ in range(10)} == other,
            "the stuck worker accepts connections",
        )
        assert httpx.get(f"{server.url}/readyz", timeout=WAIT_S).status_code == 200
        assert next_event(server, "a worker is ready again")["worker"] == stuck
        wait_until(
            lambda: answering_pid(server) == stuck,
            "the worker accepts no connections although it has recovered",
        )
        server.terminate()
        events_until_end(server)


def test_a_worker_whose_event_loop_is_blocked_for_good_is_replaced(run):
    with run() as server:
        with httpx.Client(base_url=server.url, timeout=2 * WAIT_S) as client:
            blocked = int(client.get("/").text.removeprefix("pid "))
            with pytest.raises(httpx.TransportError):
                client.get("/blocked")
        end = next_event(server, "a worker ended")
        assert (end["worker"], end["exit_code"]) == (blocked, 70)
        next_event(server, "a worker serves")
        assert blocked not in workers_of(server)


def test_a_worker_that_stays_stuck_ends_and_is_replaced_although_it_cannot_close(run, monkeypatch):
    monkeypatch.setenv("TINY_CLOSING", "never")
    with run(stuck_grace_s=1) as server:
        with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
            stuck = int(client.get("/").text.removeprefix("pid "))
            client.get("/stuck?2for99")
        assert (
            next_event(server, "a worker is not live: it ends")["reason"]
            == "a batch exceeds its time limit by 2.0 s: this process needs a restart"
        )
        line = next_event(server, "a worker ended")
        assert (line["worker"], line["exit_code"]) == (stuck, 70)
        next_event(server, "a worker serves")
        wait_until(lambda: len(workers_of(server)) == 2, "no replacement")
        server.terminate()
        events_until_end(server)


def test_a_change_reaches_every_worker_and_the_answer_comes_after_the_last(run, changes):
    with run(workers=3) as server:
        assert httpx.get(f"{server.url}/load?tiny", timeout=WAIT_S).status_code == 200
        expected = {f"{worker} load tiny" for worker in workers_of(server)}
        assert set(changes.read_text().splitlines()) == expected


def test_concurrent_changes_have_one_order_in_all_workers(run, changes):
    with run() as server, ThreadPoolExecutor(16) as pool:
        paths = [f"/{verb}?m{index % 5}" for index in range(20) for verb in ("load", "unload")]
        answers = list(
            pool.map(lambda path: httpx.get(f"{server.url}{path}", timeout=WAIT_S), paths)
        )
        assert {answer.status_code for answer in answers} == {200}
        by_worker: dict[str, list[str]] = {}
        for line in changes.read_text().splitlines():
            worker, _, change = line.partition(" ")
            by_worker.setdefault(worker, []).append(change)
        first, second = by_worker.values()
        assert first == second
        assert len(first) == len(paths)


def test_the_error_of_one_worker_is_the_answer_and_the_others_have_changed(run, changes):
    with run() as server:
        failing, other = workers_of(server)
        for asked in (failing, other):
            answer = on_worker(server, f"/load?fails_in_{failing}", asked)
            assert (answer.status_code, answer.text) == (400, f"it cannot be loaded in {failing}")
        assert changes.read_text() == f"{other} load fails_in_{failing}\n" * 2
        unknown = httpx.get(f"{server.url}/unload?unknown", timeout=WAIT_S)
        assert (unknown.status_code, unknown.text) == (404, "there is no such model")
        broken = httpx.get(f"{server.url}/load?breaks", timeout=WAIT_S)
        assert (broken.status_code, broken.text) == (
            500,
            "load failed in a process of the server; its log says why",
        )
        line = next_event(server, "a call of the supervisor failed")
        assert "ZeroDivisionError" in line["exception"]


def test_a_worker_that_dies_of_a_change_does_not_block_it(run, changes):
    with run() as server:
        dying, other = workers_of(server)
        assert on_worker(server, f"/load?dies_in_{dying}", other).status_code == 200
        assert changes.read_text().startswith(f"{other} load ")
        assert next_event(server, "a worker ended")["worker"] == dying
        replacement = next_event(server, "a worker serves")["worker"]
        assert on_worker(server, "/unload?tiny", replacement).status_code == 200
        made = {f"{worker} unload tiny" for worker in (other, replacement)}
        assert set(changes.read_text().splitlines()[-2:]) == made


def test_a_change_waits_for_a_worker_that_is_starting_which_then_makes_it_too(run, changes, gate):
    with run() as server, ThreadPoolExecutor(1) as pool:
        killed, left = workers_of(server)
        waiting = pool.submit(on_worker, server, "/unload?waits", left)
        wait_until(lambda: changes_wait(server), "the change does not begin")
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: workers_of(server) - {killed, left}, "no replacement")
        (replacement,) = workers_of(server) - {killed, left}
        gate.touch()
        assert waiting.result(timeout=WAIT_S).status_code == 200
        made = {f"{worker} unload waits" for worker in (left, replacement)}
        assert set(changes.read_text().splitlines()) == made


def test_a_worker_that_starts_later_knows_which_models_were_unloaded(run, changes):
    with run() as server:
        for path in ("/unload?a", "/unload?b", "/load?a", "/load?c", "/unload?d", "/load?unknown"):
            httpx.get(f"{server.url}{path}", timeout=WAIT_S)
        killed, _ = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        replacement = next_event(server, "a worker serves")["worker"]
        assert on_worker(server, "/unloaded", replacement).json() == ["b", "d"]


def test_a_change_that_was_accepted_is_answered_although_the_others_have_ended(run, changes, gate):
    with run(grace_s=WAIT_S) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.get, f"{server.url}/load?waits", timeout=WAIT_S)
        # The first worker to serve it is the one that waits for the other to end.
        wait_until(lambda: changes_wait(server), "the change does not begin")
        server.terminate()
        wait_until(lambda: len(workers_of(server)) == 1, "the idle worker does not end")
        (left,) = workers_of(server)
        gate.touch()
        assert waiting.result(timeout=WAIT_S).status_code == 200
        assert changes.read_text().splitlines()[-1] == f"{left} load waits"
        events_until_end(server)


def changes_wait(server) -> bool:
    """Whether each worker runs a change: in a thread besides the main one, the reading one and the
    watchdog.
    """
    return all(
        len(list(Path(f"/proc/{worker}/task").iterdir())) > 3 for worker in workers_of(server)
    )


def test_without_their_supervisor_a_change_is_refused_as_the_end_of_the_server(run, changes, gate):
    with run(drain_s=WAIT_S) as server, ThreadPoolExecutor(1) as pool:
        workers = workers_of(server)
        waiting = pool.submit(httpx.get, f"{server.url}/load?waits", timeout=WAIT_S)
        wait_until(lambda: changes_wait(server), "the change does not begin")
        server.process.kill()
        server.process.wait()
        answer = waiting.result(timeout=WAIT_S)
        assert (answer.status_code, answer.text) == (503, "the server is stopping")
        later = httpx.get(f"{server.url}/load?tiny", timeout=WAIT_S)
        assert (later.status_code, later.text) == (503, "the server is stopping")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_statistics_are_those_of_all_workers_and_of_ended_ones_and_of_one_that_hangs(run):
    def failures() -> int:
        (record,) = httpx.get(f"{server.url}/statistics", timeout=WAIT_S).json()
        return record["inference_stats"]["fail"]["count"]

    with run(workers=3) as server:
        assert failures() == 3
        killed, hanging, asked = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        next_event(server, "a worker serves")
        assert failures() == 4
        os.kill(hanging, signal.SIGSTOP)
        try:
            assert (
                on_worker(server, "/statistics", asked).json()[0]["inference_stats"]["fail"][
                    "count"
                ]
                == 4
            )
        finally:
            os.kill(hanging, signal.SIGCONT)
