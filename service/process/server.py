"""A process that serves: binds the port, opens the models, runs the server, ends with 0 on a
signal.

Knows no route. What it serves is a `Service`, by default the one that the settings ask for.
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

import structlog

from evalmode.errors import EvalmodeError
from evalmode.service.errors import WorkersFailed
from evalmode.service.health import Health
from evalmode.service.process.announcement import announced
from evalmode.service.process.graceful import GracefulServer
from evalmode.service.process.listener import bound, cannot_listen, tls_context, url_of
from evalmode.service.process.signals import Signals, interruptible
from evalmode.service.settings import Settings, load_settings, strange_variables
from evalmode.service.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from evalmode.service.models.model import Model

_log = structlog.get_logger("evalmode.service")


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a process serves: an ASGI application, its health, and what its first log line tells of
    it.

    `refused` is called with the reason for every refusal that the application does not see.
    """

    app: Callable[..., Any]
    health: Health
    told: Mapping[str, object] = field(default_factory=dict)
    refused: Callable[[str], None] = lambda reason: None


def serve(
    settings: Settings,
    *,
    open_service: Callable[[Settings], Service] | None = None,
    worker: Sequence[str] = (sys.executable, "-m", "evalmode.service.process.worker"),
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted and return.

    Call it from the main thread. `open_service` opens what is served in this process; where the
    settings ask for several, each is a process of the command `worker`. Raises EvalmodeError, one
    sentence, when it cannot start, and SystemExit(1) when its workers end again and again.
    """
    configure_logs(settings.log_format)
    for variable, sentence in strange_variables().items():
        _log.warning("a variable of the environment is ignored", variable=variable, reason=sentence)
    tls_context(settings)  # what is wrong with it is said before a model is loaded
    with (
        Signals() as signals,
        interruptible(lambda: bound(settings)) as listener,
        announced(settings, listener),
    ):
        if settings.workers > 1:
            # Only now, for a process that serves by itself needs none of it.
            from evalmode.service.process.supervisor import Supervisor

            supervisor = Supervisor(settings, listener, command=worker)
            try:
                supervisor.run(signals, serving=lambda told: _log_start(settings, listener, told))
            except WorkersFailed as error:
                print(f"evalmode: {error}", file=sys.stderr)  # noqa: T201 - as the command line does
                sys.exit(1)
        else:
            serve_one(
                settings,
                listener,
                signals=signals,
                serving=lambda service: _log_start(settings, listener, service.told),
                open_service=open_service,
            )
        _log.info("stopped")


def serve_one(
    settings: Settings,
    listener: socket.socket,
    *,
    signals: Signals,
    serving: Callable[[Service], None],
    watch: Callable[[Service, GracefulServer], None] = lambda service, server: None,
    open_service: Callable[[Settings], Service] | None = None,
) -> int:
    """Serve in this process, on a bound socket, until a signal; the exit code.

    `serving` is called when requests can come, `watch` every second from then on.
    """
    opening = open_service or _open_service
    service = interruptible(lambda: opening(settings))
    server = GracefulServer(
        service.app,
        settings,
        health=service.health,
        serving=lambda: serving(service),
        watch=lambda running: watch(service, running),
        refused=service.refused,
    )
    signals.to(server.signalled)
    try:
        server.run([listener])
    except OSError as error:
        # Two processes may bind a port at once; the second to listen is refused here.
        raise cannot_listen(settings, error) from error
    return server.exit_code


def main() -> int:
    """`python -m evalmode.service.process.server`: serve as the environment says; the exit code."""
    try:
        serve(load_settings())
    except EvalmodeError as error:
        print(f"evalmode: {error}", file=sys.stderr)  # noqa: T201 - as the command line does
        return 2
    return 0


def _open_service(settings: Settings) -> Service:
    # Here, for a process that only looks after others does without models and routes.
    from evalmode.service.app import create_app
    from evalmode.service.components import open_components

    # What was imported stays: without this the collector walks over all of it again and again, tens
    # of milliseconds in which nobody is answered. Before the models, for those are let go.
    gc.collect()
    gc.freeze()
    components = open_components(settings)
    return Service(
        app=create_app(components),
        health=components.health,
        told=_told(components.repository.models()),
        refused=components.metrics.rejected,
    )


def _told(models: tuple[Model, ...]) -> dict[str, object]:
    """What the first line tells of the models: plain values, for it may be another process that
    writes it.
    """
    if not models:
        return {}
    first, *others = models
    told: dict[str, object] = {
        "bundle": str(first.bundle.path),
        "digest": first.digest,
        "provider": first.platform.provider,
        "known_answers": str(first.replayed or "not replayed"),
    }
    if others:
        told["others"] = [f"{model.name}/{model.version}" for model in others]
    return told


def _log_start(settings: Settings, listener: socket.socket, told: Mapping[str, object]) -> None:
    _log.info("serving", url=url_of(settings, listener), **told, start_s=_process_age_s())


def _process_age_s() -> float | None:
    """Seconds since this process began, imports included; None where the system does not say."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return round(
        time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK"), 3
    )


if __name__ == "__main__":
    sys.exit(main())
