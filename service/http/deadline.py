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


async def cancel_on_disconnect(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer. It is cancelled if the client disconnects first, and ClientDisconnect is raised.

    The body must have been read to its end: the next message of the connection is then its end.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            # The log line must say how long the request waited, so its end is awaited.
            await asyncio.gather(answering, return_exceptions=True)
            raise ClientDisconnect
        return answering.result()
    finally:
        for task in (answering, watching):
            task.cancel()
