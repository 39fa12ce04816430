"""`evalmode healthcheck` against real servers, with --url and without."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from evalmode.client.readiness import DEFAULT_TIMEOUT_S
from tests.service import processes
from tests.service.bundles import make_bundle

TINY = (str(Path(processes.__file__).parent / "process" / "tiny_server.py"),)
SERVE = ("-m", "evalmode", "serve")
WAIT_S = 30


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A settings file for this test alone: it tells its servers from others of the same user."""
    file = tmp_path / "evalmode.toml"
    file.touch()
    return file


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate that names another host, in a folder with its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=example.org"
    )
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


def check(
    *arguments: str, prefix: tuple[str, ...] = (), **variables: object
) -> subprocess.CompletedProcess[str]:
    """`evalmode healthcheck` with these variables of its environment."""
    environment = {name: text for name, text in os.environ.items() if "EVALMODE" not in name}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "evalmode", "healthcheck", *arguments],
        env=environment | {f"EVALMODE_{name}": str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def assert_ready(process: subprocess.CompletedProcess[str], url: str) -> None:
    assert (process.returncode, process.stdout, process.stderr) == (
        0,
        f"{url}/readyz is ready\n",
        "",
    )


def assert_unhealthy(process: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr == f"evalmode: {sentence}\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("127.0.0.2", "127.0.0.2"),  # an address that 127.0.0.1 does not include
        ("localhost", "127.0.0.1"),
    ],
)
def test_a_server_is_found_at_any_address_and_port(config: Path, host: str, reached: str) -> None:
    settings = {"config": config, "host": host, "port": 0}
    with processes.running(Path("tiny"), program=TINY, **settings) as server:
        process = check(CONFIG=config, HOST=host, PORT=0)
        if host == "localhost" and ":" in server.url[8:].rpartition(":")[0]:
            reached = "[::1]"  # the system's hosts file decides
        assert_ready(process, f"http://{reached}:{server.port}")


