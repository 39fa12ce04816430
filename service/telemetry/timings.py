"""Where the time of one request went: what its log line and its span say beside its duration."""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from typing import Any

from evalmode.service.batching.bucket import Job

_KEY = "timings"  # in the state of a request's ASGI scope


class Timings:
    """The model of a request, its rows, and the seconds of its steps, each None until it was taken.

    A stream of lines takes each step many times. Its figures are sums, and since its steps overlap
    they may be more than its duration.

    Attributes:
        model: the name of the model that was asked.
        version: its version.
        rows: how many rows the engine was given.
        bucket: the longest padded length among them; "other" or "whole" where rows have none.
        streamed: whether the request is a stream, which takes as long as its client likes.
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
        """The rows are ready for the engine, begun at `since` by time.monotonic(); the time now."""
        now = time.monotonic()
        self.encode_s = (self.encode_s or 0.0) + now - since
        self.rows += len(jobs)
        for bucket, _ in jobs:
            if bucket.positions > self._positions:
                self.bucket, self._positions = bucket.label, bucket.positions
        return now

    def waited(self, queue_s: float, run_s: float = 0.0) -> None:
        """The engine is done with rows of the request, answered or not."""
        self.queue_s = (self.queue_s or 0.0) + queue_s
        self.run_s = (self.run_s or 0.0) + run_s

    def written(self, *, since: float) -> None:
        """The answers became a body, or a part of one."""
        self.write_s = (self.write_s or 0.0) + time.monotonic() - since

    def fields(self) -> dict[str, str | int | float]:
        """All that is known, with times in milliseconds; empty where no model was asked."""
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
    """The timings of the request with this ASGI scope, which begin at the first call."""
    timings: Timings = scope.setdefault("state", {}).setdefault(_KEY, Timings())
    return timings


def is_streamed(scope: MutableMapping[str, Any]) -> bool:
    """Whether the request with this scope is a stream of lines."""
    timings: Timings | None = scope.get("state", {}).get(_KEY)
    return timings is not None and timings.streamed


def fields_of(scope: MutableMapping[str, Any]) -> dict[str, str | int | float]:
    """What is known of the request with this scope; empty where it asked no model."""
    timings: Timings | None = scope.get("state", {}).get(_KEY)
    return timings.fields() if timings is not None else {}
