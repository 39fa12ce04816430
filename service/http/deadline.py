"""How long a request is answered: until its deadline, and while its client is connected."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import shown, whole_number

Answer = TypeVar("Answer")

TIMEOUT_HEADER = "x-request-timeout-ms"

# So much later than the end of its body, a request begins to watch its client.
_UNWATCHED_S = 0.01


def request_timeout_s(headers: Mapping[str, str], *, longest_s: float) -> float:
    """The seconds that a request allows for its answer: those of its header, at most `longest_s`.

    Raises BadRequest for a header that is not a whole number of milliseconds above 0.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return longest_s
    timeout_ms = whole_number(text)
    if not timeout_ms:
        raise BadRequest(
            f"header {TIMEOUT_HEADER} must be a whole number of milliseconds above 0, got"
            f" {shown(text)}",
            field=TIMEOUT_HEADER,
        )
    return min(timeout_ms / 1000, longest_s)


class OwnCancellation:
    """Cancels the current task, and tells that from a cancellation by the server."""

    __slots__ = ("_is_requested", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request is answered in a task"
        self._task = task
        self._is_requested = False

    def cancel(self) -> None:
        """Cancel the task at its next step."""
        self._is_requested = True
        self._task.cancel()

    def is_cause(self) -> bool:
        """Whether nothing else cancelled the task. Call it once, for the CancelledError."""
        return self._is_requested and self._task.uncancel() == 0


async def cancel_on_disconnect(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer. It is cancelled if the client disconnects first, and ClientDisconnect is raised.

    The body must have been read to its end: the next message of the connection is then its end.
    """
    cancellation = OwnCancellation()
    watching: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancellation.cancel()

    def begin_to_watch() -> None:
        nonlocal watching
        watching = asyncio.ensure_future(watch())

    # Most answers are there before it is worth a task to watch for the end of their connection.
    timer = asyncio.get_running_loop().call_later(_UNWATCHED_S, begin_to_watch)
    try:
        return await answer
    except asyncio.CancelledError:
        if cancellation.is_cause():
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        if watching is not None:
            watching.cancel()
