"""Bundles on disk: written whole or not at all, opened only when every byte is the certified one.

A bundle is the folder `ROOT/NAME/VERSION/`. Its digest is the sha256 of `manifest.json`, which
lists the sha256 of every other file; `certificate.json` names that digest and seals itself.
`sha256sum manifest.json` shows the digest.

Knows neither ONNX nor HTTP.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from evalmode.atomic_files import write_folder
from evalmode.bundle.certificate import Certificate, Verdict
from evalmode.bundle.errors import (
    BundleCorrupt,
    BundleError,
    BundleNotCertified,
    FileUnreadable,
)
from evalmode.bundle.frontend import TOKENIZER_FILE, FrontEnd, open_frontend
from evalmode.bundle.known_answers import KnownAnswer, unpack
from evalmode.bundle.manifest import (
    CERTIFICATE_FILE,
    KNOWN_ANSWERS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    Frozen,
    Manifest,
)
from evalmode.regular_files import NotRegular, open_regular

Parsed = TypeVar("Parsed", bound=Frozen)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle. Its contents are the bytes that were checked, not whatever the folder holds
    later.
    """

    path: Path
    digest: str
    manifest: Manifest
    certificate: Certificate | None
    contents: Mapping[str, bytes]

    @property
    def model(self) -> bytes:
        """The ONNX file."""
        return self.contents[MODEL_FILE]

    def frontend(self) -> FrontEnd | None:
        """The front end that turns texts into the model's ids, or None for a model that takes
        tensors alone.
        """
        if self.manifest.frontend is None:
            return None
        tokenizer = self.contents.get(TOKENIZER_FILE)
        return open_frontend(
            self.manifest.frontend, None if tokenizer is None else tokenizer.decode()
        )

    def known_answers(self) -> tuple[KnownAnswer, ...]:
        """The inputs with their expected outputs; none for a bundle that carries none."""
        file = self.contents.get(KNOWN_ANSWERS_FILE)
        return () if file is None else unpack(file)


def digest_of(manifest: Manifest) -> str:
    """The digest of the bundle with this manifest."""
    return hashlib.sha256(manifest.canonical()).hexdigest()


def hashes_of(contents: Mapping[str, bytes]) -> dict[str, str]:
    """The `files` of a manifest: the sha256 of each, in the order of their paths."""
    return {path: hashlib.sha256(contents[path]).hexdigest() for path in sorted(contents)}


def write_bundle(
    root: Path, *, manifest: Manifest, certificate: Certificate, contents: Mapping[str, bytes]
) -> Bundle:
    """Seal the certificate, write `root/NAME/VERSION` whole or not at all, and return the bundle.

    Raises BundleNotCertified for a certificate that did not pass, and BundleError when another
    bundle is there. The same bundle being there already is a success.
    """
    assert manifest.files == hashes_of(contents), "a manifest lists its contents"
    assert certificate.digest == digest_of(manifest), "a certificate names the bundle it certifies"
    if certificate.verdict is not Verdict.PASS:
        raise BundleNotCertified(
            f"{manifest.name}/{manifest.version} is not written: its certificate says"
            f" {certificate.verdict}"
        )
    sealed = certificate.sealed()
    bundle = Bundle(
        path=root / manifest.name / manifest.version,
        digest=sealed.digest,
        manifest=manifest,
        certificate=sealed,
        contents=contents,
    )
    if bundle.path.exists():
        _require_same(bundle)
        return bundle
    files = {
        **contents,
        MANIFEST_FILE: manifest.canonical(),
        CERTIFICATE_FILE: sealed.canonical(),
    }
    try:
        write_folder(bundle.path, files)
    except OSError as error:
        raise BundleError(f"{bundle.path} cannot be written: {error}") from error
    return bundle


def open_bundle(path: Path, *, allow_uncertified: bool = False) -> Bundle:
    """Open the bundle folder `path` and check every byte of it.

    Raises BundleCorrupt, naming the file, when one is missing, changed, not listed or not readable,
    and BundleNotCertified when the certificate is absent or did not pass (`allow_uncertified` lets
    these two by; a changed byte is never let by).
    """
    if not path.is_dir():
        raise BundleError(
            f"{path} is not a bundle: a bundle is a folder NAME/VERSION that `evalmode export`"
            " writes"
        )
    certificate = _certificate(path, allow_uncertified=allow_uncertified)
    raw = read_file(path / MANIFEST_FILE)
    digest = hashlib.sha256(raw).hexdigest()
    if certificate is not None and certificate.digest != digest:
        raise BundleCorrupt(
            f"{path / MANIFEST_FILE} is not the certified one: it was changed after the export"
        )
    manifest = _parse(Manifest, raw, path / MANIFEST_FILE)
    contents = {name: _checked(path, name, sha256) for name, sha256 in manifest.files.items()}
    _no_strangers(path, {*contents, MANIFEST_FILE, CERTIFICATE_FILE})
    return Bundle(
        path=path, digest=digest, manifest=manifest, certificate=certificate, contents=contents
    )


