"""A process that serves: binds the port, runs uvicorn, ends with 0 on a signal. Knows no model and no route."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.errors import EvalmodeError
from evalmode.service.app import create_app, open_predictor
from evalmode.service.errors import StartFailed
from evalmode.service.logs import configure_logs
from evalmode.service.predictor import Predictor
from evalmode.service.settings import Settings, load_settings

_log = structlog.get_logger("evalmode.service")


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens."""

    def __init__(self, config: uvicorn.Config, *, predictor: Predictor) -> None:
        super().__init__(config)
        self._predictor = predictor

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            _log_start(self._predictor, sockets[0])


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight and return.

    Call it from the main thread. Raises EvalmodeError, one sentence, when the server cannot start.
    """
    configure_logs(settings.log_format)
    earlier = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with _bound(settings) as listener, open_predictor(settings) as predictor:
            _run(settings, predictor, listener)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def main() -> int:
    """`python -m evalmode.service.server`: serve as the environment says; the exit code."""
    try:
        serve(load_settings())
    except EvalmodeError as error:
        print(f"evalmode: {error}", file=sys.stderr)
        return 2
    return 0


def _run(settings: Settings, predictor: Predictor, listener: socket.socket) -> None:
    config = uvicorn.Config(
        # Opened already: what is wrong with a bundle is then one sentence, not a traceback out of a lifespan.
        create_app(settings, open_predictor=lambda _: predictor),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=settings.grace_s,
    )
    try:
        _Server(config, predictor=predictor).run(sockets=[listener])
    except OSError as error:  # two processes may bind a port at once; the second to listen is refused here
        raise _refused(settings, error) from error
    except _Stopped:
        pass  # uvicorn has stopped in good order and raises the signal once more, as if nobody had handled it
    _log.info("stopped")


class _Stopped(SystemExit):
    """A signal asked for the end; where nothing catches this (a model is still loading) the exit code is 0."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped(0)


def _bound(settings: Settings) -> socket.socket:
    """A socket that holds the port and does not listen yet: who connects before the model is ready is refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _refused(settings, error) from error
    return listener


def _refused(settings: Settings, error: OSError) -> StartFailed:
    return StartFailed(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")


def _log_start(predictor: Predictor, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    replayed, certificate = predictor.replayed, predictor.bundle.certificate
    if certificate is None or certificate.verdict is not Verdict.PASS:
        _log.warning("this bundle is not certified: nothing proves that it answers as the trained model does")
    _log.info(
        "serving",
        url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        bundle=str(predictor.bundle.path),
        digest=predictor.bundle.digest,
        provider=predictor.platform.provider,
        known_answers=replayed.verdict if replayed else "not replayed",
        start_s=_process_age_s(),
    )


def _process_age_s() -> float | None:
    """Seconds since this process began, imports included; None where the system does not say."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK"), 3)


if __name__ == "__main__":
    sys.exit(main())
