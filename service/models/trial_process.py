"""The child process of `trial.py`: it opens bundles and tells its parent how far it came."""

from __future__ import annotations

import json
import queue
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from evalmode.bundle import errors
from evalmode.child_process import serve
from evalmode.errors import EvalmodeError
from evalmode.service.models.calibration import Calibration, measured_to_json
from evalmode.service.models.model import Model


def run_trials() -> None:
    """Open a bundle for each question."""
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
                on_passed=lambda digest: messages.put({"passed": digest}),
            )
            messages.put({"measured": measured_to_json(model.measured)})
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
