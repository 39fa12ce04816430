"""Which versions of the models are open, and why the others are not: one pass over the folders at
a time.

A bundle that cannot be opened is remembered with its files' signature and tried again only when
that has changed. The version that it would have replaced stays open.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

import structlog

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.errors import BundleError
from evalmode.bundle.store import version_order
from evalmode.errors import EvalmodeError
from evalmode.service.models.folders import FilesSignature, Folder, look
from evalmode.service.models.model import Model

_log = structlog.get_logger("evalmode.service")

_PATIENCE_S = 5.0  # after which the log says that a bundle is still being opened
_FOLDER_GONE = "its folder is gone; it was the last of its model and goes on"

Identity: TypeAlias = tuple[str, str]  # name, version
Outcome: TypeAlias = Literal["loaded", "unloaded", "refused"]


class Presence(StrEnum):
    """Whether a version of a model can be used, in the words of the Open Inference Protocol's
    index.
    """

    READY = "READY"
    LOADING = "LOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of a model: whether it can be used and, if there is a reason to give, why."""

    name: str
    version: str
    state: Presence
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why the bundle of a folder, with files of this signature, was not opened."""

    folder: Path
    signature: FilesSignature
    error: Exception

    def log(self) -> None:
        """Log the refusal, with a traceback where the error is not a known fault of bundles."""
        unexpected = None if isinstance(self.error, EvalmodeError) else self.error
        _log.error(
            "bundle refused", bundle=str(self.folder), reason=str(self.error), exc_info=unexpected
        )


@dataclass(frozen=True, kw_only=True)
class _OpenVersion:
    model: Model
    path: Path
    signature: FilesSignature


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A folder with its identity. Several folders may have one identity: the first that can be
    opened is served.
    """

    identity: Identity
    folder: Folder


