"""Where the time of one request went, for its log line and its span."""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from typing import Any

from evalmode.service.batching.bucket import Job

# In the state of a request's ASGI scope.
_KEY = "timings"


class Timings:
    """The model of a request, its rows, and the seconds of its steps.

    A step is None until it is done. A stream of lines repeats the steps, and its seconds are sums.
    Its steps overlap, so together they may be longer than the request.

    Attributes:
        model: the name of the model.
        version: its version.
        rows: the number of rows that the engine got.
        bucket: the label of the bucket with the longest padded length among them.
        streamed: whether the request is a stream, whose duration depends on its client.
        read_s: reading the body from the connection.
        encode_s: from the body to the rows: JSON, tensors, and the ids of texts.
        queue_s: until the last batch of the request began.
        run_s: from there to its last answer.
        write_s: from the answers to the body of the response.
    """

    __slots__ = (
        "_positions",
        "bucket",
        "encode_s",
        "model",
        "queue_s",
        "read_s",
        "rows",
        "run_s",
        "streamed",
        "version",
        "write_s",
    )

    def __init__(self) -> None:
        self.model: str | None = None
        self.version: str | None = None
        self.rows = 0
        self.bucket: str | None = None
        self.streamed = False
        self.read_s: float | None = None
        self.encode_s: float | None = None
        self.queue_s: float | None = None
        self.run_s: float | None = None
        self.write_s: float | None = None
        self._positions = 0

    def encoded(self, jobs: Sequence[Job], *, since: float) -> float:
        """The rows are ready for the engine; return the time now.

        Encoding began at `since`. Both times are of time.monotonic().
        """
        now = time.monotonic()
        self.encode_s = (self.encode_s or 0.0) + now - since
        self.rows += len(jobs)
        for bucket, _ in jobs:
            if bucket.positions > self._positions:
                self.bucket, self._positions = bucket.label, bucket.positions
        return now

    def waited(self, queue_s: float, run_s: float = 0.0) -> None:
        """The engine is done with rows of the request, whether it answered them or not."""
        self.queue_s = (self.queue_s or 0.0) + queue_s
        self.run_s = (self.run_s or 0.0) + run_s

    def written(self, *, since: float) -> None:
        """The answers were written to a body, or to a part of one. Writing began at `since`."""
        self.write_s = (self.write_s or 0.0) + time.monotonic() - since

    def fields(self) -> dict[str, str | int | float]:
        """The fields of the log line, with times in milliseconds. Empty without a model."""
        if self.model is None or self.version is None:
            return {}
        fields: dict[str, str | int | float] = {
            "model": self.model,
            "version": self.version,
            "rows": self.rows,
        }
        if self.bucket is not None:
            fields["bucket"] = self.bucket
        for name, seconds in (
            ("read_ms", self.read_s),
            ("encode_ms", self.encode_s),
            ("queue_ms", self.queue_s),
            ("run_ms", self.run_s),
            ("write_ms", self.write_s),
        ):
            if seconds is not None:
                fields[name] = round(seconds * 1000, 3)
        return fields


def timings_of(scope: MutableMapping[str, Any]) -> Timings:
    """The timings of the request with this ASGI scope; new ones at the first call."""
    state = scope.setdefault("state", {})
    timings: Timings | None = state.get(_KEY)
    if timings is None:
        timings = state[_KEY] = Timings()
    return timings


def is_streamed(scope: MutableMapping[str, Any]) -> bool:
    """Whether the request with this scope is a stream of lines."""
    timings: Timings | None = scope.get("state", {}).get(_KEY)
    return timings is not None and timings.streamed


def fields_of(scope: MutableMapping[str, Any]) -> dict[str, str | int | float]:
    """The fields of the request with this scope. Empty without a model."""
    timings: Timings | None = scope.get("state", {}).get(_KEY)
    return timings.fields() if timings is not None else {}
