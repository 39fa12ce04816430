"""Opens bundles on trial, in a child process with a time limit, before the server opens them.

ONNX Runtime may hang or abort on a model, or take all memory: its optimiser computes constants
while a session is made. Inside this process nothing could stop that. A child that ends costs one
bundle.

The parent sends one question, a JSON object, for each bundle. The child answers with JSON objects:

1. `{"step": ...}` before each step;
2. at the end `{"trial": ...}`, `{"error": CLASS, "sentence": ...}`, or `{"unexpected": TRACEBACK}`.
"""

from __future__ import annotations

import json
import queue
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from evalmode.bundle import errors
from evalmode.bundle.errors import BundleError
from evalmode.child_process import Cancelled, Child, ChildLost, OutOfTime, serve
from evalmode.errors import EvalmodeError
from evalmode.service.models.calibration import Calibration
from evalmode.service.models.model import Model, TrialResult

_RESULT = TypeAdapter(TrialResult)


class TrialError(Exception):
    """The child met an unexpected error, not a fault of a bundle; its traceback is the message."""


class TrialOpener:
    """Opens bundles for a server: first in a child process, then, if that succeeds, here.

    The child reads the files, makes a session, replays the known answers twice and measures. Then
    this process makes a session, replays once, and uses the child's measurements. So a start does
    not take twice as long.

    One child opens all bundles of one look at the folder. `end_child` ends it, so that its memory
    is used for a moment only. Calls of `open` and `end_child` must not overlap.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        provider: str = "cpu",
        threads: int = 1,
        allow_uncertified: bool = False,
        calibration: Calibration = Calibration(),  # noqa: B008 - frozen
    ) -> None:
        """The child has `timeout_s` for each bundle. The other arguments are those of
        `Model.open`.
        """
        self._timeout_s = timeout_s
        self._options: dict[str, Any] = {
            "provider": provider,
            "threads": threads,
            "allow_uncertified": allow_uncertified,
        }
        self._calibration = calibration
        self._child = Child(f"{__name__}:run_trials")
        self._cancelled = threading.Event()

    def open(self, path: Path) -> Model:
        """The open model. Raises the errors of `Model.open`, and BundleError if the child does not
        finish.
        """
        trial = self._try(path)
        return Model.open(path, **self._options, calibration=self._calibration, trial=trial)

    def end_child(self) -> None:
        """End the child; the next bundle starts another one."""
        self._child.close()

    def cancel(self) -> None:
        """End the trial that is running, from another thread. No other trial will succeed."""
        self._cancelled.set()

    def _try(self, path: Path) -> TrialResult:
        """Open the bundle in the child; the errors are those of `open`."""
        cache = self._calibration.cache
        question = {
            "path": str(path),
            "budget_s": self._calibration.budget_s,
            "cache": None if cache is None else str(cache),
            **self._options,
        }
        step = "starting a process for it"
        answer: Mapping[str, Any] = {}
        messages = self._child.ask(
            json.dumps(question).encode(),
            time_s=self._timeout_s,
            cancelled=self._cancelled.is_set,
        )
        try:
            for message in messages:
                answer = json.loads(message)
                step = answer.get("step", step)
        except Cancelled as error:
            raise BundleError(f"{path} is not opened: the server is stopping") from error
        except OutOfTime as error:
            raise BundleError(
                f"{path} is refused: {step} was not finished after {self._timeout_s:g} s; if the"
                " model needs longer, raise the setting load_timeout_s"
            ) from error
        except ChildLost as error:
            raise BundleError(
                f"{path} is refused: the process that opened it on trial {error} (while {step})"
            ) from error
        if "error" in answer:
            error_class: type[EvalmodeError] = getattr(errors, answer["error"])
            raise error_class(answer["sentence"])
        if "unexpected" in answer:
            raise TrialError(answer["unexpected"])
        return _RESULT.validate_python(answer["trial"])


def run_trials() -> None:
    """The child: opens a bundle for each question."""
    serve(_messages_of_trial)


def _messages_of_trial(question: bytes) -> Iterator[bytes]:
    """Open the bundle of a question. Gives a message before each step, and one with the result."""
    messages: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
    step_is_sent = threading.Semaphore(0)

    def send_step(step: str) -> None:
        # The step may end this process, so it must not begin before its message is sent.
        messages.put({"step": step})
        step_is_sent.acquire()

    def run() -> None:
        try:
            options = json.loads(question)
            path = Path(options.pop("path"))
            budget_s, cache = options.pop("budget_s"), options.pop("cache")
            calibration = Calibration(
                budget_s=budget_s, cache=None if cache is None else Path(cache)
            )
            model = Model.open(
                path,
                **options,
                calibration=calibration,
                on_step=send_step,
            )
            result = TrialResult(digest=model.digest, measured=dict(model.measured))
            messages.put({"trial": _RESULT.dump_python(result, mode="json")})
        except EvalmodeError as error:
            # The first of its classes that the parent knows by name.
            names = (error_class.__name__ for error_class in type(error).__mro__)
            name = next(name for name in names if hasattr(errors, name))
            messages.put({"error": name, "sentence": str(error)})
        except Exception:
            # Any error at all: the parent reports it.
            messages.put({"unexpected": traceback.format_exc()})
        finally:
            messages.put(None)

    # In a thread, so that messages are sent while `Model.open` is running.
    threading.Thread(target=run, daemon=True).start()
    while (message := messages.get()) is not None:
        yield json.dumps(message).encode()
        # The caller of this generator has sent the message when it asks for the next one.
        if "step" in message:
            step_is_sent.release()
