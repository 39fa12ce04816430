"""The errors that a caller of the service can meet, and the form of every error answer.

The sentences are where the errors are raised: that of a full queue in `batching/queue.py`.

EvalmodeError
├── StartFailed            the server cannot start: a setting, the port, the model; exit code 2
├── WorkersFailed          server processes end as soon as they start; exit code 1
└── RequestError           every answer other than 200
    ├── BadRequest         400  the body is not JSON, or a tensor does not fit the model
    ├── Forbidden          403  the settings of this server do not allow the request
    ├── UnknownModel       404  there is no model, or no version of it, with this name
    ├── RequestTimeout     408  the body did not arrive in time
    ├── BodyTooLarge       413  more than this server reads, or than its queue could ever hold
    ├── UnsupportedMedia   415  the body declares a type or an encoding that is not supported
    ├── InvalidField       422  one field is wrong; the message says which, and why
    │   └── TextTooLong    422  a text is longer than the model reads, and must not be cut
    ├── RunFailed          500  the model failed on these rows; other rows are not affected
    ├── NotReady           503  the model is not loaded, or the server is stopping
    ├── QueueFull          503  too many rows wait already; it says when to retry
    └── DeadlineExceeded   504  there was no answer within the time that the request allows

`app.py` turns these into answers. A request without a known API key never gets so far:
`http/api_keys.py` answers it with 401.
"""

from __future__ import annotations

import json
from typing import ClassVar

from evalmode.errors import EvalmodeError


def is_v2(path: str) -> bool:
    """Whether a path belongs to the Open Inference Protocol, whose errors have another form."""
    return f"{path}/".startswith("/v2/")


def error_body(path: str, sentence: str, *, field: str | None = None) -> bytes:
    """The body of an error answer, in the form of the protocol that `path` belongs to.

    >>> error_body("/v1/predict", "inputs is missing", field="inputs")
    b'{"error":"inputs is missing","field":"inputs"}'
    >>> error_body("/v2/models/m/infer", "inputs is missing", field="inputs")
    b'{"error":"inputs is missing"}'
    """
    error: dict[str, str | None] = {"error": sentence}
    if not is_v2(path):
        error["field"] = field
    # A name may hold half a surrogate pair, which UTF-8 cannot encode. It becomes an escape, which
    # JSON reads.
    text = json.dumps(error, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class StartFailed(EvalmodeError):  # noqa: N818 - read as a sentence, like the bundle's
    """The server cannot start. The message names the setting or the cause."""


class WorkersFailed(EvalmodeError):  # noqa: N818
    """Server processes keep ending before they are ready. The message names the cause."""


class RequestError(EvalmodeError):
    """A request whose answer is not 200. `field` is the wrong field of the request, if any."""

    status: ClassVar[int]

    def __init__(self, sentence: str, *, field: str | None = None) -> None:
        super().__init__(sentence)
        self.field = field


class BadRequest(RequestError):  # noqa: N818
    """The body is not JSON, or holds a tensor that does not fit the model."""

    status = 400


class Forbidden(RequestError):  # noqa: N818
    """The settings of this server do not allow the request to anyone."""

    status = 403


class UnknownModel(RequestError):  # noqa: N818
    """There is no model, or no version of it, with this name."""

    status = 404


class RequestTimeout(RequestError):  # noqa: N818
    """The body did not arrive in time."""

    status = 408


class BodyTooLarge(RequestError):  # noqa: N818
    """The body holds more than this server reads, or than its queue could ever hold."""

    status = 413


class UnsupportedMedia(RequestError):  # noqa: N818
    """The body declares a content type or a content encoding that is not supported."""

    status = 415


class InvalidField(RequestError):  # noqa: N818
    """A field is missing, unknown, or has a wrong value. The message names the field and why."""

    status = 422


class TextTooLong(InvalidField):
    """The text at `index` is longer than the model reads, and the request forbids to cut it.

    `problem` is the message without its subject. Some requests have another name for the text than
    `inputs.INDEX`.
    """

    def __init__(self, index: int, *, longest: int) -> None:
        self.index = index
        self.problem = (
            f"is longer than the {longest} positions that the model reads: shorten it, or let it be"
            ' cut with "truncate": true'
        )
        super().__init__(f"inputs.{index} {self.problem}", field=f"inputs.{index}")


class RunFailed(RequestError):  # noqa: N818
    """The model failed on the rows of this request."""

    status = 500


class NotReady(RequestError):  # noqa: N818
    """There is no model to answer: it is not loaded yet, or closed already."""

    status = 503


class QueueFull(RequestError):  # noqa: N818
    """Too many rows wait already.

    After `retry_after_s` seconds there should be room, by the measured rate of the queue.
    """

    status = 503

    def __init__(self, sentence: str, *, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestError):  # noqa: N818
    """There was no answer within the time that the request, or this server, allows."""

    status = 504
