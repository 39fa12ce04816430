"""Which versions of the models are open, and why the others are not.

One pass over the folders, `OpenModels.refresh`, decides for each model:

1. A version that was unloaded by request stays closed until it is loaded.
2. Of the other versions the newest ones are open, at most the number in the settings.
3. If several folders hold one version, the first one that can be opened is served.
4. A bundle that cannot be opened is refused. It is tried again only when its files have changed, or
   when the model is loaded by request. The version that was open stays.
5. If no folder of a model can be opened, its newest open version stays.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
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
from evalmode.service.models.folders import FilesSignature, Folder, find_folders
from evalmode.service.models.model import Model

_log = structlog.get_logger("evalmode.service")

# After these seconds the log says that a bundle is still being opened.
_SLOW_S = 5.0

Identity: TypeAlias = tuple[str, str]  # name, version
Outcome: TypeAlias = Literal["loaded", "unloaded", "refused"]


class Presence(StrEnum):
    """Whether a version of a model can be used, as the Open Inference Protocol's index names it."""

    READY = "READY"
    LOADING = "LOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of a model: whether it can be used and, if there is something to say, why."""

    name: str
    version: str
    state: Presence
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The error of opening the bundle of a folder, with the signature of its files."""

    folder: Path
    signature: FilesSignature
    error: Exception

    def log(self) -> None:
        """Log the refusal, with a traceback if the error is not a known fault of bundles."""
        unexpected = None if isinstance(self.error, EvalmodeError) else self.error
        _log.error(
            "bundle refused", bundle=str(self.folder), reason=str(self.error), exc_info=unexpected
        )


@dataclass(frozen=True, kw_only=True)
class _OpenVersion:
    """A version that is open, the folder it was opened from, and the signature of its files."""

    model: Model
    path: Path
    signature: FilesSignature


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A folder that may be opened, and the version that it is taken for."""

    identity: Identity
    folder: Folder