class OpenModels:
    """The open versions of every model below `root`, at most the newest `versions` of each.

    `publish` gets the open models by name, newest version first, and the entries of all versions,
    at every change. `on_swap` is called when a version of a model was loaded, unloaded or refused.
    `after_opening` is called when a look at the folders has opened what it could. Calls must not
    overlap.
    """

    def __init__(
        self,
        root: Path,
        *,
        open_model: Callable[[Path], Model],
        versions: int,
        publish: Callable[[Mapping[str, tuple[Model, ...]], tuple[Entry, ...]], None],
        on_swap: Callable[[str, Outcome], None],
        after_opening: Callable[[], None],
    ) -> None:
        self._root = root
        self._open_model = open_model
        self._after_opening = after_opening
        self._max_versions = versions
        self._publish_snapshot = publish
        self._on_swap = on_swap
        self._folders: dict[Path, Folder] = {}
        self._candidates: list[_Candidate] = []
        self._open: dict[str, tuple[_OpenVersion, ...]] = {}  # newest version first
        self._refusals: dict[Path, Refusal] = {}
        self._withdrawn: set[str] = set()
        self._orphans: set[str] = set()
        self._passed_over: dict[Path, Path] = {}  # a folder, and the one that is served instead
        self._opening: Path | None = None

    def refresh(self, *, reload: str | None = None) -> list[Refusal]:
        """Open and close models until they match the folders; the new refusals.

        The model `reload` is opened again even if its files have not changed. A bundle that is
        refused again for the same reason, as while it is still being copied, is not a new refusal.
        """
        self._scan()
        earlier = {path: str(refusal.error) for path, refusal in self._refusals.items()}
        refusals: list[Refusal] = []
        names = {candidate.identity[0] for candidate in self._candidates} | set(self._open)
        try:
            for name in sorted(names):
                if name not in self._withdrawn:
                    self._refresh_model(name, refusals, reload=name == reload)
        finally:
            self._after_opening()
        self._report_passed_over()
        self._publish()
        return [
            refusal for refusal in refusals if earlier.get(refusal.folder) != str(refusal.error)
        ]

    def restore(self, name: str) -> bool:
        """Undo `withdraw`, and forget the refusals of this model; False when there is no such
        bundle.
        """
        self._scan()
        candidates = self._candidates_of(name)
        for candidate in candidates:
            self._refusals.pop(candidate.folder.path, None)
        if candidates:
            self._withdrawn.discard(name)
        return bool(candidates)

    def withdraw(self, name: str) -> bool:
        """Release a model until it is restored; False when there is no such model."""
        self._scan()
        if name not in self._open and not self._candidates_of(name):
            return False
        self._withdrawn.add(name)
        self._orphans.discard(name)
        for version in self._open.pop(name, ()):
            self._report_unloaded(version.model)
        self._publish()
        return True

    def reason_against(self, name: str) -> str | None:
        """Why no folder of the newest version of a model can be opened; None when one can."""
        candidates = self._candidates_of(name)
        refusals = [
            self._refusals.get(candidate.folder.path)
            for candidate in candidates
            if candidate.identity == candidates[0].identity
        ]
        if not refusals or refusals[0] is None or None in refusals:
            return None
        return self._public_reason(refusals[0].error)

    def _scan(self) -> None:
        folders = look(self._root, known=self._folders)
        self._folders = {folder.path: folder for folder in folders}
        self._refusals = {
            path: refusal for path, refusal in self._refusals.items() if path in self._folders
        }
        self._candidates = list(self._identified(folders))

    def _identified(self, folders: Sequence[Folder]) -> Iterator[_Candidate]:
        open_identities = {
            version.path: (name, version.model.version)
            for name, versions in self._open.items()
            for version in versions
        }
        for folder in sorted(folders, key=lambda folder: folder.identity is None):
            # A manifest that is being written cannot be read. Its folder keeps the identity that is
            # open from it, else it gets the one that its path suggests.
            by_path = (folder.path.parent.name, folder.path.name)
            identity = folder.identity or open_identities.get(folder.path) or by_path
            yield _Candidate(identity=identity, folder=folder)

    def _candidates_of(self, name: str) -> list[_Candidate]:
        """The folders of one model, newest version first; those of one version by precedence."""
        return sorted(
            (candidate for candidate in self._candidates if candidate.identity[0] == name),
            key=lambda candidate: version_order(candidate.identity[1]),
            reverse=True,  # which keeps the order of equals
        )

    def _refresh_model(self, name: str, refusals: list[Refusal], *, reload: bool) -> None:
        before = {version.model.version: version for version in self._open.get(name, ())}
        after: list[_OpenVersion] = []
        by_version = groupby(self._candidates_of(name), key=lambda candidate: candidate.identity[1])
        for number, candidates in by_version:
            if len(after) == self._max_versions:
                break
            opened = before.get(number)
            version = None
            for candidate in candidates:
                folder = candidate.folder
                unchanged = opened is not None and (opened.path, opened.signature) == (
                    folder.path,
                    folder.signature,
                )
                keep = unchanged and not reload
                version = opened if keep else self._try_open(candidate, refusals)
                if version is not None:
                    break
            # Where none of its folders can be opened, what was open goes on.
            if (version := version or opened) is not None:
                after.append(version)
        if not after:
            self._keep_last(name)
            return
        self._orphans.discard(name)
        self._open[name] = tuple(after)
        for number in before.keys() - {version.model.version for version in after}:
            self._report_unloaded(before[number].model)
        self._publish()

    def _report_passed_over(self) -> None:
        """Log each folder that is not served because another one holds the same version, once."""
        passed_over = {
            candidate.folder.path: path
            for candidate in self._candidates
            if (path := self._served_instead_of(candidate)) is not None
            and candidate.folder.path not in self._refusals
        }
        for folder, path in passed_over.items():
            if self._passed_over.get(folder) != path:
                _log.warning(
                    "a bundle is not served: another folder holds the same version of the same"
                    " model",
                    bundle=str(folder),
                    served=str(path),
                )
        self._passed_over = passed_over

    def _served_instead_of(self, candidate: _Candidate) -> Path | None:
        """The other folder from which the version of this one is open, if it is still there."""
        name, number = candidate.identity
        for version in self._open.get(name, ()):
            if version.model.version == number and version.path != candidate.folder.path:
                folder = self._folders.get(version.path)
                same = folder is not None and folder.identity in (None, candidate.identity)
                return version.path if same else None
        return None

    def _keep_last(self, name: str) -> None:
        """No folder of this model can be opened: the newest open version stays, without the
        others.
        """
        if name not in self._open or name in self._orphans:
            return
        self._orphans.add(name)
        self._open[name] = self._open[name][:1]
        version = self._open[name][0].model.version
        _log.warning(
            "the folders of a model are gone: its last version goes on", model=name, version=version
        )

    def _try_open(self, candidate: _Candidate, refusals: list[Refusal]) -> _OpenVersion | None:
        folder = candidate.folder
        refusal = self._refusals.get(folder.path)
        if refusal is not None and refusal.signature == folder.signature:
            return None
        self._opening = folder.path
        self._publish()
        began = time.monotonic()
        patience = threading.Timer(_PATIENCE_S, _report_slow, args=(candidate,))
        patience.daemon = True
        patience.start()
        try:
            model = self._open_model(folder.path)
            if (model.name, model.version) != folder.identity:
                raise BundleError(f"{folder.path} was changed while it was opened")
        except Exception as error:  # of any kind: it concerns this bundle and no other
            _release_frames(error)
            refusals.append(Refusal(folder=folder.path, signature=folder.signature, error=error))
            self._refusals[folder.path] = refusals[-1]
            self._on_swap(candidate.identity[0], "refused")
            return None
        finally:
            patience.cancel()
            self._opening = None
        self._refusals.pop(folder.path, None)
        _report_opened(model, folder.path, seconds=time.monotonic() - began)
        self._on_swap(model.name, "loaded")
        return _OpenVersion(model=model, path=folder.path, signature=folder.signature)

    def _report_unloaded(self, model: Model) -> None:
        _log.info("model let go", model=model.name, version=model.version)
        self._on_swap(model.name, "unloaded")

    def _publish(self) -> None:
        models = {
            name: tuple(version.model for version in self._open[name])
            for name in sorted(self._open)
        }
        newest_first = sorted(
            self._entries(), key=lambda entry: version_order(entry.version), reverse=True
        )
        self._publish_snapshot(models, tuple(sorted(newest_first, key=lambda entry: entry.name)))

    def _entries(self) -> Iterator[Entry]:
        candidate_identities = {candidate.identity for candidate in self._candidates}
        open_identities = {
            (name, version.model.version)
            for name, versions in self._open.items()
            for version in versions
        }
        for name, version in open_identities - candidate_identities:
            yield Entry(name=name, version=version, state=Presence.READY, reason=_FOLDER_GONE)
        for candidate in self._candidates:
            name, version = candidate.identity
            state, reason = self._presence_of(candidate, open_identities)
            yield Entry(name=name, version=version, state=state, reason=reason)

    def _presence_of(
        self, candidate: _Candidate, open_identities: set[Identity]
    ) -> tuple[Presence, str]:
        refusal = self._refusals.get(candidate.folder.path)
        reason = "" if refusal is None else self._public_reason(refusal.error)
        if (served := self._served_instead_of(candidate)) is not None:
            path = served.relative_to(self._root)
            return (
                Presence.UNAVAILABLE,
                reason or f"{path} is the same version of the same model",
            )
        if candidate.identity in open_identities:
            if reason:
                reason = f"the one that was open goes on, for what its folder holds now: {reason}"
            return Presence.READY, reason
        if candidate.folder.path == self._opening:
            return Presence.LOADING, ""
        if candidate.identity[0] in self._withdrawn:
            return Presence.UNAVAILABLE, "it was unloaded"
        return (
            Presence.UNAVAILABLE,
            reason or f"only the newest {self._max_versions} of its model are open",
        )

    def _public_reason(self, error: Exception) -> str:
        """The reason for clients: without the server's own paths, and without the text of
        unexpected errors.
        """
        if not isinstance(error, EvalmodeError):
            return "it failed to open; the log says how"
        return str(error).replace(f"{self._root}/", "").replace(str(self._root), self._root.name)


def _release_frames(error: BaseException | None) -> None:
    """Free the local variables of the frames that an error came through: an error that is
    remembered would keep a model alive.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _report_slow(candidate: _Candidate) -> None:
    name, version = candidate.identity
    _log.warning(
        "opening a bundle takes long: until it has ended no other bundle is opened",
        model=name,
        version=version,
        bundle=str(candidate.folder.path),
        seconds=_PATIENCE_S,
    )


def _report_opened(model: Model, path: Path, *, seconds: float) -> None:
    certificate = model.bundle.certificate
    if certificate is None or certificate.verdict is not Verdict.PASS:
        _log.warning(
            "this bundle is not certified: nothing proves that it answers as the trained model"
            " does",
            model=model.name,
        )
    if model.graph_fault is not None:
        _log.warning(
            "this bundle is served although its graph can draw or train",
            model=model.name,
            reason=model.graph_fault,
        )
    _log.info(
        "model opened",
        model=model.name,
        version=model.version,
        digest=model.digest,
        bundle=str(path),
        known_answers=str(model.replayed or "not replayed"),
        row_counts={bucket.label: sorted(bucket.costs) for bucket in model.buckets},
        seconds=round(seconds, 3),
    )
