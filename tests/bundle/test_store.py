from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from evalmode.bundle.certificate import Verdict
from evalmode.bundle.errors import BundleCorrupt, BundleError, BundleNotCertified
from evalmode.bundle.store import digest_of, find_bundle, hashes_of, open_bundle, write_bundle

FILES = ("model.onnx", "known_answers.npz", "notes/origin.txt", "manifest.json", "certificate.json")


def test_a_bundle_opens_as_it_was_written(written, parts):
    bundle, expected = open_bundle(written), parts()
    assert bundle.path == written
    assert bundle.manifest == expected.manifest
    assert bundle.certificate == expected.certificate.sealed()
    assert bundle.contents == expected.contents
    assert bundle.model == expected.contents["model.onnx"]
    assert [answer.text for answer in bundle.known_answers()] == ["Ez egy rövid mondat."]
    assert bundle.frontend().spec.ids_per_position == 16


def test_the_digest_is_the_sha256_of_the_manifest_file(written, parts):
    digest = hashlib.sha256((written / "manifest.json").read_bytes()).hexdigest()
    assert open_bundle(written).digest == digest == digest_of(parts().manifest)


def test_the_same_contents_have_the_same_digest_wherever_and_whenever_they_are_written(
    written, parts, tmp_path
):
    copy = parts().write(tmp_path / "elsewhere")
    assert open_bundle(copy).digest == open_bundle(written).digest
    for name in FILES:
        assert (copy / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_in_any_file_is_refused_with_the_name_of_the_file(written, name):
    file = written / name
    original = file.read_bytes()
    # Every byte of a small file; of a large one the ends, and every seventh byte between, each with
    # another bit.
    steps = chain(
        range(min(64, len(original))),
        range(0, len(original), 7),
        range(max(0, len(original) - 64), len(original)),
    )
    for at in sorted(set(steps)):
        changed = bytearray(original)
        changed[at] ^= 1 << at % 8
        file.write_bytes(changed)
        for allow_uncertified in (False, True):
            with pytest.raises(BundleCorrupt) as refusal:
                open_bundle(written, allow_uncertified=allow_uncertified)
            assert str(file) in str(refusal.value), f"byte {at}"
    file.write_bytes(original)
    open_bundle(written)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\n", lambda raw: b""])
def test_a_file_that_is_shorter_or_longer_is_refused_with_its_name(written, name, change):
    file = written / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(BundleCorrupt, match=name):
        open_bundle(written)


@pytest.mark.parametrize("name", [name for name in FILES if name != "certificate.json"])
def test_a_missing_file_is_refused_with_its_name(written, name):
    (written / name).unlink()
    with pytest.raises(BundleCorrupt, match=name):
        open_bundle(written)


@pytest.mark.parametrize("name", ["stranger.txt", "notes/stranger.so", ".hidden"])
def test_a_file_that_the_manifest_does_not_list_is_refused_with_its_name(written, name):
    (written / name).write_text("I was not there")
    with pytest.raises(BundleCorrupt, match=name):
        open_bundle(written)


def test_a_folder_that_leads_out_of_the_bundle_is_refused(written, tmp_path):
    (written / "way-out").symlink_to(tmp_path)
    with pytest.raises(BundleCorrupt, match="way-out"):
        open_bundle(written)


def test_a_file_that_leads_out_of_the_bundle_is_refused_even_with_the_right_bytes(
    written, tmp_path
):
    outside = tmp_path / "outside.onnx"
    shutil.move(written / "model.onnx", outside)
    (written / "model.onnx").symlink_to(outside)
    with pytest.raises(BundleCorrupt, match=r"model\.onnx leads out of the bundle"):
        open_bundle(written)


def test_a_bundle_opens_through_a_link(written, tmp_path):
    (tmp_path / "current").symlink_to(written)
    assert open_bundle(tmp_path / "current").digest == open_bundle(written).digest


@pytest.mark.parametrize(
    "name", ["../model.onnx", "notes/../../model.onnx", "/etc/passwd", "a//b", "", "a\\\\b", "a b"]
)
def test_a_manifest_that_lists_a_path_out_of_the_bundle_is_refused(written, parts, name):
    raw = parts().manifest.canonical().replace(b"notes/origin.txt", name.encode())
    (written / "manifest.json").write_bytes(raw)
    (written / "certificate.json").unlink()
    with pytest.raises(BundleCorrupt, match=r"manifest\.json cannot be read: files"):
        open_bundle(written, allow_uncertified=True)


@pytest.mark.parametrize("name", ["manifest.json", "certificate.json"])
def test_an_unknown_schema_version_is_refused(written, name):
    raw = (written / name).read_bytes()
    newer = re.sub(rb'"schema_version": \d', b'"schema_version": 9', raw)
    assert newer != raw
    (written / name).write_bytes(newer)
    if name == "manifest.json":
        (written / "certificate.json").unlink()
    with pytest.raises(BundleCorrupt, match=rf"{name} cannot be read: schema_version"):
        open_bundle(written, allow_uncertified=True)


def test_a_certificate_of_another_bundle_is_refused(written, parts, tmp_path):
    other = parts(model=b"other").write(tmp_path / "other")
    shutil.copy(other / "certificate.json", written)
    with pytest.raises(BundleCorrupt, match=r"manifest\.json"):
        open_bundle(written)


def test_an_uncertified_bundle_is_opened_only_when_that_is_allowed(written):
    (written / "certificate.json").unlink()
    with pytest.raises(BundleNotCertified, match=r"certificate\.json is missing"):
        open_bundle(written)
    bundle = open_bundle(written, allow_uncertified=True)
    assert bundle.certificate is None
    (written / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BundleCorrupt, match=r"model\.onnx"):
        open_bundle(written, allow_uncertified=True)


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.UNPROVEN])
def test_a_certificate_that_did_not_pass_is_opened_only_when_that_is_allowed(
    written, parts, verdict
):
    certificate = parts(verdicts=(Verdict.PASS, verdict)).certificate.sealed()
    (written / "certificate.json").write_bytes(certificate.canonical())
    with pytest.raises(BundleNotCertified, match=rf"certificate\.json says {verdict}"):
        open_bundle(written)
    assert open_bundle(written, allow_uncertified=True).certificate.verdict is verdict


