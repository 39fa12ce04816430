"""A server process: it binds the port, opens the models, serves, and ends with 0 after a signal.

With several workers this process only supervises: see `supervisor.py` and `worker.py`.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalmode.errors import EvalmodeError
from evalmode.service.all_processes import AllProcesses, OneProcess
from evalmode.service.errors import WorkersFailed
from evalmode.service.health import Health
from evalmode.service.process.announcement import announced
from evalmode.service.process.listener import bind_listener, listen_failure, tls_context, url_of
from evalmode.service.process.signals import Signals, interruptible
from evalmode.service.settings import Settings, load_settings, strange_variables
from evalmode.service.telemetry import structlog
from evalmode.service.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from evalmode.service.process.graceful import GracefulServer

_log = structlog.get_logger("evalmode.service")


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a process serves.

    Attributes:
        app: the ASGI application.
        health: its readiness and liveness.
        log_fields: what the log line "serving" says of the models. Plain JSON values, because with
            several workers another process writes the line.
        on_refusal: called with the reason of each refusal that the application does not see.
    """

    app: Callable[..., Any]
    health: Health
    log_fields: Mapping[str, object] = field(default_factory=dict)
    on_refusal: Callable[[str], None] = lambda reason: None


def serve(
    settings: Settings,
    *,
    open_service: Callable[[Settings, AllProcesses], Service] | None = None,
    worker: Sequence[str] = (sys.executable, "-m", "evalmode.service.process.worker"),
) -> None:
    """Serve until SIGTERM or SIGINT, then answer every accepted request and return.

    Call it from the main thread. `open_service` opens what this process serves, by default the
    bundles of the settings. With several workers, each is a process of the command `worker`.
    Raises EvalmodeError if the server cannot start, and SystemExit(1) if workers keep failing.
    """
    configure_logs(settings.log_format)
    for variable, problem in strange_variables().items():
        _log.warning("a variable of the environment is ignored", variable=variable, reason=problem)
    # Loading a model may take long, so problems with TLS are reported before.
    tls_context(settings)

    with (
        Signals() as signals,
        interruptible(lambda: bind_listener(settings)) as listener,
        announced(settings, listener),
    ):

        def log_start(log_fields: Mapping[str, object]) -> None:
            url = url_of(settings, listener)
            _log.info("serving", url=url, **log_fields, start_s=_process_age_s())

        if settings.workers > 1:
            # Imported here, because a process that serves by itself does not need it.
            from evalmode.service.process.supervisor import Supervisor

            supervisor = Supervisor(settings, listener, command=worker)
            try:
                supervisor.run(signals, on_serving=log_start)
            except WorkersFailed as error:
                print(f"evalmode: {error}", file=sys.stderr)  # noqa: T201 - as the command line does
                sys.exit(1)
        else:
            serve_one(
                settings,
                listener,
                signals=signals,
                processes=OneProcess(),
                on_serving=lambda service: log_start(service.log_fields),
                open_service=open_service,
            )
        _log.info("stopped")


def serve_one(
    settings: Settings,
    listener: socket.socket,
    *,
    signals: Signals,
    processes: AllProcesses,
    on_serving: Callable[[Service], None],
    watch: Callable[[Service, GracefulServer], None] = lambda service, server: None,
    open_service: Callable[[Settings, AllProcesses], Service] | None = None,
) -> int:
    """Serve in this process, on a bound socket, until a signal. Returns the exit code.

    `processes` are all processes of the server. `on_serving` is called when requests can arrive,
    and `watch` every second from then on.
    """
    service = interruptible(lambda: (open_service or _open_bundles)(settings, processes))
    from evalmode.service.process.graceful import GracefulServer

    server = GracefulServer(
        service.app,
        settings,
        health=service.health,
        shared_folder=processes.shared_folder,
        on_serving=lambda: on_serving(service),
        watch=lambda running: watch(service, running),
        on_refusal=service.on_refusal,
    )
    signals.send_to(server.signalled)
    try:
        server.run([listener])
    except OSError as error:
        # Two processes may bind one port; the kernel refuses the second that listens.
        raise listen_failure(settings, error) from error
    return server.exit_code


def main() -> int:
    """`python -m evalmode.service.process.server`: serve with the settings of the environment.

    Returns the exit code.
    """
    try:
        serve(load_settings())
    except EvalmodeError as error:
        print(f"evalmode: {error}", file=sys.stderr)  # noqa: T201 - as the command line does
        return 2
    return 0


def _open_bundles(settings: Settings, processes: AllProcesses) -> Service:
    """The service of the bundles that the settings name."""
    # Imported here, because a supervisor needs neither models nor routes. Imports take most of the
    # time of a start, and the trial of the bundle runs in another process meanwhile.
    from evalmode.service.models.trial import TrialOpener

    opener = TrialOpener.of(settings, shared_folder=processes.shared_folder)
    # Garbage collections take a tenth of the time of imports, and find nothing to free.
    gc.disable()
    if settings.load_timeout_s > 0:
        opener.start_child()
        opener.begin(settings.bundle)
    from evalmode.service.app import create_app
    from evalmode.service.components import open_components
    from evalmode.service.process import graceful  # noqa: F401 - for `serve_one`

    # Imported modules are never freed. Without the freeze, each full collection visits them, and no
    # request is answered for tens of milliseconds. Models are swapped, so they open after it.
    gc.freeze()
    gc.enable()
    components = open_components(settings, processes, opener)

    log_fields: dict[str, object] = {}
    if models := components.repository.models():
        first, *others = models
        log_fields = {
            "bundle": str(first.bundle.path),
            "digest": first.digest,
            "provider": first.platform.provider,
            "known_answers": str(first.replayed or "not replayed"),
        }
        if others:
            log_fields["others"] = [f"{model.name}/{model.version}" for model in others]
    return Service(
        app=create_app(components),
        health=components.health,
        log_fields=log_fields,
        on_refusal=components.metrics.rejected,
    )


def _process_age_s() -> float | None:
    """Seconds since this process began, imports included. None where the system does not say."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return None
    # Field 22 is the start time, see proc_pid_stat(5). Field 2, the name in brackets, may contain
    # blanks, so the fields are counted after its last bracket.
    start_ticks = int(stat.rpartition(")")[2].split()[19])
    uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return round(uptime_s - start_ticks / os.sysconf("SC_CLK_TCK"), 3)


if __name__ == "__main__":
    sys.exit(main())
