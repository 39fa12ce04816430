"""Bundles on disk: written completely or not at all, opened only when every byte is certified.

A bundle is the folder `ROOT/NAME/VERSION/`. Its digest is the sha256 of `manifest.json`, which
lists the sha256 of every other file. `certificate.json` names that digest and has a seal.
`sha256sum manifest.json` prints the digest.
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
    """An open bundle.

    `contents` are the files of the manifest by their paths. They are the bytes that were checked: a
    file that changes later changes nothing here.
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
        """The front end that turns texts into ids; None for a model that takes only tensors."""
        if self.manifest.frontend is None:
            return None
        tokenizer = None
        if TOKENIZER_FILE in self.contents:
            tokenizer = self.contents[TOKENIZER_FILE].decode()
        return open_frontend(self.manifest.frontend, tokenizer)

    def known_answers(self) -> tuple[KnownAnswer, ...]:
        """The inputs with their certified outputs; empty for a bundle without them."""
        file = self.contents.get(KNOWN_ANSWERS_FILE)
        return () if file is None else unpack(file)


def digest_of(manifest: Manifest) -> str:
    """The digest of the bundle with this manifest."""
    return hashlib.sha256(manifest.canonical()).hexdigest()


def hashes_of(contents: Mapping[str, bytes]) -> dict[str, str]:
    """The `files` of a manifest: the sha256 of each file, in the order of their paths."""
    return {path: hashlib.sha256(contents[path]).hexdigest() for path in sorted(contents)}


def write_bundle(
    root: Path, *, manifest: Manifest, certificate: Certificate, contents: Mapping[str, bytes]
) -> Bundle:
    """Seal the certificate, write the folder `root/NAME/VERSION`, and return the bundle.

    The folder is written completely or not at all. If the same bundle is there already, nothing is
    written. Raises BundleNotCertified for a certificate that did not pass, and BundleError if
    another bundle is there or nothing can be written.
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
        try:
            existing_digest = open_bundle(bundle.path).digest
        except BundleError:  # damaged, or no bundle
            existing_digest = ""
        if existing_digest != bundle.digest:
            raise BundleError(
                f"{bundle.path} holds another bundle: choose another --version or --name, or remove"
                " that folder"
            )
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
    """Open the bundle folder `path`, and check every byte of it in this order.

    1. The path is a folder, else BundleError.
    2. The certificate is there and passed, else BundleNotCertified. `allow_uncertified` skips this.
    3. The certificate's seal holds, and it names the digest of the manifest.
    4. The manifest can be read, and every file that it lists has the sha256 that it lists.
    5. The folder has no other file.

    A failure of the last three raises BundleCorrupt, which names the file.
    """
    if not path.is_dir():
        raise BundleError(
            f"{path} is not a bundle: a bundle is a folder NAME/VERSION that `evalmode export`"
            " writes"
        )

    certificate_file, manifest_file = path / CERTIFICATE_FILE, path / MANIFEST_FILE
    certificate = None
    if os.path.lexists(certificate_file):  # true for a broken link too, which cannot be read
        raw = read_file(certificate_file)
        certificate = _parse(Certificate, raw, certificate_file)
        # The seal covers the parsed content. Other bytes with the same content are refused too.
        if not certificate.seal_holds or certificate.canonical() != raw:
            raise BundleCorrupt(
                f"{certificate_file} was changed after the export: its seal does not hold"
            )
        if certificate.verdict is not Verdict.PASS and not allow_uncertified:
            raise BundleNotCertified(
                f"{certificate_file} says {certificate.verdict}: this bundle must not be served"
            )
    elif not allow_uncertified:
        raise BundleNotCertified(
            f"{certificate_file} is missing: this bundle is not certified; `evalmode export`"
            " certifies one"
        )

    raw = read_file(manifest_file)
    digest = hashlib.sha256(raw).hexdigest()
    if certificate is not None and certificate.digest != digest:
        raise BundleCorrupt(
            f"{manifest_file} is not the certified one: it was changed after the export"
        )
    manifest = _parse(Manifest, raw, manifest_file)

    contents = {}
    for name, sha256 in manifest.files.items():
        contents[name] = read_inside(path, name, description="the bundle")
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise BundleCorrupt(
                f"{path / name} is not the certified file: its sha256 differs from the manifest's"
            )

    # An ONNX model may name other files. So an unlisted file could become part of the bundle.
    listed = {*contents, MANIFEST_FILE, CERTIFICATE_FILE}
    present = {
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_symlink() or not file.is_dir()
    }
    unlisted = sorted(present - listed)
    if unlisted:
        raise BundleCorrupt(
            f"{path / unlisted[0]} is not listed in {MANIFEST_FILE}, so no hash covers it"
        )
    return Bundle(
        path=path, digest=digest, manifest=manifest, certificate=certificate, contents=contents
    )


def find_bundle(path: Path) -> Path:
    """The bundle folder at `path`, or the newest version below it.

    `path` may be a bundle, a folder of versions, or a folder of one name. Versions are ordered as
    people read them: see `version_order`. Raises BundleError for no bundle, and for several names.
    """
    if is_bundle(path):
        return path
    manifests = [*path.glob(f"*/{MANIFEST_FILE}"), *path.glob(f"*/*/{MANIFEST_FILE}")]
    # A name with a dot in front is a bundle that is being written.
    folders = sorted(file.parent for file in manifests if not file.parent.name.startswith("."))
    if not folders:
        raise BundleError(no_bundle_at(path))
    names = sorted({folder.parent for folder in folders})
    if len(names) > 1:
        raise BundleError(f"{path} holds several bundles, name one: {', '.join(map(str, names))}")
    return max(folders, key=lambda folder: version_order(folder.name))


def is_bundle(path: Path) -> bool:
    """Whether the folder `path` is a bundle, valid or broken: it has an entry `manifest.json`.

    The entry may be of any kind: if it is a FIFO or a broken link, the bundle is broken. Raises
    OSError for a folder that cannot be searched.
    """
    try:
        (path / MANIFEST_FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        # A link that leads to itself somewhere in `path`.
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

    A FIFO, a device, a socket or a folder is refused at once, without waiting for another process.
    Raises FileUnreadable, which names the file.
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


def read_inside(folder: Path, name: str, *, description: str) -> bytes:
    """The bytes of the regular file `name` in `folder`. No link may lead out of the folder.

    Messages call the folder by `description`, such as "the bundle". Raises FileUnreadable, which
    names the file.
    """
    file = folder / name
    try:
        is_inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise FileUnreadable(f"{file} cannot be read: its link leads to itself") from error
    if not is_inside:
        raise FileUnreadable(f"{file} leads out of {description}")
    return read_file(file)


def version_order(version: str) -> list[tuple[int, int, str]]:
    """A key that sorts versions as people read them.

    >>> sorted(["10", "2.0", "1.10", "2.0-rc1", "9", "1.9"], key=version_order)
    ['1.9', '1.10', '2.0-rc1', '2.0', '9', '10']
    """
    # A word sorts before the end, and the end before a number: 2.0-rc1, 2.0, 2.0.1.
    parts = re.findall(r"[0-9]+|[a-z]+", version.lower())
    key = [(2, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
    return [*key, (1, 0, version)]


def _parse(model: type[Parsed], raw: bytes, file: Path) -> Parsed:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise BundleCorrupt(f"{file} cannot be read: {field}: {first['msg']}") from error
