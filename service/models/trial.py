"""Bundles are opened on trial, in a child process with a limit of time, before the server opens
them.

ONNX Runtime may hang or abort on a model, or take all memory, and nothing can stop it inside this
process: its optimiser computes constants while a session is made. The child's end costs one bundle.
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
from evalmode.service.models.model import Model, Trial

_TRIAL = TypeAdapter(Trial)


class TrialError(Exception):
    """The child met an error that is no known fault of bundles; its traceback is the message."""


class TrialOpener:
    """Opens bundles for a server: first in a child process, then, if all is well there, here.

    The child reads the files, makes a session, replays the known answers twice and measures. This
    process then makes a session, replays once, and takes over what was measured, so a start does
    not take twice as long. One child opens all bundles of one look at the folder. `rest` ends it,
    so its memory is used for a moment only. `open` and `rest` must not overlap.
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
        """The open model. Raises what `Model.open` raises, and BundleError where the child does not
        finish.
        """
        trial = self._try(path)
        return Model.open(path, **self._options, calibration=self._calibration, trial=trial)

    def rest(self) -> None:
        """End the child; the next bundle starts another one."""
        self._child.close()

    def cancel(self) -> None:
        """End the trial that is running, from another thread; there will be no other one."""
        self._cancelled.set()

    def _try(self, path: Path) -> Trial:
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
            raise _error_named(answer["error"], answer["sentence"])
        if "unexpected" in answer:
            raise TrialError(answer["unexpected"])
        return _TRIAL.validate_python(answer["trial"])


def run_trials() -> None:
    """The child: open bundles as they are asked for, and tell each step before it begins."""
    serve(_steps)


def _steps(question: bytes) -> Iterator[bytes]:
    # In a thread, for the step must be told before it is taken.
    messages: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            messages.put(_open(json.loads(question), messages))
        finally:
            messages.put(None)

    threading.Thread(target=run, daemon=True).start()
    while (message := messages.get()) is not None:
        yield json.dumps(message).encode()


def _open(
    question: dict[str, Any], messages: queue.SimpleQueue[dict[str, object] | None]
) -> dict[str, object]:
    cache = question.pop("cache")
    calibration = Calibration(
        budget_s=question.pop("budget_s"), cache=None if cache is None else Path(cache)
    )
    try:
        model = Model.open(
            Path(question.pop("path")),
            **question,
            calibration=calibration,
            on_step=lambda step: messages.put({"step": step}),
        )
    except EvalmodeError as error:
        return {"error": _name_of(error), "sentence": str(error)}
    except Exception:  # of any kind: the parent reports it
        return {"unexpected": traceback.format_exc()}
    trial = Trial(digest=model.digest, measured=dict(model.measured))
    return {"trial": _TRIAL.dump_python(trial, mode="json")}


def _name_of(error: EvalmodeError) -> str:
    """The nearest class of the error that the parent knows by its name."""
    names = (kind.__name__ for kind in type(error).__mro__)
    return next(name for name in names if hasattr(errors, name))


def _error_named(name: str, sentence: str) -> EvalmodeError:
    kind: type[EvalmodeError] = getattr(errors, name)
    return kind(sentence)
