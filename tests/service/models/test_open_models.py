"""Real bundles that are added, changed and removed below a folder."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from functools import partial

import pytest
from onnx import TensorProto, helper
from structlog.testing import capture_logs

from evalmode.bundle.errors import BundleCorrupt, BundleError
from evalmode.service.errors import NotReady
from tests.service.bundle_folders import (
    OPEN_QUICKLY,
    READY,
    UNAVAILABLE,
    answer,
    copy_bundle,
    logged_duplicates,
    logged_refusals,
    spoil,
    started_repository,
    states,
)
from tests.service.bundles import make_bundle, onnx_model, tensor_bundle


@pytest.mark.parametrize("above", [0, 1, 2])
def test_the_root_may_be_a_bundle_or_hold_versions_or_hold_models(root, above):
    bundle = make_bundle(root)
    repository = started_repository([bundle, *bundle.parents][above])
    assert repository.get("tiny").bundle.path == bundle
    assert repository.default_text() is repository.get("tiny", "1") is repository.get()
    assert states(repository) == {("tiny", "1"): READY}


def test_the_newest_version_answers_and_10_is_newer_than_9(root):
    for version in ("9", "10", "2"):
        make_bundle(root, version=version)
    repository = started_repository(root)
    assert repository.get("tiny").version == "10"
    assert [entry.version for entry in repository.index()] == ["10", "9", "2"]
    assert states(repository) == {
        ("tiny", "10"): READY,
        ("tiny", "9"): UNAVAILABLE,
        ("tiny", "2"): UNAVAILABLE,
    }
    with pytest.raises(NotReady, match="version 9 of model tiny is not open: only the newest 1"):
        repository.get("tiny", "9")


def test_several_versions_are_open_if_the_setting_says_so(root):
    for version in ("9", "10", "2"):
        make_bundle(root, version=version)
    repository = started_repository(root, versions=2)
    assert [model.version for model in repository.versions_of("tiny")] == ["10", "9"]
    assert repository.get("tiny", "9").version == "9"
    assert repository.models() == repository.versions_of("tiny")


def test_folders_may_have_any_name_that_is_not_hidden(root, originals):
    copy_bundle(originals["1"], root / "what" / "ever")
    copy_bundle(originals["2"], root / ".hidden" / "2")
    copy_bundle(originals["2"], root / "what" / ".2-being-written")
    assert states(started_repository(root)) == {("tiny", "1"): READY}


def test_of_two_folders_of_one_version_the_first_is_open_and_the_log_says_so_once(
    root, originals, opener
):
    first, second = root / "a" / "x", root / "b" / "x"
    copy_bundle(originals["1"], first)
    copy_bundle(originals["1 changed"], second)
    with capture_logs() as logs:
        repository = started_repository(root, opener)
        repository.poll()
        repository.load("tiny")
    assert repository.get("tiny").bundle.path == first
    assert dict(opener.openings) == {first: 2}, "once at the start, and once to load it again"
    entries = [(entry.state, entry.reason) for entry in repository.index()]
    assert sorted(entries) == [
        (READY, ""),
        (UNAVAILABLE, "a/x is the same version of the same model"),
    ]
    assert logged_duplicates(logs) == [(str(second), str(first))]


def test_if_the_first_of_two_folders_of_one_version_is_broken_the_second_is_opened(root, originals):
    first, second = root / "a" / "x", root / "b" / "x"
    copy_bundle(originals["1"], first)
    copy_bundle(originals["1 changed"], second)
    spoil(first)
    with capture_logs() as logs:
        repository = started_repository(root)
        repository.poll()
        repository.load("tiny")
    assert repository.get("tiny").bundle.path == second
    assert [line["bundle"] for line in logged_refusals(logs)] == [str(first), str(first)]
    assert logged_duplicates(logs) == [], "the refusal has said why the first is not served"
    reasons = {entry.state: entry.reason for entry in repository.index()}
    assert reasons[READY] == ""
    assert "a/x/model.onnx is not the certified file" in reasons[UNAVAILABLE]


def test_of_two_folders_of_one_version_the_one_that_a_restart_would_serve_is_served(
    root, originals
):
    first, second = root / "a" / "x", root / "b" / "x"
    copy_bundle(originals["1"], first)
    copy_bundle(originals["1 changed"], second)
    repository = started_repository(root)
    mend = spoil(first)
    repository.poll()
    assert repository.get("tiny").bundle.path == second
    mend()
    with capture_logs() as logs:
        repository.poll()
        repository.poll()
    assert repository.get("tiny").bundle.path == first
    assert logged_duplicates(logs) == [(str(second), str(first))]
    shutil.rmtree(first)
    repository.poll()
    assert repository.get("tiny").bundle.path == second
    spoil(second)
    model = repository.get("tiny")
    repository.poll()
    assert repository.get("tiny") is model, "if no folder can be opened, the open version stays"


def test_a_new_folder_of_the_same_version_that_sorts_first_replaces_the_other(root, originals):
    copy_bundle(originals["1"], root / "b" / "x")
    repository = started_repository(root)
    copy_bundle(originals["1 changed"], root / "a" / "x")
    with capture_logs() as logs:
        repository.poll()
    assert repository.get("tiny").bundle.path == root / "a" / "x"
    assert logged_duplicates(logs) == [(str(root / "b" / "x"), str(root / "a" / "x"))]


def test_a_new_broken_folder_of_the_same_version_that_sorts_first_changes_nothing(root, originals):
    copy_bundle(originals["1"], root / "b" / "x")
    repository = started_repository(root)
    model = repository.get("tiny")
    copy_bundle(originals["1 changed"], root / "a" / "x")
    spoil(root / "a" / "x")
    repository.poll()
    assert repository.get("tiny") is model
    repository.load("tiny")
    assert repository.get("tiny").bundle.path == root / "b" / "x"


def test_several_folders_of_a_version_count_as_one_open_version(root, originals):
    for index, original in enumerate(("1", "1", "2", "2")):
        copy_bundle(originals[original], root / str(index) / "x")
    for index in (0, 2):
        spoil(root / str(index) / "x")
    repository = started_repository(root, versions=2)
    paths = {model.version: model.bundle.path for model in repository.versions_of("tiny")}
    assert paths == {"2": root / "3" / "x", "1": root / "1" / "x"}


def test_if_no_folder_of_a_version_can_be_opened_the_error_is_that_of_the_first(root, originals):
    for folder in ("a", "b"):
        copy_bundle(originals["1"], root / folder / "x")
        spoil(root / folder / "x")
    with pytest.raises(BundleCorrupt, match=r"a/x/model\.onnx is not the certified file"):
        started_repository(root)


def test_an_older_good_version_is_served_instead_of_a_bad_one(root):
    make_bundle(root, version="1")
    spoil(make_bundle(root, version="2"))
    with capture_logs() as logs:
        repository = started_repository(root)
    assert repository.get("tiny").version == "1"
    newest, _ = repository.index()
    assert (newest.version, newest.state) == ("2", UNAVAILABLE)
    assert "tiny/2/model.onnx is not the certified file" in newest.reason
    assert str(root) not in newest.reason, "clients do not see the server's paths"
    assert len(logged_refusals(logs)) == 1


def test_if_no_bundle_can_be_opened_the_first_error_is_raised_and_nothing_logged(root):
    spoil(make_bundle(root))
    with (
        capture_logs() as logs,
        pytest.raises(BundleCorrupt, match=r"model\.onnx is not the certified file"),
    ):
        started_repository(root)
    assert logs == []


@pytest.mark.parametrize("manifest", [b"", b"{", b'{"name": 3}'])
def test_a_manifest_that_cannot_be_read_is_refused_as_corrupt(root, manifest):
    (make_bundle(root) / "manifest.json").write_bytes(manifest)
    with pytest.raises(BundleCorrupt, match=r"manifest\.json is not the certified one"):
        started_repository(root)


def test_a_bad_model_does_not_affect_the_others(root):
    make_bundle(root)
    spoil(make_bundle(root, name="spoilt"))
    repository = started_repository(root)
    assert [model.name for model in repository.models()] == ["tiny"]
    with pytest.raises(
        NotReady, match=r"version 1 of model spoilt is not open: spoilt/1/model.onnx"
    ):
        repository.get("spoilt")


def test_an_unexpected_error_refuses_only_its_bundle_and_is_not_public(root):
    make_bundle(root)
    make_bundle(root, name="odd")

    def open_model(path):
        if "odd" in path.parts:
            raise RuntimeError("/etc/secret")
        return OPEN_QUICKLY(path)

    repository = started_repository(root, open_model)
    assert {entry.name: entry.reason for entry in repository.index()}[
        "odd"
    ] == "it failed to open: the server's log has the error"


def test_a_new_version_answers_at_once_and_the_old_one_is_freed(root):
    make_bundle(root)
    repository = started_repository(root)
    old = repository.get("tiny")
    make_bundle(root, version="2")
    repository.poll()
    assert repository.get("tiny").version == "2"
    assert [model.version for model in repository.models()] == ["2"]
    assert answer(old) == answer(repository.get("tiny")), "the old model still answers"
    reference = weakref.ref(old)
    del old
    gc.collect()
    assert reference() is None


def test_nothing_is_opened_again_while_nothing_changes(root, opener):
    make_bundle(root)
    make_bundle(root, version="2")
    repository = started_repository(root, opener)
    model = repository.get("tiny")
    for _ in range(3):
        repository.poll()
    assert repository.get("tiny") is model
    assert set(opener.openings.values()) == {1}


def test_changed_files_in_the_folder_of_a_version_replace_it(root, originals):
    bundle = root / "tiny" / "1"
    copy_bundle(originals["1"], bundle)
    repository = started_repository(root)
    digest = repository.get("tiny").digest
    copy_bundle(originals["1 changed"], bundle)
    repository.poll()
    assert repository.get("tiny").digest != digest
    assert repository.get("tiny").labels == ("a", "b", "c", "d", "e")


def test_the_same_bytes_written_again_are_opened_again(root, opener):
    bundle = make_bundle(root)
    repository = started_repository(root, opener)
    os.utime(bundle / "model.onnx", ns=(1, 1))
    repository.poll()
    assert opener.openings[bundle] == 2


def test_a_bad_replacement_is_refused_once_and_the_open_version_stays(root, opener):
    bundle = make_bundle(root)
    repository = started_repository(root, opener)
    model = repository.get("tiny")
    mend = spoil(bundle)
    with capture_logs() as logs:
        for _ in range(3):
            repository.poll()
    assert repository.get("tiny") is model
    assert len(logged_refusals(logs)) == 1
    assert opener.openings[bundle] == 2, "a refused bundle is not tried again until it has changed"
    (entry,) = repository.index()
    assert entry.state == READY
    assert "the bundle that was open stays open" in entry.reason
    mend()
    repository.poll()
    assert repository.get("tiny") is not model
    assert repository.index()[0].reason == ""


def test_a_manifest_that_is_being_written_changes_no_identity(root):
    make_bundle(root, version="2")
    bundle = make_bundle(root)
    repository = started_repository(root, versions=2)
    good = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(good[:40])
    repository.poll()
    assert [model.version for model in repository.versions_of("tiny")] == ["2", "1"]
    (bundle / "manifest.json").write_bytes(good)
    repository.poll()
    assert states(repository) == {("tiny", "2"): READY, ("tiny", "1"): READY}


def test_a_version_without_its_folder_is_closed_and_an_older_one_answers(root):
    make_bundle(root)
    newest = make_bundle(root, version="2")
    repository = started_repository(root)
    shutil.rmtree(newest)
    repository.poll()
    assert [model.version for model in repository.models()] == ["1"]
    assert states(repository) == {("tiny", "1"): READY}


def test_the_last_good_version_stays_without_its_folder_and_that_is_logged_once(root):
    bundle = make_bundle(root)
    repository = started_repository(root)
    model = repository.get("tiny")
    shutil.rmtree(bundle)
    with capture_logs() as logs:
        repository.poll()
        repository.poll()
    assert repository.get("tiny") is model
    (entry,) = repository.index()
    assert (entry.state, entry.reason) == (
        READY,
        "its folder is gone; it stays open as the last version of its model",
    )
    assert [line["event"] for line in logs] == [
        "the folders of a model are gone: its last version goes on"
    ]
    spoil(make_bundle(root, version="2"))
    repository.poll()
    assert repository.get("tiny") is model
    make_bundle(root, version="3")
    repository.poll()
    assert [model.version for model in repository.models()] == ["3"]


def test_a_new_model_is_served_beside_the_others(
    root,
):
    make_bundle(root)
    repository = started_repository(root)
    tensor_bundle(root)
    repository.poll()
    assert [model.name for model in repository.models()] == ["tensors", "tiny"]
    assert repository.default_text().name == "tiny", "a model of tensors is no default for texts"


@pytest.mark.parametrize(
    "last", ["certificate.json", "manifest.json", "model.onnx", "known_answers.npz"]
)
def test_a_bundle_that_is_copied_file_by_file_is_served_once_it_is_complete(root, originals, last):
    copy_bundle(originals["1"], root / "tiny" / "1")
    repository = started_repository(root)
    target = root / "tiny" / "2"
    target.mkdir()
    files = sorted(originals["2"].iterdir(), key=lambda file: file.name == last)
    with capture_logs() as logs:
        for file in files:
            data = file.read_bytes()
            for part in (data[: len(data) // 2], data):
                assert repository.get("tiny").version == "1"
                (target / file.name).write_bytes(part)
                repository.poll()
                assert answer(repository.get("tiny"))
    assert repository.get("tiny").version == "2"
    reasons = [line["reason"] for line in logged_refusals(logs)]
    assert len(reasons) == len(set(reasons)), "each reason is logged once"


def test_a_remembered_refusal_keeps_no_model_alive(root):
    make_bundle(root)
    half_open = []

    def open_model(path):
        model = OPEN_QUICKLY(path)
        if path.name == "2":
            half_open.append(weakref.ref(model))
            raise BundleError("no")
        return model

    repository = started_repository(root, open_model)
    make_bundle(root, version="2")
    repository.poll()
    gc.collect()
    assert [reference() for reference in half_open] == [None]
    assert states(repository)["tiny", "2"] == UNAVAILABLE


def test_a_folder_with_an_unreadable_manifest_does_not_precede_a_good_bundle(root, originals):
    (root / "tiny" / "1").mkdir(parents=True)
    (root / "tiny" / "1" / "manifest.json").write_bytes(b"{")
    copy_bundle(originals["1"], root / "zzz" / "1")
    assert started_repository(root).get("tiny", "1").bundle.path == root / "zzz" / "1"


def test_an_opened_model_is_logged_with_its_row_counts(root):
    make_bundle(root)
    with capture_logs() as logs:
        started_repository(root)
    (line,) = [line for line in logs if line["event"] == "model opened"]
    assert (line["model"], line["version"], line["known_answers"]) == ("tiny", "1", "bitwise")
    assert line["row_counts"] == {"4": [1], "8": [1], "16": [1]}


def test_an_uncertified_model_is_opened_with_a_warning(root):
    (make_bundle(root) / "certificate.json").unlink()
    with capture_logs() as logs:
        started_repository(root, partial(OPEN_QUICKLY, allow_uncertified=True))
    assert [line["log_level"] for line in logs] == ["warning", "info"]


def test_a_model_that_draws_random_numbers_is_opened_with_a_warning_that_names_the_node(root):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in "xy")
    draw = helper.make_node("RandomUniformLike", ["x"], ["y"], name="draw")
    tensor_bundle(root, model=onnx_model([draw], inputs=[x], outputs=[y]), known_inputs=[])
    with capture_logs() as logs:
        started_repository(root, partial(OPEN_QUICKLY, allow_uncertified=True))
    assert [line["log_level"] for line in logs] == ["warning", "info"]
    assert "the node 'draw' is RandomUniformLike" in logs[0]["reason"]
