"""The errors a caller of the service can meet, and the body that every error answer has.

EvalmodeError
├── StartFailed            the server cannot start: a setting, the port, the model; exit code 2
└── RequestError           what an answer other than 200 says
    ├── BadRequest         400  the body is not JSON
    ├── UnsupportedMedia   415  the body declares to be something else
    ├── BodyTooLarge       413  more bytes than this server reads
    ├── InvalidField       422  one field is wrong; says which and how
    ├── RunFailed          500  the model failed on these rows; others are not concerned
    └── NotReady           503  the model is not loaded, or the server is stopping

Knows nothing of FastAPI: `app.py` turns these into answers.
"""

from __future__ import annotations

from typing import ClassVar

from evalmode.bundle.errors import EvalmodeError


class StartFailed(EvalmodeError):  # noqa: N818 - read as a sentence, like the bundle's
    """The server cannot start; the message names the setting or the cause."""


class RequestError(EvalmodeError):
    """A request that is not answered with 200. `field` is the request's field at fault, if it is one."""

    status: ClassVar[int]

    def __init__(self, sentence: str, *, field: str | None = None) -> None:
        super().__init__(sentence)
        self.field = field


class BadRequest(RequestError):  # noqa: N818
    """The body is not JSON."""

    status = 400


class UnsupportedMedia(RequestError):  # noqa: N818
    """The body declares a content type that is not JSON."""

    status = 415


class BodyTooLarge(RequestError):  # noqa: N818
    """The body holds more bytes than this server reads."""

    status = 413


class InvalidField(RequestError):  # noqa: N818
    """A field is missing, unknown, or holds a value that cannot be answered; the message names both."""

    status = 422


class RunFailed(RequestError):  # noqa: N818
    """The model failed on the rows of this request."""

    status = 500


class NotReady(RequestError):  # noqa: N818
    """No model is there to answer: not yet loaded, or closed already."""

    status = 503