def test_a_server_with_flags_a_file_tls_and_api_keys_is_found(
    bundle: Path, certificate: Path, tmp_path: Path, config: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(f'ssl_certfile = "{certificate}/cert"\nssl_keyfile = "{certificate}/key"\n')
    flags = ("--port", str(free_port()), "--host", "0.0.0.0", "--config", str(other))
    settings = {"config": config, "port": 8000, "api_keys": "a-key-of-sixteen-characters"}
    with processes.running(bundle, program=(*SERVE, *flags), **settings) as server:
        assert server.url.startswith("https://0.0.0.0:")
        assert_ready(check(CONFIG=config, PORT=8000), f"https://127.0.0.1:{server.port}")
        by_address = check("--url", f"https://localhost:{server.port}")
        assert_ready(by_address, f"https://localhost:{server.port}")
        in_clear = check("--url", f"http://127.0.0.1:{server.port}")
        assert in_clear.returncode == 1


@pytest.mark.parametrize("has_its_authority", [True, False])
def test_a_server_that_demands_client_certificates_is_shown_its_certificate(
    certificate: Path, tmp_path: Path, config: Path, has_its_authority: bool
) -> None:
    authorities = certificate / "cert"
    if not has_its_authority:
        command = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout k -out ca -subj /CN=ca"
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
        authorities = tmp_path / "ca"
    settings = {
        "config": config,
        "ssl_certfile": certificate / "cert",
        "ssl_keyfile": certificate / "key",
        "ssl_ca_certs": authorities,
    }
    with processes.running(Path("tiny"), program=TINY, **settings) as server:
        url = f"https://127.0.0.1:{server.port}"
        if has_its_authority:
            assert_ready(check(CONFIG=config, PORT=0), url)
            return
        process = check(CONFIG=config, PORT=0)
        assert process.returncode == 0
        assert process.stdout == (
            f"{url}/readyz is alive; only a client with a certificate of its authorities can ask"
            " for more\n"
        )
        assert check("--url", url).returncode == 1


def test_several_workers_are_one_server(config: Path) -> None:
    with processes.running(Path("tiny"), program=TINY, config=config, workers=2) as server:
        assert_ready(check(CONFIG=config, PORT=0), f"http://127.0.0.1:{server.port}")


def test_a_server_that_is_stopping_is_unhealthy_with_its_reason(config: Path) -> None:
    with processes.running(Path("tiny"), program=TINY, config=config, drain_s=20) as server:
        server.terminate()
        assert server.process.stderr is not None
        assert '"draining"' in server.process.stderr.readline()
        url = f"http://127.0.0.1:{server.port}/readyz"
        assert_unhealthy(check(CONFIG=config, PORT=0), f"{url} answers 503: the server is stopping")


def test_a_killed_server_is_not_found(config: Path) -> None:
    with processes.running(Path("tiny"), program=TINY, config=config) as server:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        port = free_port()
        config.write_text(f"port = {port}\n")
        assert_unhealthy(
            check(CONFIG=config),
            f"http://127.0.0.1:{port}/readyz cannot be asked: Connection refused",
        )


def test_of_two_servers_in_one_environment_the_address_is_the_configured_one(
    bundle: Path, config: Path
) -> None:
    port = free_port()
    with (
        processes.running(Path("tiny"), program=TINY, config=config, port=port),
        processes.running(bundle, program=(*SERVE, "--port", "0"), config=config, port=port),
    ):
        assert_ready(check(CONFIG=config, PORT=port), f"http://127.0.0.1:{port}")


def test_two_servers_in_one_environment_without_a_configured_address_are_ambiguous(
    config: Path,
) -> None:
    with (
        processes.running(Path("tiny"), program=TINY, config=config) as first,
        processes.running(Path("tiny"), program=TINY, config=config) as other,
    ):
        urls = sorted(f"http://127.0.0.1:{server.port}/readyz" for server in (first, other))
        assert_unhealthy(
            check(CONFIG=config, PORT=0),
            f"2 servers run here, {' and '.join(urls)}: name one with --url",
        )


def test_a_server_in_another_environment_is_ignored(config: Path) -> None:
    port = free_port()
    with processes.running(Path("tiny"), program=TINY, config=config):
        assert_unhealthy(
            check(CONFIG=config, PORT=port),
            f"http://127.0.0.1:{port}/readyz cannot be asked: Connection refused",
        )


def test_without_proc_the_address_comes_from_the_environment_and_the_settings_file(
    config: Path,
) -> None:
    unshare = ("unshare", "--map-root-user", "--mount")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system forbids user namespaces")
    hidden = (*unshare, "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    port = free_port()
    config.write_text(f'host = "0.0.0.0"\nport = {port}\n')
    with processes.running(Path("tiny"), program=TINY, config=config, port=port):
        assert_ready(check(prefix=hidden, CONFIG=config), f"http://127.0.0.1:{port}")
        assert_ready(check(prefix=hidden, HOST="::", PORT=port), f"http://127.0.0.1:{port}")
        other = check(prefix=hidden, PORT=0)
        assert_unhealthy(
            other, "no server was found here, and its port is not set: name it with --url"
        )


def test_in_a_container_the_address_is_that_of_process_1_with_any_variables(tmp_path: Path) -> None:
    unshare = ("unshare", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system forbids user namespaces")
    # Like an entry point that is a script: it sets a port and then becomes the server.
    script = (
        '( until out=$(EVALMODE_PORT=8000 "$0" -m evalmode healthcheck 2>/dev/null); do sleep 0.1;'
        ' done; echo "$out"; kill -TERM 1 ) & '
        f'EVALMODE_PORT={free_port()} exec "$0" {TINY[0]}'
    )
    environment = processes.environment(Path("tiny"), host="0.0.0.0")
    ended = subprocess.run(
        [*unshare, "sh", "-c", script, sys.executable],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert ended.stdout.startswith("http://127.0.0.1:"), ended.stderr
    assert ended.stdout.endswith("/readyz is ready\n")


def test_a_server_that_does_not_answer_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):
                while not stop.wait(0.05):
                    connection.sendall(b"x")  # each byte starts the timeout of a socket again

        server = threading.Thread(target=drip)
        server.start()
        process = check("--url", f"http://127.0.0.1:{port}", "--timeout-s", "0.5")
        stop.set()
        server.join(WAIT_S)
    assert_unhealthy(process, f"http://127.0.0.1:{port}/readyz gave no answer in 0.5 s")
    assert DEFAULT_TIMEOUT_S < 3  # docker's, in the Dockerfile


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:8000", "--url must begin with http:// or https://, got localhost:8000"),
        ("http://", "--url must begin with http:// or https://, got http://"),
        ("http://a..b", "http://a..b:80/readyz cannot be asked: "),
        ("https://127.0.0.1:1", "https://127.0.0.1:1/readyz cannot be asked: Connection refused"),
        ("http://a:port", "--url http://a:port is not a URL: Port could not be cast to integer"),
    ],
)
def test_an_invalid_url_is_one_sentence(url: str, sentence: str) -> None:
    process = check("--url", url)
    assert process.returncode == 1
    assert process.stderr.startswith(f"evalmode: {sentence}")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["x", "", "65536", "-1", "80.5", "0x50", "nan", "1e999", "80 80"])