class OpenModels:
    """The open versions of all models below `root`, at most the newest `versions` of each.

    - `open_model` opens a bundle's folder. Its errors refuse only that bundle.
    - `unloaded` are the models that stay closed until they are restored.
    - `publish` is called at each change, with the open models by name, newest version first, and
      the entries of all versions.
    - `on_swap` is called when a version of a model was loaded, unloaded or refused.
    - `after_opening` is called when a pass has opened what it could.

    Calls must not overlap.
    """

    def __init__(
        self,
        root: Path,
        *,
        open_model: Callable[[Path], Model],
        versions: int,
        unloaded: Collection[str],
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
        # The folders of the last look, by path.
        self._folders: dict[Path, Folder] = {}
        self._candidates: list[_Candidate] = []
        # The open versions of each model, newest first.
        self._open: dict[str, tuple[_OpenVersion, ...]] = {}
        # The bundles that could not be opened, by path, in the order in which they were tried.
        self._refusals: dict[Path, Refusal] = {}
        # The models that were unloaded by request.
        self._withdrawn: set[str] = set(unloaded)
        # The models that are open although none of their folders can be opened.
        self._orphans: set[str] = set()
        # The folders that are not served because another one holds the same version: that one.
        self._duplicates: dict[Path, Path] = {}
        # The folder that is being opened now.
        self._opening: Path | None = None

    def refresh(self, *, reload: str | None = None) -> list[Refusal]:
        """Open and close models until they match the folders; return the new refusals.

        The model `reload` is opened again even if its files have not changed. A bundle that is
        refused again for the same reason, for example while it is being copied, is not a new
        refusal.
        """
        self._scan()
        earlier_reasons = {path: str(refusal.error) for path, refusal in self._refusals.items()}
        names = {candidate.identity[0] for candidate in self._candidates} | set(self._open)
        try:
            for name in sorted(names - self._withdrawn):
                self._refresh_model(name, reload=name == reload)
        finally:
            self._after_opening()
        self._log_duplicates()
        self._publish()
        return [
            refusal
            for path, refusal in self._refusals.items()
            if earlier_reasons.get(path) != str(refusal.error)
        ]

    def restore(self, name: str) -> bool:
        """Undo `withdraw`, and forget the refusals of this model. False if no folder holds it."""
        self._scan()
        candidates = self._candidates_of(name)
        for candidate in candidates:
            self._refusals.pop(candidate.folder.path, None)
        if candidates:
            self._withdrawn.discard(name)
        return bool(candidates)

    def withdraw(self, name: str) -> bool:
        """Close a model until it is restored. False if there is no such model."""
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
        """Why no folder of the newest version of a model can be opened; None if one can."""
        candidates = self._candidates_of(name)
        refusals = []
        for candidate in candidates:
            if candidate.identity == candidates[0].identity:
                refusal = self._refusals.get(candidate.folder.path)
                if refusal is None:
                    return None
                refusals.append(refusal)
        return self._public_reason(refusals[0].error) if refusals else None

    def _scan(self) -> None:
        """Look at the folders, and decide which version each is taken for."""
        folders = find_folders(self._root, earlier=self._folders)
        self._folders = {folder.path: folder for folder in folders}
        self._refusals = {
            path: refusal for path, refusal in self._refusals.items() if path in self._folders
        }
        open_identities: dict[Path, Identity] = {}
        for name, versions in self._open.items():
            for version in versions:
                open_identities[version.path] = (name, version.model.version)
        self._candidates = []
        # Folders without a readable manifest come last: they must not precede a good bundle.
        for folder in sorted(folders, key=lambda folder: folder.identity is None):
            # A manifest that is being written cannot be read. Its folder is taken for the version
            # that is open from it, or else for the one that its path suggests.
            identity = folder.identity or open_identities.get(folder.path)
            if identity is None:
                identity = (folder.path.parent.name, folder.path.name)
            self._candidates.append(_Candidate(identity=identity, folder=folder))

    def _candidates_of(self, name: str) -> list[_Candidate]:
        """The folders of one model, newest version first; those of one version by precedence."""
        return sorted(
            (candidate for candidate in self._candidates if candidate.identity[0] == name),
            key=lambda candidate: version_order(candidate.identity[1]),
            # This keeps the order of candidates of one version.
            reverse=True,
        )

    def _refresh_model(self, name: str, *, reload: bool) -> None:
        """Open the newest versions of a model, and close those that are no longer among them."""
        before = {version.model.version: version for version in self._open.get(name, ())}
        after: list[_OpenVersion] = []
        by_version = groupby(self._candidates_of(name), key=lambda candidate: candidate.identity[1])
        for number, candidates in by_version:
            if len(after) == self._max_versions:
                break
            open_version = before.get(number)
            new_version = None
            for candidate in candidates:
                folder = candidate.folder
                is_unchanged = (
                    open_version is not None
                    and open_version.path == folder.path
                    and open_version.signature == folder.signature
                )
                if is_unchanged and not reload:
                    new_version = open_version
                else:
                    new_version = self._try_open(candidate)
                if new_version is not None:
                    break
            # If none of its folders can be opened, the version that was open stays.
            if new_version is None:
                new_version = open_version
            if new_version is not None:
                after.append(new_version)

        if after:
            self._orphans.discard(name)
            self._open[name] = tuple(after)
            for number in before.keys() - {version.model.version for version in after}:
                self._report_unloaded(before[number].model)
            self._publish()
        elif name in self._open and name not in self._orphans:
            # No folder of the model can be opened: the newest open version stays, without the
            # others.
            self._orphans.add(name)
            self._open[name] = self._open[name][:1]
            _log.warning(
                "the folders of a model are gone: its last version goes on",
                model=name,
                version=self._open[name][0].model.version,
            )

    def _try_open(self, candidate: _Candidate) -> _OpenVersion | None:
        """Open a folder. None if it is refused, or if it was and its files have not changed."""
        folder = candidate.folder
        refusal = self._refusals.get(folder.path)
        if refusal is not None and refusal.signature == folder.signature:
            return None

        self._opening = folder.path
        self._publish()
        began = time.monotonic()
        timer = threading.Timer(_SLOW_S, _log_slow, args=(candidate,))
        timer.daemon = True
        timer.start()
        try:
            model = self._open_model(folder.path)
            if (model.name, model.version) != folder.identity:
                raise BundleError(f"{folder.path} was changed while it was opened")
        except Exception as error:
            # Any error at all: it concerns this bundle and no other.
            _release_frames(error)
            # Removed first, so that the newest refusal is the last one.
            self._refusals.pop(folder.path, None)
            self._refusals[folder.path] = Refusal(
                folder=folder.path, signature=folder.signature, error=error
            )
            self._on_swap(candidate.identity[0], "refused")
            return None
        finally:
            timer.cancel()
            self._opening = None
        self._refusals.pop(folder.path, None)
        _log_opened(model, folder.path, seconds=time.monotonic() - began)
        self._on_swap(model.name, "loaded")
        return _OpenVersion(model=model, path=folder.path, signature=folder.signature)

    def _report_unloaded(self, model: Model) -> None:
        _log.info("model let go", model=model.name, version=model.version)
        self._on_swap(model.name, "unloaded")

    def _log_duplicates(self) -> None:
        """Log each folder that is not served because another one holds the same version, once."""
        duplicates: dict[Path, Path] = {}
        for candidate in self._candidates:
            folder = candidate.folder.path
            served = self._served_instead_of(candidate)
            # A refusal has already said why the folder is not served.
            if served is None or folder in self._refusals:
                continue
            duplicates[folder] = served
            if self._duplicates.get(folder) != served:
                _log.warning(
                    "a bundle is not served: another folder holds the same version of the same"
                    " model",
                    bundle=str(folder),
                    served=str(served),
                )
        self._duplicates = duplicates

    def _served_instead_of(self, candidate: _Candidate) -> Path | None:
        """The other folder from which this version is open; None if there is none, or if that
        folder is gone or holds another version now.
        """
        name, number = candidate.identity
        for version in self._open.get(name, ()):
            if version.model.version == number and version.path != candidate.folder.path:
                folder = self._folders.get(version.path)
                if folder is None or folder.identity not in (None, candidate.identity):
                    return None
                return version.path
        return None

    def _publish(self) -> None:
        """Publish the open models, and the entries of all versions: by name, newest first."""
        models: dict[str, tuple[Model, ...]] = {}
        open_identities: set[Identity] = set()
        for name in sorted(self._open):
            models[name] = tuple(version.model for version in self._open[name])
            open_identities.update((name, model.version) for model in models[name])

        entries: list[Entry] = []
        for name, version in open_identities - {each.identity for each in self._candidates}:
            reason = "its folder is gone; it stays open as the last version of its model"
            entries.append(Entry(name=name, version=version, state=Presence.READY, reason=reason))
        for candidate in self._candidates:
            name, version = candidate.identity
            state, reason = self._presence_of(candidate, open_identities)
            entries.append(Entry(name=name, version=version, state=state, reason=reason))
        # Sorting by name keeps the order of the versions of one name.
        entries.sort(key=lambda entry: version_order(entry.version), reverse=True)
        entries.sort(key=lambda entry: entry.name)
        self._publish_snapshot(models, tuple(entries))

    def _presence_of(
        self, candidate: _Candidate, open_identities: set[Identity]
    ) -> tuple[Presence, str]:
        """Whether the bundle of a folder can be used, and the reason for clients.

        1. Another folder of the same version is served.
        2. Its version is open. If its files were refused since, they are not those that are open.
        3. It is being opened.
        4. Its model was unloaded by request.
        5. It was refused.
        6. Newer versions are open.
        """
        refusal = self._refusals.get(candidate.folder.path)
        refusal_reason = "" if refusal is None else self._public_reason(refusal.error)
        served = self._served_instead_of(candidate)
        if served is not None:
            path = served.relative_to(self._root)
            reason = refusal_reason or f"{path} is the same version of the same model"
            return Presence.UNAVAILABLE, reason
        if candidate.identity in open_identities:
            if refusal_reason:
                return Presence.READY, (
                    "the bundle that was open stays open, and the one in its folder is refused:"
                    f" {refusal_reason}"
                )
            return Presence.READY, ""
        if candidate.folder.path == self._opening:
            return Presence.LOADING, ""
        if candidate.identity[0] in self._withdrawn:
            return Presence.UNAVAILABLE, "it was unloaded"
        if refusal_reason:
            return Presence.UNAVAILABLE, refusal_reason
        return (
            Presence.UNAVAILABLE,
            f"only the newest {self._max_versions} of its model are open",
        )

    def _public_reason(self, error: Exception) -> str:
        """The reason for clients, without the server's paths and the text of unexpected errors."""
        if not isinstance(error, EvalmodeError):
            return "it failed to open: the server's log has the error"
        return str(error).replace(f"{self._root}/", "").replace(str(self._root), self._root.name)


def _release_frames(error: BaseException | None) -> None:
    """Clear the local variables of the frames in an error's traceback: a refusal is remembered, and
    they would keep a model alive.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _log_slow(candidate: _Candidate) -> None:
    name, version = candidate.identity
    _log.warning(
        "opening a bundle takes long: until it has ended no other bundle is opened",
        model=name,
        version=version,
        bundle=str(candidate.folder.path),
        seconds=_SLOW_S,
    )


def _log_opened(model: Model, path: Path, *, seconds: float) -> None:
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