def find_bundle(path: Path) -> Path:
    """The bundle folder that `path` means: itself, or the newest version below a folder of versions
    or of one name.

    Versions are ordered as people read them: 9 before 10, 1.9 before 1.10, 2.0-rc1 before 2.0.
    Raises BundleError when there is none, or several names.
    """
    if is_bundle(path):
        return path
    folders = sorted(
        manifest.parent
        for pattern in ("*", "*/*")
        for manifest in path.glob(f"{pattern}/{MANIFEST_FILE}")
    )
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    if not folders:
        raise BundleError(no_bundle_at(path))
    names = sorted({folder.parent for folder in folders})
    if len(names) > 1:
        raise BundleError(f"{path} holds several bundles, name one: {', '.join(map(str, names))}")
    return max(folders, key=lambda folder: version_order(folder.name))


def is_bundle(path: Path) -> bool:
    """Whether the folder `path` is meant as a bundle: it has an entry `manifest.json`, of any kind.

    A manifest that is a FIFO or a broken link makes a broken bundle, and not a folder of others.
    Raises OSError for a folder that cannot be looked at.
    """
    try:
        (path / MANIFEST_FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise
    return True


def no_bundle_at(path: Path) -> str:
    """The sentence for a path without a bundle."""
    if path.exists() and not path.is_dir():
        return (
            f"{path} is a file and no bundle: name the folder NAME/VERSION that `evalmode export`"
            " wrote, or one above it"
        )
    return f"no bundle at {path}: make one with `evalmode train` and `evalmode export`"


def read_file(file: Path) -> bytes:
    """The bytes of a regular file; links are followed.

    A FIFO, a device, a socket or a folder is refused at once, without waiting for its other end.
    Raises FileUnreadable, naming the file.
    """
    try:
        with open_regular(file) as opened:
            return opened.read()
    except NotRegular as error:
        raise FileUnreadable(
            f"{file} is {error}", remedy="put the file itself, or a link to it, there"
        ) from error
    except OSError as error:
        raise FileUnreadable(f"{file} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise FileUnreadable(f"{file} cannot be read: it does not fit into memory") from error


def read_inside(folder: Path, name: str, *, called: str) -> bytes:
    """The bytes of a regular file whose links, if it has any, do not lead out of `folder`.

    `called` is what the folder is, for the message. Raises FileUnreadable, naming the file.
    """
    file = folder / name
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise FileUnreadable(f"{file} cannot be read: its link has no end") from error
    if not inside:
        raise FileUnreadable(f"{file} leads out of {called}")
    return read_file(file)


def version_order(version: str) -> list[tuple[int, int, str]]:
    """A key that sorts versions as people read them: 9 before 10, 1.9 before 1.10, 2.0-rc1 before
    2.0.
    """
    # A word is below the end, and the end below a number: 2.0-rc1, 2.0, 2.0.1.
    parts = re.findall(r"[0-9]+|[a-z]+", version.lower())
    return [(2, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts] + [
        (1, 0, version)
    ]


def _require_same(bundle: Bundle) -> None:
    """Raise BundleError unless the folder at `bundle.path` holds this very bundle, undamaged."""
    try:
        digest = open_bundle(bundle.path).digest
    except BundleError:
        digest = ""
    if digest != bundle.digest:
        raise BundleError(
            f"{bundle.path} holds another bundle: choose another --version or --name, or remove"
            " that folder"
        )


def _certificate(path: Path, *, allow_uncertified: bool) -> Certificate | None:
    file = path / CERTIFICATE_FILE
    if not os.path.lexists(file):
        if allow_uncertified:
            return None
        raise BundleNotCertified(
            f"{file} is missing: this bundle is not certified; `evalmode export` certifies one"
        )
    raw = read_file(file)
    certificate = _parse(Certificate, raw, file)
    if not certificate.seal_holds or certificate.canonical() != raw:
        raise BundleCorrupt(f"{file} was changed after the export: its seal does not hold")
    if certificate.verdict is not Verdict.PASS and not allow_uncertified:
        raise BundleNotCertified(
            f"{file} says {certificate.verdict}: this bundle must not be served"
        )
    return certificate


def _parse(model: type[Parsed], raw: bytes, file: Path) -> Parsed:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise BundleCorrupt(f"{file} cannot be read: {field}: {first['msg']}") from error


def _checked(path: Path, name: str, sha256: str) -> bytes:
    data = read_inside(path, name, called="the bundle")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleCorrupt(
            f"{path / name} is not the certified file: its sha256 differs from the manifest's"
        )
    return data


def _no_strangers(path: Path, known: set[str]) -> None:
    present = {
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_symlink() or not file.is_dir()
    }
    if strangers := sorted(present - known):
        raise BundleCorrupt(
            f"{path / strangers[0]} is not listed in {MANIFEST_FILE}: nothing vouches for it"
        )