def test_an_invalid_port_is_named_with_its_variable(config: Path, port: str) -> None:
    way_out = "correct it, or name the server with --url"
    assert_unhealthy(
        check(CONFIG=config, PORT=port),
        f"EVALMODE_PORT must be a port from 0 to 65535, got {port!r}: {way_out}",
    )
    config.write_text(f"port = {port!r}\n")
    assert_unhealthy(
        check(CONFIG=config),
        f"{config}: port must be a port from 0 to 65535, got {port!r}: {way_out}",
    )


def test_a_port_is_read_as_the_server_reads_it(config: Path) -> None:
    port = free_port()
    with processes.running(Path("tiny"), program=TINY, config=config, port=port):
        other = config.with_name("other.toml")
        for text in (f" {port} ", f"0{port}", f"{port}.0", f"+{port}"):
            other.write_text(f"port = {text!r}\n")
            assert_ready(check(CONFIG=other), f"http://127.0.0.1:{port}")
            read = subprocess.run(
                [sys.executable, "-m", "evalmode", "serve", "--print-settings"],
                env=os.environ | {"EVALMODE_CONFIG": str(other)},
                capture_output=True,
                text=True,
                timeout=WAIT_S,
                check=True,
            )
            assert str(port) in read.stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"port = ", "is not valid TOML: Invalid value (at end of document)"),
        (b"port = 80 # \xff", "is not valid TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_settings_file_that_is_missing_or_broken_is_named(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "broken.toml"
    if content is not None:
        file.write_bytes(content)
    process = check(CONFIG=file)
    assert process.returncode == 1
    assert process.stderr.startswith(
        f"evalmode: the settings file {file} (EVALMODE_CONFIG) {sentence}"
    )
    assert process.stderr.count("\n") == 1
    assert "Is a directory" in check(CONFIG=tmp_path).stderr


@pytest.mark.parametrize("host", ["nosuch.invalid", "a..b", "x" * 70])
def test_a_host_that_cannot_be_resolved_is_named_with_what_set_it(config: Path, host: str) -> None:
    sentence = f"names a host that cannot be resolved, {host}: "
    assert f" EVALMODE_HOST {sentence}" in check(CONFIG=config, HOST=host, PORT=1).stderr
    assert f" --url {sentence}" in check("--url", f"http://{host}").stderr
    config.write_text(f"host = '{host}'\nport = 1\n")
    assert f" {config}: host {sentence}" in check(CONFIG=config).stderr


def test_a_missing_tls_file_is_named_when_no_server_answers(
    config: Path, certificate: Path
) -> None:
    port = free_port()
    refused = f"https://127.0.0.1:{port}/readyz cannot be asked: Connection refused"
    settings = {"CONFIG": config, "PORT": port, "SSL_CERTFILE": certificate / "cert"}
    assert_unhealthy(check(**settings), refused)
    assert_unhealthy(
        check(**settings, SSL_KEYFILE="/nowhere/key"),
        f"{refused}; EVALMODE_SSL_KEYFILE names a file that is not here, /nowhere/key",
    )
    config.write_text("ssl_certfile = '/nowhere/cert'\n")
    assert_unhealthy(
        check(CONFIG=config, PORT=port),
        f"{refused}; {config}: ssl_certfile names a file that is not here, /nowhere/cert",
    )


def test_a_health_check_loads_the_standard_library_alone(config: Path) -> None:
    program = (
        "import sys, runpy; sys.argv = ['evalmode', 'healthcheck']\n"
        "try: runpy.run_module('evalmode', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print(end.code)\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(root for root in roots - set(sys.stdlib_module_names) if root[0] != '_'))"
    )
    with processes.running(Path("tiny"), program=TINY, config=config):
        environment = {name: text for name, text in os.environ.items() if "EVALMODE" not in name}
        printed = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | {"EVALMODE_CONFIG": str(config), "EVALMODE_PORT": "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    _, code, roots = printed.splitlines()
    assert code == "0"
    assert set(eval(roots)) <= {"evalmode", "sitecustomize", "usercustomize"}
