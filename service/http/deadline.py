"""How long a request is waited for: until its deadline, and while its client is there. Knows no
route and no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from evalmode.service.errors import BadRequest
from evalmode.service.strict_json import shown, whole_number

Answer = TypeVar("Answer")

TIMEOUT_HEADER = "x-request-timeout-ms"


def timeout_of(headers: Mapping[str, str], *, longest_s: float) -> float:
    """Seconds that the request gives its answer: what its header asks for, at most `longest_s`.

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


async def unless_hung_up(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer; where the client hangs up first it is cancelled, and ClientDisconnect raised.

    Call it after the whole body was read: what the connection says next is then that it has ended.
    """
    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            # Until it has ended, so that the log line says how long the request waited.
            await asyncio.gather(answering, return_exceptions=True)
            raise ClientDisconnect
        return answering.result()
    finally:
        for task in (answering, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
