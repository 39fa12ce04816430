"""The open models of real bundles below a folder: reading, loading and unloading them."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from structlog.testing import capture_logs

from evalmode.bundle.errors import BundleError
from evalmode.service.errors import (
    BadRequest,
    Forbidden,
    InvalidField,
    NotReady,
    StartFailed,
    UnknownModel,
)
from evalmode.service.models.repository import Repository, seconds_until_poll
from tests.service import processes
from tests.service.bundle_folders import (
    LOADING,
    OPEN_QUICKLY,
    READY,
    WAIT_S,
    answer,
    copy_bundle,
    spoil,
    started_repository,
    states,
)
from tests.service.bundles import make_bundle, tensor_bundle


def test_without_any_bundle_the_start_is_refused(root):
    with pytest.raises(BundleError, match=r"no bundle at .*: make one with"):
        started_repository(root)
    with pytest.raises(BundleError, match="no bundle at"):
        started_repository(root / "nothing")


def test_with_a_file_instead_of_a_folder_the_start_is_refused_in_one_sentence(root):
    file = make_bundle(root) / "model.onnx"
    assert f"{file} is a file and no bundle: name the folder NAME/VERSION" in processes.refused(
        file
    )


def test_with_an_unreadable_folder_the_start_is_refused_in_one_sentence(root):
    # Too long a name fails for root too, for whom no permission is missing.
    unreadable = root / ("x" * 300)
    with pytest.raises(StartFailed, match="cannot be read: File name too long"):
        started_repository(unreadable)
    assert "cannot be read" in processes.refused(unreadable)


def test_fifty_swaps_disturb_no_reader_and_leave_one_model(root, originals):
    bundle = root / "tiny" / "1"
    copy_bundle(originals["1"], bundle)
    repository = started_repository(root)
    expected = answer(repository.get("tiny"))
    is_over, references = threading.Event(), []

    def ask():
        reads = 0
        while not is_over.is_set():
            assert answer(repository.get("tiny")) == expected
            assert answer(repository.default_text()) == expected
            reads += 1
        return reads

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(ask) for _ in range(2)]
        try:
            for swap in range(50):
                references.append(weakref.ref(repository.get("tiny")))
                copy_bundle(originals["1 changed" if swap % 2 == 0 else "1"], bundle)
                repository.poll()
                assert references[-1]() is not repository.get("tiny")
        finally:
            is_over.set()
        assert all(reader.result(WAIT_S) for reader in readers)
    gc.collect()
    assert [reference() for reference in references] == [None] * 50
    assert len(repository.models()) == 1


def test_readers_are_not_blocked_while_a_model_is_being_opened(root):
    make_bundle(root)
    opening, go_on = threading.Event(), threading.Event()

    def open_model(path):
        if path.name == "2":
            opening.set()
            assert go_on.wait(WAIT_S)
        return OPEN_QUICKLY(path)

    repository = started_repository(root, open_model)
    make_bundle(root, version="2")
    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(repository.poll)
        try:
            assert opening.wait(WAIT_S)
            assert repository.get("tiny").version == "1"
            assert states(repository) == {("tiny", "2"): LOADING, ("tiny", "1"): READY}
            with pytest.raises(
                NotReady, match="version 2 of model tiny is not open: it is loading"
            ):
                repository.get("tiny", "2")
        finally:
            go_on.set()
        polled.result(WAIT_S)
    assert repository.get("tiny").version == "2"


@pytest.mark.parametrize(
    "name", ["", "nothing", "../tiny", "tiny/1", "/etc/passwd", "..", "\0", "tiny\n", "x" * 10_000]
)
def test_a_name_that_no_manifest_has_is_unknown_whatever_it_looks_like(root, name):
    make_bundle(root)
    repository = started_repository(root)
    for ask in (repository.get, repository.versions_of, repository.load, repository.unload):
        with pytest.raises(UnknownModel, match="there is no model") as refusal:
            ask(name)
        assert len(str(refusal.value)) < 500
    for version in (name, "1 "):
        with pytest.raises(UnknownModel, match="model tiny has no version"):
            repository.get("tiny", version)


def test_an_unloaded_model_stays_closed_until_it_is_loaded(root, opener):
    bundle = make_bundle(root)
    repository = started_repository(root, opener)
    repository.unload("tiny")
    repository.unload("tiny")
    os.utime(bundle / "model.onnx", ns=(1, 1))
    make_bundle(root, version="2")
    repository.poll()
    assert repository.models() == ()
    assert {entry.reason for entry in repository.index()} == {"it was unloaded"}
    for ask in (repository.get, repository.versions_of):
        with pytest.raises(NotReady, match="it was unloaded"):
            ask("tiny")
    with pytest.raises(NotReady, match="no model is open"):
        repository.default_text()
    assert sum(opener.openings.values()) == 1
    repository.load("tiny")
    assert repository.get("tiny").version == "2"


def test_loading_an_open_model_opens_it_again(root):
    make_bundle(root)
    repository = started_repository(root)
    model = repository.get("tiny")
    repository.load("tiny")
    assert repository.get("tiny") is not model


def test_loading_tries_a_refused_bundle_again_and_raises_the_reason(root, opener):
    bundle = make_bundle(root)
    repository = started_repository(root, opener)
    model = repository.get("tiny")
    mend = spoil(bundle)
    for _ in range(2):
        with pytest.raises(
            BadRequest, match=r"model tiny cannot be loaded: tiny/1/model.onnx is not the certified"
        ):
            repository.load("tiny")
    assert opener.openings[bundle] == 3
    assert repository.get("tiny") is model
    mend()
    repository.load("tiny")
    assert repository.get("tiny") is not model


def test_loading_a_model_without_a_folder_is_refused_and_it_stays_open(root):
    bundle = make_bundle(root)
    repository = started_repository(root)
    shutil.rmtree(bundle)
    with pytest.raises(BadRequest, match="model tiny cannot be loaded: its folder is gone"):
        repository.load("tiny")
    assert repository.get("tiny")


def test_a_version_may_be_named_without_the_model(root):
    make_bundle(root)
    make_bundle(root, version="2")
    repository = started_repository(root, versions=2)
    assert repository.get(version="1").version == "1"


def test_loading_opens_a_model_that_is_new_since_the_last_look(root):
    make_bundle(root)
    repository = started_repository(root)
    tensor_bundle(root)
    repository.load("tensors")
    assert repository.get("tensors").name == "tensors"


def test_models_that_are_unloaded_from_the_start_stay_closed_until_they_are_loaded(root):
    make_bundle(root)
    tensor_bundle(root)
    repository = started_repository(root, unloaded={"tiny"}, default_model="tiny")
    assert [model.name for model in repository.models()] == ["tensors"]
    repository.poll()
    assert states(repository)["tiny", "1"] == "UNAVAILABLE"
    repository.load("tiny")
    assert repository.get("tiny").name == "tiny"
    repository.close()

    nothing = started_repository(root, unloaded={"tiny", "tensors"})
    assert nothing.models() == ()
    nothing.close()


def test_without_model_control_loading_and_unloading_are_forbidden(root):
    make_bundle(root)
    repository = started_repository(root, control=False)
    for ask in (repository.load, repository.unload):
        for name in ("tiny", "nothing"):
            with pytest.raises(Forbidden, match="model_control"):
                ask(name)
    assert repository.get("tiny")


def test_with_several_models_of_text_a_request_must_name_one_unless_there_is_a_default(root):
    make_bundle(root)
    make_bundle(root, name="other")
    with pytest.raises(
        InvalidField, match="several read texts: name one of other, tiny"
    ) as refusal:
        started_repository(root).default_text()
    assert refusal.value.field == "model"
    assert started_repository(root, default_model="other").default_text().name == "other"


def test_without_a_model_of_text_the_error_names_the_models_of_tensors(root):
    tensor_bundle(root)
    with pytest.raises(InvalidField, match="none here reads texts: /v2 serves tensors") as refusal:
        started_repository(root).default_text()
    assert refusal.value.field == "model"


def test_with_a_missing_default_model_the_start_is_refused(root):
    make_bundle(root)
    with pytest.raises(
        StartFailed,
        match="default_model is 'other' and no such model could be opened: there is tiny",
    ):
        started_repository(root, default_model="other")


def test_polling_opens_a_new_version_and_ends_at_close(root):
    make_bundle(root)
    opened = threading.Event()

    def open_model(path):
        model = OPEN_QUICKLY(path)
        if path.name == "2":
            opened.set()
        return model

    repository = started_repository(root, open_model)
    repository.start_polling(0.01)
    make_bundle(root, version="2")
    assert opened.wait(WAIT_S)
    repository.close()
    assert repository.get("tiny").version == "2"
    assert not [thread for thread in threading.enumerate() if thread.name == "poll"]


def test_processes_that_started_at_any_time_poll_at_the_same_moments():
    moments = {now_s + seconds_until_poll(0.5, now_s=now_s) for now_s in (7.0, 7.125, 7.25, 7.375)}
    assert moments == {7.5}
    assert seconds_until_poll(2.0, now_s=1001.5) == 0.5


def test_an_error_does_not_end_the_polling(root):
    make_bundle(root)
    looks, again = count(), threading.Event()

    class Restless(Repository):
        def poll(self):
            if next(looks) == 2:
                again.set()
            raise OSError("the disk is gone for a moment")

    repository = Restless(root, open_model=OPEN_QUICKLY)
    repository.start()
    with capture_logs() as logs:
        repository.start_polling(0.001)
        assert again.wait(WAIT_S)
        repository.close()
    assert {line["event"] for line in logs} == {"the bundles could not be looked at"}
    assert repository.get("tiny")


def test_with_an_interval_of_0_nothing_polls(root):
    make_bundle(root)
    repository = started_repository(root)
    repository.start_polling(0)
    assert not [thread for thread in threading.enumerate() if thread.name == "poll"]
    repository.close()
