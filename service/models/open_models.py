"""What a repository holds open, and why not the rest: one pass over the folders at a time. Knows no
threads, no HTTP.

A bundle that cannot be opened is remembered with its signature and tried again only when it has
changed; whatever it was to replace goes on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import structlog

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.errors import BundleError
from evalmode.bundle.store import version_order
from evalmode.errors import EvalmodeError
from evalmode.service.models.folders import Folder, Signature, look
from evalmode.service.models.model import Model

_log = structlog.get_logger("evalmode.service")

_KEPT = "its folder is gone; it was the last of its model and goes on"

Identity: TypeAlias = tuple[str, str]  # name, version
Outcome: TypeAlias = Literal["loaded", "unloaded", "refused"]


class Presence(StrEnum):
    """Whether a version of a model can be asked, in the words of the Open Inference Protocol's
    index.
    """

    READY = "READY"
    LOADING = "LOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of a model: whether it can be asked and, where there is something to say, why."""

    name: str
    version: str
    state: Presence
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why the bundle of a folder, with this signature, was not opened."""

    folder: Path
    signature: Signature
    error: Exception

    def log(self) -> None:
        """Say so; with a traceback where it is no fault of the bundle that we know of."""
        unexpected = None if isinstance(self.error, EvalmodeError) else self.error
        _log.error(
            "bundle refused", bundle=str(self.folder), reason=str(self.error), exc_info=unexpected
        )


@dataclass(frozen=True, kw_only=True)
class _Open:
    model: Model
    path: Path
    signature: Signature


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A folder with the identity that it goes by, and the folder of the same identity that is
    before it, if any.
    """

    identity: Identity
    folder: Folder
    behind: Path | None = None


class Listener(Protocol):
    """Who is told of a shelf; quick, and never raises."""

    def changed(self, models: Mapping[str, tuple[Model, ...]], entries: tuple[Entry, ...]) -> None:
        """Something did: these are the open models by name, newest version first, and what is said
        of all.
        """

    def swapped(self, model: str, outcome: Outcome) -> None:
        """A version of a model came, went, or was refused."""


