"""The errors a caller of the service can meet, and the body that every error answer has.

EvalmodeError
├── StartFailed            the server cannot start: a setting, the port, the model; exit code 2
├── WorkersFailed          server processes end as soon as they are started; exit code 1
└── RequestError           what an answer other than 200 says
    ├── BadRequest         400  the body is not JSON, or a tensor is not what the model takes
    ├── Forbidden          403  something that this server was told not to do
    ├── UnknownModel       404  no model, or no version of it, has this name
    ├── RequestTimeout     408  the body did not come in time
    ├── Conflict           409  something that this server cannot do as it is set up
    ├── BodyTooLarge       413  more than this server reads, or than its queue could ever hold
    ├── UnsupportedMedia   415  the body declares a type or an encoding that is not read here
    ├── InvalidField       422  one field is wrong; says which and how
    │   └── TextTooLong    422  a text is longer than the model reads, and must not be cut
    ├── RunFailed          500  the model failed on these rows; others are not concerned
    ├── NotReady           503  the model is not loaded, or the server is stopping
    ├── QueueFull          503  too much waits already; says when to come again
    └── DeadlineExceeded   504  the answer was not there in the time that the request allowed

`app.py` turns these into answers. A request without a known API key never gets so far:
`http/api_keys.py` answers it with 401.
"""

from __future__ import annotations

import json
from typing import ClassVar

from evalmode.errors import EvalmodeError


def is_v2(path: str) -> bool:
    """Whether a path belongs to the Open Inference Protocol, which has an error form of its own."""
    return f"{path}/".startswith("/v2/")


def error_body(path: str, sentence: str, *, field: str | None = None) -> bytes:
    """The body of an error answer in the form of the protocol that `path` belongs to."""
    error: dict[str, str | None] = {"error": sentence}
    if not is_v2(path):
        error["field"] = field
    # Half a surrogate pair, which a name may hold, becomes the escape that JSON reads.
    text = json.dumps(error, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class StartFailed(EvalmodeError):  # noqa: N818 - read as a sentence, like the bundle's
    """The server cannot start; the message names the setting or the cause."""


class WorkersFailed(EvalmodeError):  # noqa: N818
    """Server processes end again and again before they are ready; the message names the cause."""


class RequestError(EvalmodeError):
    """A request that is not answered with 200. `field` is the request's field at fault, if it is
    one.
    """

    status: ClassVar[int]

    def __init__(self, sentence: str, *, field: str | None = None) -> None:
        super().__init__(sentence)
        self.field = field


class BadRequest(RequestError):  # noqa: N818
    """The body is not JSON, or holds a tensor that is not what the model takes."""

    status = 400


class Forbidden(RequestError):  # noqa: N818
    """Something that this server was told not to do for anyone."""

    status = 403


class UnknownModel(RequestError):  # noqa: N818
    """No model, or no version of it, has the name that was asked for."""

    status = 404


class RequestTimeout(RequestError):  # noqa: N818
    """The body did not come in time."""

    status = 408


class Conflict(RequestError):  # noqa: N818
    """Something that this server cannot do as it is set up."""

    status = 409


class UnsupportedMedia(RequestError):  # noqa: N818
    """The body declares a content type or a content encoding that is not read here."""

    status = 415


class BodyTooLarge(RequestError):  # noqa: N818
    """The body holds more than this server reads, or than its queue could ever hold."""

    status = 413


class InvalidField(RequestError):  # noqa: N818
    """A field is missing, unknown, or holds a value that cannot be answered; the message names
    both.
    """

    status = 422


class TextTooLong(InvalidField):
    """The text at `place` is longer than the model reads, and the request forbids to cut it.

    `problem` is the sentence without its subject, for requests that call the text something else
    than `inputs.PLACE`.
    """

    def __init__(self, place: int, *, longest: int) -> None:
        self.place = place
        self.problem = (
            f"is longer than the {longest} positions that the model reads: shorten it, or let it be"
            ' cut with "truncate": true'
        )
        super().__init__(f"inputs.{place} {self.problem}", field=f"inputs.{place}")


class RunFailed(RequestError):  # noqa: N818
    """The model failed on the rows of this request."""

    status = 500


class NotReady(RequestError):  # noqa: N818
    """No model is there to answer: not yet loaded, or closed already."""

    status = 503


class QueueFull(RequestError):  # noqa: N818
    """Too much waits already; `retry_after_s` is when there should be room, by the measured drain
    rate.
    """

    status = 503

    def __init__(self, sentence: str, *, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestError):  # noqa: N818
    """The answer was not there in the time that the request, or this server, allows."""

    status = 504