@pytest.mark.parametrize("verdicts", [(), (Verdict.FAIL,), (Verdict.PASS, Verdict.UNPROVEN)])
def test_a_bundle_that_did_not_pass_is_not_written(tmp_path, parts, verdicts):
    with pytest.raises(BundleNotCertified, match="any/1 is not written"):
        parts(verdicts=verdicts).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_folder_is_refused(written, tmp_path):
    for path in (tmp_path / "nowhere", written / "model.onnx"):
        with pytest.raises(BundleError, match="is not a bundle"):
            open_bundle(path)


def test_other_users_can_read_a_bundle(written):
    assert stat.S_IMODE(written.stat().st_mode) == 0o755


@pytest.mark.parametrize("failing_at", range(5))
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path, parts, monkeypatch, failing_at, failure
):
    synced = []

    def full(descriptor: int) -> None:
        if len(synced) == failing_at:
            raise failure
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        parts().write(tmp_path)
    assert list((tmp_path / "any").iterdir()) == []
    with pytest.raises(BundleError, match="no bundle"):
        find_bundle(tmp_path)


def test_a_bundle_is_never_seen_half_written(tmp_path, parts, monkeypatch):
    existed = []

    def look(descriptor: int) -> None:
        existed.append((tmp_path / "any/1").exists())

    monkeypatch.setattr(os, "fsync", look)
    parts().write(tmp_path)
    assert existed == [False] * 6 + [True], (
        "five files and their folder are on disk before the name is, then the name is"
    )


def test_where_nothing_can_be_written_the_sentence_names_the_bundle(tmp_path, parts):
    (tmp_path / "any").write_text("a file where a folder must go")
    with pytest.raises(BundleError, match="any/1 cannot be written"):
        parts().write(tmp_path)


def test_writing_the_same_bundle_again_succeeds_and_changes_nothing(written, parts):
    before = {file: file.stat().st_mtime_ns for file in written.rglob("*")}
    assert parts().write(written.parent.parent) == written
    assert {file: file.stat().st_mtime_ns for file in written.rglob("*")} == before


def test_another_bundle_of_the_same_name_and_version_is_refused_and_the_first_stays(written, parts):
    before = open_bundle(written)
    with pytest.raises(BundleError, match="holds another bundle"):
        parts(model=b"another").write(written.parent.parent)
    assert open_bundle(written) == before


def test_a_damaged_bundle_is_not_taken_for_the_same_one(written, parts):
    (written / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="holds another bundle"):
        parts().write(written.parent.parent)


def test_inconsistent_arguments_of_write_bundle_are_assertion_errors(tmp_path, parts):
    expected = parts()
    with pytest.raises(AssertionError):
        write_bundle(
            tmp_path,
            manifest=expected.manifest,
            certificate=expected.certificate,
            contents={"model.onnx": b"other"},
        )
    other = parts(model=b"other")
    with pytest.raises(AssertionError):
        write_bundle(
            tmp_path,
            manifest=expected.manifest,
            certificate=other.certificate,
            contents=expected.contents,
        )


def test_hashes_are_listed_in_the_order_of_their_paths():
    assert list(hashes_of({"b": b"", "a/c": b"", "a": b""})) == ["a", "a/c", "b"]


@pytest.mark.parametrize(
    "versions",
    [
        ("1", "2", "9", "10", "100"),
        ("1.8", "1.9", "1.10", "2.0-rc1", "2.0-rc2", "2.0", "2.0.1"),
        ("v1", "v2", "v10"),
        ("2025-12-31", "2026-01-01", "2026-11-20"),
        ("latest", "1"),
    ],
)
def test_of_several_versions_the_newest_is_found(tmp_path, parts, versions):
    newest = tmp_path / "any" / versions[-1]
    for version in reversed(versions):
        parts(version=version).write(tmp_path)
        assert find_bundle(tmp_path / "any") == find_bundle(tmp_path) == newest


