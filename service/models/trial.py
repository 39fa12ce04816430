"""Opens bundles on trial, in a child process with a time limit, before the server opens them.

ONNX Runtime may hang or abort on a model, or take all memory: its optimiser computes constants
while a session is made. Inside this process nothing could stop that. A child that ends costs one
bundle.

The parent sends one question, a JSON object, for each bundle. The child (`trial_process.py`)
answers with JSON objects:

1. `{"step": ...}` before each step;
2. `{"passed": DIGEST}` when its known answers came out;
3. at the end `{"measured": ...}`, `{"error": CLASS, "sentence": ...}`, or
   `{"unexpected": TRACEBACK}`.

Importing this module loads neither NumPy nor pydantic. So the child can start before they do.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalmode.bundle import errors
from evalmode.bundle.errors import BundleError
from evalmode.child_process import Cancelled, Child, ChildLost, OutOfTime
from evalmode.errors import EvalmodeError
from evalmode.service.models.shared_trials import SharedTrials, now

if TYPE_CHECKING:
    from evalmode.service.models.calibration import MeasuredBucket
    from evalmode.service.models.folders import Folder
    from evalmode.service.models.model import Model
    from evalmode.service.settings import Settings

_CHILD = "evalmode.service.models.trial_process:run_trials"


class TrialError(Exception):
    """The child met an unexpected error, not a fault of a bundle; its traceback is the message."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A trial of the bundle at `path`.

    Attributes:
        passed: the digest, as soon as a session was made and the known answers came out, the same
            twice.
        measured: the measurements of its buckets by label, after that.

    Each has the error instead if the trial fails before.
    """

    path: Path
    passed: Future[str] = field(default_factory=Future)
    measured: Future[Mapping[str, MeasuredBucket]] = field(default_factory=Future)


class TrialOpener:
    """Opens bundles for a server: first in a child process, then, if that succeeds, here.

    The child reads the files, makes a session, replays the known answers twice and measures. When
    the answers came out, this process makes a session and replays once, while the child measures.
    Then it takes the child's measurements. So a start does not take twice as long.

    One child opens all bundles of one look at the folder. `end_child` ends it, so that its memory
    is used for a moment only. Only `cancel` may be called while another call is running.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        provider: str = "cpu",
        threads: int = 1,
        allow_uncertified: bool = False,
        budget_s: float = 1.0,
        cache: Path | None = None,
        shared: SharedTrials | None = None,
    ) -> None:
        """The child has `timeout_s` for each bundle. `budget_s` and `cache` are those of
        `Calibration`. With `shared` other processes of this server share their trials. The other
        arguments are those of `Model.open`.
        """
        self._timeout_s = timeout_s
        self._options: dict[str, Any] = {
            "provider": provider,
            "threads": threads,
            "allow_uncertified": allow_uncertified,
        }
        self._budget_s = budget_s
        self._cache = cache
        self._child = Child(_CHILD)
        self._shared = shared if shared is not None and shared.is_private else None
        self._cancelled = threading.Event()
        # Reads the answers of the child to the trial that began last.
        self._reader: threading.Thread | None = None
        # The trial that `begin` has begun, with the folder as it was.
        self._begun: tuple[Trial, Folder] | None = None

    @classmethod
    def of(cls, settings: Settings, *, shared_folder: Path | None) -> TrialOpener:
        """The opener of a server with these settings, whose processes have a folder in common."""
        return cls(
            timeout_s=settings.load_timeout_s,
            provider=settings.provider,
            threads=settings.threads,
            allow_uncertified=settings.allow_uncertified,
            budget_s=settings.calibration_s,
            cache=settings.cache,
            shared=None if shared_folder is None else SharedTrials(shared_folder),
        )

    def start_child(self) -> None:
        """Start the child, which imports what it needs before the first bundle.

        Another process of this server may be making its trial already: then no child is needed.
        """
        # `open` tries it again, and then reports the error.
        with suppress(ChildLost, OSError):
            if self._shared is None or self._shared.try_take_turn():
                self._child.start()

    def begin(self, root: Path) -> None:
        """Begin the trial of the bundle below `root`, if there is only one; `open` goes on with it.

        Of several bundles, only the look at the folder decides which are opened, and in what order.
        """
        from evalmode.service.models.folders import find_folders

        # The look at the folder reports the error.
        with suppress(OSError):
            folders = find_folders(root, earlier={})
            if len(folders) == 1:
                self._begun = self._begin(folders[0].path), folders[0]

    def open(self, path: Path) -> Model:
        """The open model. Raises the errors of `Model.open`, and BundleError if the child does not
        finish.
        """
        # Imported here, while the child is running.
        from evalmode.service.models.folders import signature_of
        from evalmode.service.models.model import Model

        trial = None
        if self._begun is not None:
            begun, folder = self._begun
            self._begun = None
            # A folder that has changed since is another bundle.
            if folder.path == path and folder.signature == signature_of(path):
                trial = begun
            else:
                self._end_trial()
        if trial is None:
            trial = self._begin(path)
        try:
            # ONNX Runtime must not see the bundle here before the child has come through.
            trial.passed.result()
            return Model.open(path, **self._options, trial=trial)
        finally:
            self._end_trial()

    def open_untried(self, path: Path) -> Model:
        """The model, opened in this process alone. Raises the errors of `Model.open`."""
        from evalmode.service.models.calibration import Calibration
        from evalmode.service.models.model import Model

        calibration = Calibration(budget_s=self._budget_s, cache=self._cache)
        return Model.open(path, **self._options, calibration=calibration)

    def end_child(self) -> None:
        """End the child; the next bundle starts another one."""
        self._begun = None
        self._end_trial()
        self._child.close()
        if self._shared is not None:
            self._shared.end_turn()

    def cancel(self) -> None:
        """End the trial that is running, from another thread. No other trial will succeed."""
        self._cancelled.set()

    def _begin(self, path: Path) -> Trial:
        trial = Trial(path=path)
        self._reader = threading.Thread(
            target=self._follow, args=(trial,), name="trial", daemon=True
        )
        self._reader.start()
        return trial

    def _end_trial(self) -> None:
        """Wait until the child is free. A trial that still runs is not needed any more."""
        reader, self._reader = self._reader, None
        if reader is not None:
            if reader.is_alive():
                self._child.kill()
            reader.join()

    def _follow(self, trial: Trial) -> None:
        """Ask the child, or take over the outcome of another process, and pass it on."""
        shared, wished_at = self._shared, now()
        outcome = None
        try:
            key = self._key_of(trial.path)
            if shared is not None and key is not None:
                with suppress(OSError):
                    shared.take_turn(cancelled=self._cancelled.is_set)
                    outcome = shared.outcome(key, wished_at=wished_at)
            if outcome is None:
                outcome = self._ask(trial)
                if shared is not None and key is not None and not self._cancelled.is_set():
                    with suppress(OSError):
                        shared.share(key, outcome)
            if "error" in outcome:
                error_class: type[EvalmodeError] = getattr(errors, outcome["error"])
                raise error_class(outcome["sentence"])
            if "unexpected" in outcome:
                raise TrialError(outcome["unexpected"])
            from evalmode.service.models.calibration import measured_from_json

            if not trial.passed.done():
                trial.passed.set_result(outcome["passed"])
            trial.measured.set_result(measured_from_json(outcome["measured"]))
        except Exception as error:
            # Any error at all: `open` raises it.
            for future in (trial.passed, trial.measured):
                if not future.done():
                    future.set_exception(error)
        finally:
            if shared is not None:
                shared.end_turn()

    def _ask(self, trial: Trial) -> Mapping[str, Any]:
        """The outcome by the child: what it says, or why it does not."""
        path = trial.path
        question = {"path": str(path), **self._calibration_json, **self._options}
        step = "starting a process for it"
        outcome: dict[str, Any] = {}
        messages = self._child.ask(
            json.dumps(question).encode(),
            time_s=self._timeout_s,
            cancelled=self._cancelled.is_set,
        )
        try:
            for message in messages:
                outcome |= json.loads(message)
                step = outcome.get("step", step)
                if "passed" in outcome and not trial.passed.done():
                    trial.passed.set_result(outcome["passed"])
            return outcome
        except Cancelled:
            sentence = f"{path} is not opened: the server is stopping"
        except OutOfTime:
            sentence = (
                f"{path} is refused: {step} was not finished after {self._timeout_s:g} s; if the"
                " model needs longer, raise the setting load_timeout_s"
            )
        except ChildLost as error:
            sentence = (
                f"{path} is refused: the process that opened it on trial {error} (while {step})"
            )
        return {"error": "BundleError", "sentence": sentence}

    @property
    def _calibration_json(self) -> dict[str, Any]:
        cache = None if self._cache is None else str(self._cache)
        return {"budget_s": self._budget_s, "cache": cache}

    def _key_of(self, path: Path) -> str | None:
        """What an outcome depends on, besides this machine and this server. None if there are no
        other processes to share it with, or if the files cannot be read.
        """
        if self._shared is None:
            return None
        from evalmode.bundle.manifest import CERTIFICATE_FILE, MANIFEST_FILE
        from evalmode.bundle.store import read_file

        key = [str(path), self._timeout_s, self._options, self._calibration_json]
        # The manifest has the hash of every file but the certificate.
        for name in (MANIFEST_FILE, CERTIFICATE_FILE):
            try:
                key.append(hashlib.sha256(read_file(path / name)).hexdigest())
            except BundleError:
                return None
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()