class Shelf:
    """Call one method at a time."""

    def __init__(
        self,
        root: Path,
        *,
        open_model: Callable[[Path], Model],
        versions: int,
        listener: Listener,
    ) -> None:
        self._root = root
        self._open_model = open_model
        self._versions = versions
        self._listener = listener
        self._known: dict[Path, Folder] = {}
        self._found: list[_Found] = []
        self._open: dict[str, tuple[_Open, ...]] = {}  # newest version first
        self._refused: dict[Path, Refusal] = {}
        self._withdrawn: set[str] = set()
        self._orphans: set[str] = set()
        self._opening: Identity | None = None

    def settle(self, *, anew: str | None = None) -> list[Refusal]:
        """Make what is open be what the folders hold, the model called `anew` in any case; what was
        refused now.

        A bundle that is refused again for the same reason, as one that is still being copied, is
        not told again.
        """
        self._look()
        earlier = {path: str(refusal.error) for path, refusal in self._refused.items()}
        tried: list[Refusal] = []
        for name in sorted({found.identity[0] for found in self._found} | set(self._open)):
            if name not in self._withdrawn:
                self._settle_one(name, tried, anew=name == anew)
        self._publish()
        return [refusal for refusal in tried if earlier.get(refusal.folder) != str(refusal.error)]

    def restore(self, name: str) -> bool:
        """Take back `withdraw`, and forget what was refused of this model; False when there is no
        such bundle.
        """
        self._look()
        own = self._of(name)
        for found in own:
            self._refused.pop(found.folder.path, None)
        if own:
            self._withdrawn.discard(name)
        return bool(own)

    def withdraw(self, name: str) -> bool:
        """Let go of a model until it is restored; False when there is none."""
        self._look()
        if name not in self._open and not self._of(name):
            return False
        self._withdrawn.add(name)
        self._orphans.discard(name)
        for one in self._open.pop(name, ()):
            self._say_let_go(one.model)
        self._publish()
        return True

    def reason_against(self, name: str) -> str | None:
        """Why the newest version of a model was refused; None when it was not."""
        own = self._of(name)
        refusal = self._refused.get(own[0].folder.path) if own else None
        return None if refusal is None else self._plain(refusal.error)

    def _look(self) -> None:
        folders = look(self._root, known=self._known)
        self._known = {folder.path: folder for folder in folders}
        self._refused = {
            path: refusal for path, refusal in self._refused.items() if path in self._known
        }
        self._found = list(self._identified(folders))

    def _identified(self, folders: Sequence[Folder]) -> Iterator[_Found]:
        opened = {
            one.path: (name, one.model.version)
            for name, every in self._open.items()
            for one in every
        }
        first: dict[Identity, Path] = {}
        for folder in sorted(folders, key=lambda folder: folder.identity is None):
            # A manifest that is being written cannot be read; it goes by what was there, else by
            # what it may become.
            may_be = (folder.path.parent.name, folder.path.name)
            identity = folder.identity or opened.get(folder.path) or may_be
            path = first.setdefault(identity, folder.path)
            yield _Found(
                identity=identity, folder=folder, behind=None if path == folder.path else path
            )

    def _of(self, name: str) -> list[_Found]:
        """The folders of one model, newest version first, each version once."""
        own = [found for found in self._found if found.identity[0] == name and found.behind is None]
        return sorted(own, key=lambda found: version_order(found.identity[1]), reverse=True)

    def _settle_one(self, name: str, tried: list[Refusal], *, anew: bool) -> None:
        before = {one.model.version: one for one in self._open.get(name, ())}
        chosen: list[_Open] = []
        for found in self._of(name):
            if len(chosen) == self._versions:
                break
            one = before.get(found.identity[1])
            same = one is not None and (one.path, one.signature) == (
                found.folder.path,
                found.folder.signature,
            )
            if anew or not same:
                one = self._opened(found, tried) or one
            if one is not None:
                chosen.append(one)
        if not chosen:
            self._keep_last(name)
            return
        self._orphans.discard(name)
        self._open[name] = tuple(chosen)
        for version in before.keys() - {one.model.version for one in chosen}:
            self._say_let_go(before[version].model)
        self._publish()

    def _keep_last(self, name: str) -> None:
        """Nothing of this model is left to open: what was open of it goes on, the newest version
        alone.
        """
        if name not in self._open or name in self._orphans:
            return
        self._orphans.add(name)
        self._open[name] = self._open[name][:1]
        version = self._open[name][0].model.version
        _log.warning(
            "the folders of a model are gone: its last version goes on", model=name, version=version
        )

    def _opened(self, found: _Found, tried: list[Refusal]) -> _Open | None:
        folder = found.folder
        refusal = self._refused.get(folder.path)
        if refusal is not None and refusal.signature == folder.signature:
            return None
        self._opening = found.identity
        self._publish()
        began = time.monotonic()
        try:
            model = self._open_model(folder.path)
            if (model.name, model.version) != folder.identity:
                raise BundleError(f"{folder.path} was changed while it was opened")
        except (
            Exception
        ) as error:  # whatever it is, it is the matter of this bundle and of no other
            _let_go(error)
            tried.append(Refusal(folder=folder.path, signature=folder.signature, error=error))
            self._refused[folder.path] = tried[-1]
            self._listener.swapped(found.identity[0], "refused")
            return None
        finally:
            self._opening = None
        self._refused.pop(folder.path, None)
        _say_opened(model, seconds=time.monotonic() - began)
        self._listener.swapped(model.name, "loaded")
        return _Open(model=model, path=folder.path, signature=folder.signature)

    def _say_let_go(self, model: Model) -> None:
        _log.info("model let go", model=model.name, version=model.version)
        self._listener.swapped(model.name, "unloaded")

    def _publish(self) -> None:
        models = {name: tuple(one.model for one in self._open[name]) for name in sorted(self._open)}
        newest_first = sorted(
            self._entries(), key=lambda entry: version_order(entry.version), reverse=True
        )
        self._listener.changed(models, tuple(sorted(newest_first, key=lambda entry: entry.name)))

    def _entries(self) -> Iterator[Entry]:
        there = {found.identity for found in self._found}
        opened = {(name, one.model.version) for name, every in self._open.items() for one in every}
        for name, version in opened - there:
            yield Entry(name=name, version=version, state=Presence.READY, reason=_KEPT)
        for found in self._found:
            state, reason = self._said_of(found, opened)
            yield Entry(
                name=found.identity[0], version=found.identity[1], state=state, reason=reason
            )

    def _said_of(self, found: _Found, opened: set[Identity]) -> tuple[Presence, str]:
        refusal = self._refused.get(found.folder.path)
        reason = "" if refusal is None else self._plain(refusal.error)
        if found.behind is not None:
            return (
                Presence.UNAVAILABLE,
                f"{self._relative(found.behind)} is the same version of the same model",
            )
        if found.identity in opened:
            return (
                Presence.READY,
                reason
                and f"the one that was open goes on, for what its folder holds now: {reason}",
            )
        if found.identity == self._opening:
            return Presence.LOADING, ""
        if found.identity[0] in self._withdrawn:
            return Presence.UNAVAILABLE, "it was unloaded"
        return (
            Presence.UNAVAILABLE,
            reason or f"only the newest {self._versions} of its model are open",
        )

    def _plain(self, error: Exception) -> str:
        """The reason as a client may read it: without the server's own paths, and without what we
        did not foresee.
        """
        if not isinstance(error, EvalmodeError):
            return "it failed to open; the log says how"
        return str(error).replace(f"{self._root}/", "").replace(str(self._root), self._root.name)

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._root))


def _let_go(error: BaseException | None) -> None:
    """Free what was local where an error came from: one that is remembered would hold on to a
    model.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _say_opened(model: Model, *, seconds: float) -> None:
    certificate = model.bundle.certificate
    if certificate is None or certificate.verdict is not Verdict.PASS:
        _log.warning(
            "this bundle is not certified: nothing proves that it answers as the trained model"
            " does",
            model=model.name,
        )
    _log.info(
        "model opened",
        model=model.name,
        version=model.version,
        digest=model.digest,
        known_answers=model.replayed.verdict if model.replayed else "not replayed",
        row_counts={bucket.label: sorted(bucket.costs) for bucket in model.buckets},
        seconds=round(seconds, 3),
    )