def test_a_bundle_folder_is_found_even_beside_a_newer_version(tmp_path, parts):
    old = parts(version="1").write(tmp_path)
    parts(version="2").write(tmp_path)
    assert find_bundle(old) == old


def test_a_bundle_that_is_being_written_is_not_found(written):
    building = written.parent / ".2-abc"
    shutil.copytree(written, building)
    assert find_bundle(written.parent.parent) == find_bundle(written.parent) == written


def test_a_folder_with_several_names_is_refused_with_their_list(written):
    root = written.parent.parent
    shutil.copytree(written.parent, root / "other")
    with pytest.raises(BundleError, match=r"several bundles.*any.*other"):
        find_bundle(root)


def test_a_folder_without_a_bundle_is_refused_with_the_commands_that_make_one(tmp_path):
    with pytest.raises(BundleError, match="evalmode export"):
        find_bundle(tmp_path)
    with pytest.raises(BundleError, match="evalmode export"):
        find_bundle(tmp_path / "nowhere")


def as_fifo(file: Path) -> None:
    os.mkfifo(file)


def as_socket(file: Path) -> None:
    # A socket's address may have no more than 107 characters: it is bound from its own folder.
    with contextlib.chdir(file.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(file.name)


def as_folder(file: Path) -> None:
    file.mkdir()


def as_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def as_link_to_a_fifo(file: Path) -> None:
    os.mkfifo(file.with_name("pipe"))
    file.symlink_to("pipe")


KINDS = {
    as_fifo: "is a FIFO and not a regular file",
    as_socket: "is a socket and not a regular file",
    as_folder: "is a folder and not a regular file",
    as_link_to_a_fifo: "is a FIFO and not a regular file",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("allow_uncertified", [False, True])
def test_an_irregular_file_is_refused_at_once_with_its_name(written, name, make, allow_uncertified):
    (written / name).unlink()
    make(written / name)
    with pytest.raises(BundleCorrupt, match=rf"{name} {KINDS[make]}"):
        open_bundle(written, allow_uncertified=allow_uncertified)


@pytest.mark.parametrize("name", ["manifest.json", "certificate.json"])
def test_a_link_to_a_device_is_refused_without_reading_it(written, name):
    (written / name).unlink()
    as_device(written / name)
    with pytest.raises(BundleCorrupt, match=f"{name} is a device and not a regular file"):
        open_bundle(written)


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_itself_is_refused_with_its_name(written, name):
    (written / name).unlink()
    (written / name).symlink_to(Path(name).name)
    with pytest.raises(BundleCorrupt, match=f"{name} cannot be read"):
        open_bundle(written, allow_uncertified=True)


def test_a_file_larger_than_the_memory_is_refused_with_its_name(written):
    os.truncate(written / "model.onnx", 1 << 42)
    program = """
import resource, sys
from pathlib import Path
from evalmode.bundle.errors import BundleCorrupt
from evalmode.bundle.store import open_bundle
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
try:
    open_bundle(Path(sys.argv[1]))
except BundleCorrupt as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(written)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.endswith("model.onnx cannot be read: it does not fit into memory\n")


def test_a_link_inside_the_bundle_is_followed(written):
    (written / "model.onnx").rename(written / "notes" / "model.onnx")
    (written / "model.onnx").symlink_to("notes/model.onnx")
    with pytest.raises(BundleCorrupt, match=r"notes/model\.onnx is not listed"):
        open_bundle(written)
    (written / "notes" / "origin.txt").unlink()
    shutil.move(written / "notes" / "model.onnx", written / "notes" / "origin.txt")
    (written / "model.onnx").unlink()
    (written / "model.onnx").symlink_to("notes/origin.txt")
    with pytest.raises(BundleCorrupt, match=r"origin\.txt is not the certified file"):
        open_bundle(written)


@pytest.mark.parametrize("make", KINDS)
def test_a_bundle_with_an_irregular_manifest_is_found_and_refused(written, make):
    (written / "manifest.json").unlink()
    make(written / "manifest.json")
    for above in (written, written.parent, written.parent.parent):
        assert find_bundle(above) == written
    with pytest.raises(BundleCorrupt, match=r"manifest\.json is a"):
        open_bundle(written)


def test_a_path_to_a_file_is_refused_with_the_advice_to_name_its_folder(written):
    with pytest.raises(BundleError, match=r"model\.onnx is a file and no bundle: name the folder"):
        find_bundle(written / "model.onnx")


def test_a_file_changed_after_opening_does_not_change_the_bundle(written, parts):
    bundle = open_bundle(written)
    (written / "model.onnx").write_bytes(b"other bytes")
    assert bundle.model == parts().contents["model.onnx"]
