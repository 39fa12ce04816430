"""The models below one folder, as the server uses them: looked up by name and version, polled,
loaded and unloaded.

The open models are published as one snapshot that is never changed, only replaced. So readers take
no lock, and a request keeps its model after the model was unloaded. A name from a request is never
used as a path.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from evalmode.bundle.errors import BundleError
from evalmode.bundle.store import no_bundle_at
from evalmode.service.errors import (
    BadRequest,
    Forbidden,
    InvalidField,
    NotReady,
    StartFailed,
    UnknownModel,
)
from evalmode.service.models.model import Model
from evalmode.service.models.open_models import Entry, OpenModels, Outcome

_log = structlog.get_logger("evalmode.service")

CONTROL_OFF = "models are not loaded or unloaded here: the setting model_control is off"

# What an error repeats of a name from a request.
_NAME_CHARACTERS = 64
# How long `close` waits for a bundle that is being opened.
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """What readers see.

    Attributes:
        models: the open models by name, newest version first.
        entries: all versions, open or not, by name, newest first.
    """

    models: Mapping[str, tuple[Model, ...]] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()


class Repository:
    """The models below `root`: a bundle, a folder of versions, or a folder of such folders.

    - `open_model` opens a bundle's folder. Its errors refuse only that bundle.
    - `versions` of each model are open, the newest ones.
    - `control` is whether `load` and `unload` are allowed.
    - `default_model` is the name of the model for texts, if a request names none.
    - `unloaded` are the models that stay closed until they are loaded.
    - `on_change` is called with the open models at each change. It must be quick and never raise.
    - `on_swap` is called with the name of a model of which a version was loaded, unloaded or
      refused. It must be quick and never raise.
    - `after_opening` is called after each pass over the folders.
    - `cancel_opening` is called by `close`, perhaps while a bundle is being opened.

        repository = Repository(Path("bundles"), open_model=Model.open)
        repository.start()
        model = repository.get("languages")
        repository.close()
    """

    def __init__(
        self,
        root: Path,
        *,
        open_model: Callable[[Path], Model],
        versions: int = 1,
        control: bool = True,
        default_model: str | None = None,
        unloaded: Collection[str] = (),
        on_change: Callable[[Iterable[Model]], None] = lambda models: None,
        on_swap: Callable[[str, Outcome], None] = lambda model, outcome: None,
        after_opening: Callable[[], None] = lambda: None,
        cancel_opening: Callable[[], None] = lambda: None,
    ) -> None:
        self._root = root
        self._cancel_opening = cancel_opening
        self._control = control
        self._default_model = default_model
        self._unloaded = frozenset(unloaded)
        self._on_change = on_change
        self._snapshot = _Snapshot()
        # Held during each call to `_open_models`, which may open bundles. Readers never take it.
        self._lock = threading.Lock()
        self._open_models = OpenModels(
            root,
            open_model=open_model,
            versions=versions,
            unloaded=unloaded,
            publish=self._publish,
            on_swap=on_swap,
            after_opening=after_opening,
        )
        self._ended = threading.Event()
        self._poller: threading.Thread | None = None

    def start(self) -> None:
        """Open the models. An older good version is served instead of a bad one.

        Raises the error of the first bundle if none can be opened, unless models are unloaded.
        Raises StartFailed if the folder cannot be read, or if the default model is not among those
        that were opened.
        """
        with self._lock:
            try:
                refusals = self._open_models.refresh()
            except OSError as error:
                # Of the root itself: the error of a bundle is its refusal.
                raise StartFailed(
                    f"the bundles at {self._root} cannot be read: {error.strerror}"
                ) from error
            if not self._snapshot.models and not self._unloaded:
                if refusals:
                    raise refusals[0].error
                raise BundleError(no_bundle_at(self._root))
            for refusal in refusals:
                refusal.log()
        expected_names = {*self._snapshot.models, *self._unloaded}
        if self._default_model is not None and self._default_model not in expected_names:
            raise StartFailed(
                f"setting default_model is {self._default_model!r} and no such model could be"
                f" opened: there is {', '.join(self._snapshot.models)}"
            )

    def poll(self) -> None:
        """Look at the folders once, and open and close what has changed."""
        with self._lock:
            for refusal in self._open_models.refresh():
                # An opening that `close` has cancelled is not a fault of the bundle.
                if not self._ended.is_set():
                    refusal.log()

    def start_polling(self, poll_s: float) -> None:
        """Poll every `poll_s` seconds in a new thread, until `close`. 0 does not poll."""
        if poll_s > 0 and self._poller is None:
            self._poller = threading.Thread(
                target=self._poll_until_ended, args=(poll_s,), name="poll", daemon=True
            )
            self._poller.start()

    def close(self) -> None:
        """Stop polling. Open models stay usable."""
        self._ended.set()
        self._cancel_opening()
        if self._poller is not None:
            self._poller.join(_CLOSE_TIMEOUT_S)

    def get(self, name: str | None = None, version: str | None = None) -> Model:
        """The open model of this name and version, by default the newest. Without a name it is the
        model that reads texts.

        Raises UnknownModel for a model or a version that does not exist, and NotReady for one that
        is not open.
        """
        if name is None:
            default = self.default_text()
            return default if version is None else self.get(default.name, version)
        snapshot = self._snapshot
        for model in snapshot.models.get(name, ()):
            if version is None or model.version == version:
                return model
        raise _not_open(snapshot, name, version)

    def versions_of(self, name: str) -> tuple[Model, ...]:
        """The open versions of a model, newest first. Raises UnknownModel and NotReady, as `get`
        does.
        """
        snapshot = self._snapshot
        models = snapshot.models.get(name)
        if models is None:
            raise _not_open(snapshot, name, None)
        return models

    def default_text(self) -> Model:
        """The model for texts, if a request names none.

        1. The default model of the settings.
        2. The only model that reads texts.

        Raises InvalidField if there is neither, and NotReady if no model is open.
        """
        if self._default_model is not None:
            return self.get(self._default_model)
        newest = [models[0] for models in self._snapshot.models.values()]
        texts = [model for model in newest if model.is_text]
        if len(texts) == 1:
            return texts[0]
        if not newest:
            raise NotReady("no model is open")
        offered = ", ".join(model.name for model in texts or newest)
        if not texts:
            raise InvalidField(
                f"model is missing, and none here reads texts: /v2 serves {offered}", field="model"
            )
        raise InvalidField(
            f"model is missing, and several read texts: name one of {offered}", field="model"
        )

    def models(self) -> tuple[Model, ...]:
        """All open models, by name, newest version first."""
        return tuple(model for models in self._snapshot.models.values() for model in models)

    def index(self) -> tuple[Entry, ...]:
        """All versions in the folders or open, by name, newest first."""
        return self._snapshot.entries

    def load(self, name: str) -> None:
        """Open a model again from its folders, also after `unload`.

        Raises Forbidden if that is not allowed, and UnknownModel for a name that no bundle has.
        Raises BadRequest, with the reason, if its newest version cannot be opened. The version that
        was open stays.
        """
        self._require_control()
        with self._lock:
            if not self._open_models.restore(name):
                if name in self._snapshot.models:
                    raise BadRequest(
                        f"model {name} cannot be loaded: its folder is gone, and it stays open"
                    )
                raise _unknown(self._snapshot, name)
            for refusal in self._open_models.refresh(reload=name):
                refusal.log()
            reason = self._open_models.reason_against(name)
            if reason is not None:
                raise BadRequest(f"model {name} cannot be loaded: {reason}")

    def unload(self, name: str) -> None:
        """Close a model until it is loaded again.

        Raises Forbidden and UnknownModel, as `load` does.
        """
        self._require_control()
        with self._lock:
            if not self._open_models.withdraw(name):
                raise _unknown(self._snapshot, name)

    def _publish(self, models: Mapping[str, tuple[Model, ...]], entries: tuple[Entry, ...]) -> None:
        self._snapshot = _Snapshot(models=models, entries=entries)
        self._on_change(self.models())

    def _poll_until_ended(self, poll_s: float) -> None:
        while not self._ended.wait(seconds_until_poll(poll_s, now_s=time.time())):
            try:
                self.poll()
            except Exception:
                # The folder may be readable the next time.
                _log.exception("the bundles could not be looked at", folder=str(self._root))

    def _require_control(self) -> None:
        if not self._control:
            raise Forbidden(CONTROL_OFF)


def seconds_until_poll(poll_s: float, *, now_s: float) -> float:
    """Seconds from the time `now_s` to the next multiple of `poll_s`.

    So all processes of a server look at the same moments, and swap a model together.

    >>> seconds_until_poll(2.0, now_s=1001.5)
    0.5
    """
    return poll_s - now_s % poll_s


def _not_open(snapshot: _Snapshot, name: str, version: str | None) -> NotReady | UnknownModel:
    """The error for a version that is not open; None for any version."""
    for entry in snapshot.entries:
        if entry.name == name and version in (None, entry.version):
            return NotReady(
                f"version {entry.version} of model {name} is not open:"
                f" {entry.reason or 'it is loading'}"
            )
    if name in snapshot.models and version is not None:
        offered = ", ".join(model.version for model in snapshot.models[name])
        return UnknownModel(
            f"model {name} has no version {version[:_NAME_CHARACTERS]!r} here: there is {offered}"
        )
    return _unknown(snapshot, name)


def _unknown(snapshot: _Snapshot, name: str) -> UnknownModel:
    offered = ", ".join(snapshot.models) or "none"
    return UnknownModel(f"there is no model {name[:_NAME_CHARACTERS]!r} here: there is {offered}")
