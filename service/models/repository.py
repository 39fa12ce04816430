"""The models below one folder, as the server uses them: found by name and version, polled, loaded
and unloaded.

The open models are published as one snapshot that is never changed, only replaced. So readers take
no lock, and a request keeps its model after the model was unloaded. No name from a request ever
becomes a path.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
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

_SHOWN_CHARACTERS = 64
CONTROL_OFF = "models are not loaded or unloaded here: the setting model_control is off"
_END_S = 5.0  # how long `close` waits for a bundle that is being opened


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """What readers see: the open models by name, newest version first, and the entries of all
    versions.
    """

    models: Mapping[str, tuple[Model, ...]] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()


class Repository:
    """The models below `root`: a bundle, a folder of versions, or a folder of such folders.

    The newest `versions` of each model are open. `open_model` opens a bundle's folder; its errors
    concern only that bundle. `control` is whether `load` and `unload` are allowed. `default_model`
    names the model that answers texts where a request names none. `on_change` gets the models that
    are open now, `on_swap` the name of a model of which a version was loaded, unloaded or refused.
    Both must be quick and never raise. `after_opening` is called after each look at the folders,
    and `cancel_opening` by `close`, while a bundle may be open only in part.
    """

    def __init__(
        self,
        root: Path,
        *,
        open_model: Callable[[Path], Model],
        versions: int = 1,
        control: bool = True,
        default_model: str | None = None,
        on_change: Callable[[Iterable[Model]], None] = lambda models: None,
        on_swap: Callable[[str, Outcome], None] = lambda model, outcome: None,
        after_opening: Callable[[], None] = lambda: None,
        cancel_opening: Callable[[], None] = lambda: None,
    ) -> None:
        self._root = root
        self._cancel_opening = cancel_opening
        self._control = control
        self._default_model = default_model
        self._on_change = on_change
        self._snapshot = _Snapshot()
        # Held during every call to `_open_models`, which may open bundles; readers never take it.
        self._lock = threading.Lock()
        self._open_models = OpenModels(
            root,
            open_model=open_model,
            versions=versions,
            publish=self._publish,
            on_swap=on_swap,
            after_opening=after_opening,
        )
        self._ended = threading.Event()
        self._poller: threading.Thread | None = None

    def start(self) -> None:
        """Open the models; an older good version replaces a bad one.

        Raises the error of the first bundle when none can be opened. Raises StartFailed when the
        folder cannot be read, or the default model is not among those that were opened.
        """
        with self._lock:
            try:
                refusals = self._open_models.refresh()
            except OSError as error:  # of the root itself; a bundle's error is its refusal
                raise StartFailed(
                    f"the bundles at {self._root} cannot be looked at: {error.strerror}"
                ) from error
            if not self._snapshot.models:
                if refusals:
                    raise refusals[0].error
                raise BundleError(no_bundle_at(self._root))
            for refusal in refusals:
                refusal.log()
        if self._default_model is not None and self._default_model not in self._snapshot.models:
            raise StartFailed(
                f"setting default_model is {self._default_model!r} and no such model could be"
                f" opened: there is {', '.join(self._snapshot.models)}"
            )

    def poll(self) -> None:
        """Look at the folder once, and open and close what has changed."""
        with self._lock:
            for refusal in self._open_models.refresh():
                if not self._ended.is_set():  # an opening that `close` has cancelled is no news
                    refusal.log()

    def start_polling(self, poll_s: float) -> None:
        """Poll every `poll_s` seconds in a thread of its own until `close`; 0: never."""
        if poll_s > 0 and self._poller is None:
            self._poller = threading.Thread(
                target=self._poll_until_ended, args=(poll_s,), name="poll", daemon=True
            )
            self._poller.start()

    def close(self) -> None:
        """Stop polling. Open models stay open for their holders."""
        self._ended.set()
        self._cancel_opening()
        if self._poller is not None:
            self._poller.join(_END_S)

    def get(self, name: str | None = None, version: str | None = None) -> Model:
        """The open model of this name and version, by default the newest; without a name the model
        that reads texts.

        Raises UnknownModel for one that does not exist, and NotReady for one that is not open.
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
        if models := snapshot.models.get(name):
            return models
        raise _not_open(snapshot, name, None)

    def default_text(self) -> Model:
        """The model that answers texts when the request names none. Raises InvalidField when it
        must name one.
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
        """Every open model, by name, its newest version first."""
        return tuple(model for models in self._snapshot.models.values() for model in models)

    def index(self) -> tuple[Entry, ...]:
        """Every version in the folders or open, by name, the newest first."""
        return self._snapshot.entries

    def load(self, name: str) -> None:
        """Open a model again from its folders, also after `unload`.

        Raises Forbidden where that is not allowed, and UnknownModel for a name that no bundle has.
        Raises BadRequest, with the reason, when its newest version cannot be opened: the version
        that was open stays.
        """
        self._require_control()
        with self._lock:
            if not self._open_models.restore(name):
                if name in self._snapshot.models:
                    raise BadRequest(
                        f"model {name} cannot be loaded: its folder is gone; what was open goes on"
                    )
                raise _unknown(self._snapshot, name)
            refusals = self._open_models.refresh(reload=name)
            for refusal in refusals:
                refusal.log()
            if reason := self._open_models.reason_against(name):
                raise BadRequest(f"model {name} cannot be loaded: {reason}")

    def unload(self, name: str) -> None:
        """Release a model until it is loaded again. Raises Forbidden and UnknownModel, as `load`
        does.
        """
        self._require_control()
        with self._lock:
            if not self._open_models.withdraw(name):
                raise _unknown(self._snapshot, name)

    def _publish(self, models: Mapping[str, tuple[Model, ...]], entries: tuple[Entry, ...]) -> None:
        self._snapshot = _Snapshot(models=models, entries=entries)
        self._on_change(self.models())

    def _poll_until_ended(self, poll_s: float) -> None:
        while not self._ended.wait(poll_s):
            try:
                self.poll()
            except Exception:  # the folder may be readable the next time
                _log.exception("the bundles could not be looked at", folder=str(self._root))

    def _require_control(self) -> None:
        if not self._control:
            raise Forbidden(CONTROL_OFF)


def _not_open(snapshot: _Snapshot, name: str, version: str | None) -> NotReady | UnknownModel:
    for entry in snapshot.entries:
        if entry.name == name and version in (None, entry.version):
            return NotReady(
                f"version {entry.version} of model {name} is not open:"
                f" {entry.reason or 'it is loading'}"
            )
    if name in snapshot.models and version is not None:
        offered = ", ".join(model.version for model in snapshot.models[name])
        return UnknownModel(
            f"model {name} has no version {version[:_SHOWN_CHARACTERS]!r} here: there is {offered}"
        )
    return _unknown(snapshot, name)


def _unknown(snapshot: _Snapshot, name: str) -> UnknownModel:
    offered = ", ".join(snapshot.models) or "none"
    return UnknownModel(f"there is no model {name[:_SHOWN_CHARACTERS]!r} here: there is {offered}")
