"""Real bundles that are opened on trial in a real child process, and servers of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from evalmode.bundle.errors import (
    BundleCorrupt,
    BundleError,
    BundleNotCertified,
    KnownAnswersDiffer,
    ProviderUnavailable,
)
from evalmode.service.models.model import Model
from evalmode.service.models.repository import Repository
from evalmode.service.models.trial import TrialError, TrialOpener
from tests.service import processes
from tests.service.bundle_folders import (
    UNAVAILABLE,
    WAIT_S,
    answer,
    copy_bundle,
    logged_refusals,
    spoil,
    states,
)
from tests.service.bundles import make_bundle, tensor_bundle
from tests.service.harmful_bundles import (
    aborting,
    hanging_when_batched,
    hanging_when_opened,
    hanging_when_run,
    harmless,
)


@pytest.fixture
def opener():
    trial = TrialOpener(timeout_s=WAIT_S)
    yield trial
    trial.end_child()


def refusal_at(step: str, path: Path) -> str:
    """The error of opening a bundle that hangs at this step.

    On a busy machine the child may need seconds to reach the step, so the limit is raised until it
    does.
    """
    sentence, timeout_s = "", 2
    while step not in sentence and timeout_s < 100:
        timeout_s *= 2
        trial = TrialOpener(timeout_s=timeout_s)
        with pytest.raises(BundleError) as refusal:
            trial.open(path)
        sentence = str(refusal.value)
        assert f"was not finished after {timeout_s} s; if the model needs longer" in sentence
        trial.end_child()
    return sentence


def children(parent: int | None = None) -> set[int]:
    """The ids of the child processes of a process, by default of this one."""
    pids = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended since it was listed
            if int(status.read_text().rpartition(")")[2].split()[1]) == (parent or os.getpid()):
                pids.add(int(status.parent.name))
    return pids


def test_a_good_bundle_is_open_with_the_measurements_of_the_child(bundle, opener):
    model, direct = opener.open(bundle), Model.open(bundle)
    assert answer(model) == answer(direct)
    assert model.replayed == direct.replayed
    assert model.row_counts.keys() == direct.row_counts.keys() == {"4", "8", "16"}
    assert [bucket.label for bucket in model.buckets] == ["4", "8", "16"]
    for bucket in model.buckets:
        assert dict(bucket.costs) == model.measured[bucket.label].costs
        assert 1 in bucket.costs


def test_a_bundle_of_tensors_has_the_buckets_that_it_has_without_a_trial(tmp_path, opener):
    path = tensor_bundle(tmp_path)
    model, direct = opener.open(path), Model.open(path)
    assert [bucket.label for bucket in model.buckets] == [bucket.label for bucket in direct.buckets]
    assert model.platform == direct.platform


def test_the_budget_and_the_cache_of_the_measurements_reach_the_child(bundle, tmp_path):
    trial = TrialOpener(timeout_s=WAIT_S, budget_s=0, cache=tmp_path / "cache")
    assert trial.open(bundle).row_counts == {"4": (1,), "8": (1,), "16": (1,)}
    assert [*(tmp_path / "cache").rglob("*.json")]
    trial.end_child()


def test_one_child_opens_several_bundles_and_ends_with_end_child(bundle, opener):
    before = children()
    opener.open(bundle)
    first = children() - before
    opener.open(bundle)
    assert children() - before == first
    assert len(first) == 1
    opener.end_child()
    assert children() == before


def other_answer(answer):
    return dataclasses.replace(answer, outputs={"logits": answer.outputs["logits"] + np.float32(1)})


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda root: spoilt(make_bundle(root)), BundleCorrupt),
        (lambda root: make_bundle(root, change=other_answer), KnownAnswersDiffer),
        (lambda root: uncertified(make_bundle(root)), BundleNotCertified),
        (lambda root: root, BundleError),
    ],
)
def test_a_refusal_by_the_child_equals_that_of_opening_the_bundle_here(
    tmp_path, opener, make, kind
):
    path = make(tmp_path)
    with pytest.raises(BundleError) as direct:
        Model.open(path)
    with pytest.raises(BundleError) as by_child:
        opener.open(path)
    assert type(by_child.value) is type(direct.value)
    assert isinstance(by_child.value, kind)
    assert str(by_child.value) == str(direct.value)


def spoilt(path: Path) -> Path:
    spoil(path)
    return path


def uncertified(path: Path) -> Path:
    (path / "certificate.json").unlink()
    return path


def test_an_uncertified_bundle_is_open_if_that_is_allowed(tmp_path):
    trial = TrialOpener(timeout_s=WAIT_S, allow_uncertified=True)
    assert trial.open(uncertified(make_bundle(tmp_path))).replayed is None
    trial.end_child()


def test_a_missing_provider_is_refused_in_the_same_words(bundle):
    trial = TrialOpener(timeout_s=WAIT_S, provider="none-such")
    with pytest.raises(ProviderUnavailable, match="'none-such' is not available here"):
        trial.open(bundle)
    trial.end_child()


def test_an_unexpected_error_has_the_traceback_of_the_child(bundle):
    trial = TrialOpener(timeout_s=WAIT_S, threads="many")  # type: ignore[arg-type]
    with pytest.raises(TrialError, match=r"Traceback[\s\S]*TypeError"):
        trial.open(bundle)
    trial.end_child()


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (hanging_when_run, "running its known answers"),
        (hanging_when_opened, "making a session of its graph"),
        # By then the server has made its own session.
        (hanging_when_batched, "measuring its batch sizes"),
    ],
)
def test_a_model_that_hangs_is_refused_with_the_step_and_leaves_no_process(tmp_path, make, step):
    before = children()
    assert f"tensors/1 is refused: {step} was not finished" in refusal_at(step, make(tmp_path))
    assert children() == before


def test_after_a_bundle_that_hangs_the_next_one_opens(tmp_path):
    trial = TrialOpener(timeout_s=10)
    with pytest.raises(BundleError, match="raise the setting load_timeout_s"):
        trial.open(hanging_when_run(tmp_path))
    assert trial.open(harmless(tmp_path / "good")).name == "tensors"
    trial.end_child()


def test_a_model_that_aborts_its_process_is_refused_and_the_next_bundle_opens(tmp_path):
    # Its operator draws random numbers: without the flag it would be refused for that.
    opener = TrialOpener(timeout_s=WAIT_S, allow_uncertified=True)
    with pytest.raises(
        BundleError,
        match=r"opened it on trial was ended by SIG[A-Z]+.*\(while running its known answers\)",
    ):
        opener.open(aborting(tmp_path))
    assert opener.open(harmless(tmp_path / "good")).name == "tensors"
    opener.end_child()


def test_a_trial_can_be_cancelled_from_another_thread(tmp_path, opener):
    path = hanging_when_run(tmp_path)
    before = children()
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(opener.open, path)
        while not children() - before:
            assert not opened.done()
        opener.cancel()
        with pytest.raises(BundleError, match="is not opened: the server is stopping"):
            opened.result(WAIT_S)


def test_a_trial_that_has_begun_is_the_one_that_opening_goes_on_with(bundle, opener):
    before = children()
    opener.start_child()
    (child,) = children() - before
    opener.begin(bundle.parent.parent)
    model = opener.open(bundle)
    assert children() - before == {child}
    assert answer(model) == answer(Model.open(bundle))


def test_a_bundle_that_changes_after_its_trial_began_gets_another_trial(tmp_path, opener):
    path = hanging_when_run(tmp_path / "a")
    opener.begin(path)
    copy_bundle(harmless(tmp_path / "b"), path)
    assert opener.open(path).name == "tensors"


def test_a_trial_that_has_begun_and_is_not_wanted_leaves_the_child_free(tmp_path, opener):
    opener.begin(hanging_when_run(tmp_path / "a"))
    assert opener.open(harmless(tmp_path / "b")).name == "tensors"


def test_a_trial_that_nothing_opened_ends_with_the_child(tmp_path, opener):
    before = children()
    opener.begin(hanging_when_run(tmp_path))
    opener.end_child()
    assert children() == before


@pytest.mark.parametrize("bundles", [0, 2])
def test_no_trial_begins_before_the_look_at_a_folder_with_several_bundles_or_none(
    tmp_path, opener, bundles
):
    for version in range(bundles):
        harmless(tmp_path, version=str(version))
    before = children()
    opener.begin(tmp_path)
    opener.begin(tmp_path / "missing")
    assert children() == before


class Swapping(TrialOpener):
    """Replaces the bundle after its trial, before it is opened here."""

    def __init__(self, other: Path) -> None:
        super().__init__(timeout_s=WAIT_S)
        self._other = other

    def _begin(self, path):
        trial = super()._begin(path)
        trial.passed.result(WAIT_S)
        copy_bundle(self._other, path)
        return trial


def test_a_bundle_that_replaces_another_after_its_trial_is_never_opened(tmp_path):
    path = harmless(tmp_path / "a")
    trial = Swapping(hanging_when_opened(tmp_path / "b"))
    with pytest.raises(BundleError, match="was changed while it was opened"):
        trial.open(path)
    trial.end_child()


def repository_of(root: Path, trial: TrialOpener) -> Repository:
    return Repository(
        root, open_model=trial.open, after_opening=trial.end_child, cancel_opening=trial.cancel
    )


def test_a_stuck_bundle_is_refused_and_logged_and_the_next_good_one_takes_over(root):
    harmless(root)
    trial = TrialOpener(timeout_s=10)
    repository = repository_of(root, trial)
    before = children()
    repository.start()
    hanging_when_run(root, version="2")
    with capture_logs() as logs:
        repository.poll()
        assert repository.get("tensors").version == "1"
        repository.poll()
    slow, refusal = logs
    assert slow["event"].startswith("opening a bundle takes long")
    assert (slow["model"], slow["version"]) == ("tensors", "2")
    assert logged_refusals(logs) == [refusal], "it is not tried again while its files do not change"
    assert "was not finished after 10 s" in refusal["reason"]
    assert states(repository)["tensors", "2"] == UNAVAILABLE
    harmless(root, version="3")
    repository.poll()
    assert repository.get("tensors").version == "3"
    assert children() == before
    repository.close()


def test_closing_a_repository_ends_an_opening_at_once_and_logs_nothing(root):
    harmless(root)
    trial = TrialOpener(timeout_s=600)
    repository = repository_of(root, trial)
    repository.start()
    hanging_when_run(root, version="2")
    before = children()
    with capture_logs() as logs:
        repository.start_polling(0.01)
        while not children() - before:
            pass
        repository.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "poll"]
    assert children() == before
    assert logged_refusals(logs) == []


def test_a_server_of_a_stuck_bundle_refuses_to_start_with_one_sentence(tmp_path):
    hanging_when_opened(tmp_path)
    assert "raise the setting load_timeout_s" in processes.refused(tmp_path, load_timeout_s=3)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "certificate.json"])
def test_a_server_of_a_bundle_with_a_fifo_among_its_files_refuses_to_start_at_once(tmp_path, name):
    file = make_bundle(tmp_path) / name
    file.unlink()
    os.mkfifo(file)
    assert f"{name} is a FIFO and not a regular file" in processes.refused(tmp_path)


def test_a_server_starts_with_its_other_models_if_one_is_stuck(tmp_path):
    make_bundle(tmp_path)
    hanging_when_run(tmp_path, name="stuck")
    with processes.running(tmp_path, load_timeout_s=8) as server:
        assert server.started["bundle"] == str(tmp_path / "tiny" / "1")


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_a_signal_ends_a_start_that_is_stuck_and_no_process_is_left(tmp_path):
    hanging_when_run(tmp_path)
    server = subprocess.Popen(
        [sys.executable, *processes.SERVER],
        env=processes.environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        line = json.loads(server.stderr.readline())
        assert line["event"].startswith("opening a bundle takes long")
        (child,) = children(server.pid)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=WAIT_S)
    assert server.returncode == 0
    # The kernel ends the child with its parent, and another process collects it.
    until = time.monotonic() + WAIT_S
    while not has_ended(child):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_without_a_limit_bundles_are_opened_in_the_servers_own_process(bundle):
    with processes.running(bundle, load_timeout_s=0, poll_s=0) as server:
        assert server.started["known_answers"] == "bitwise"
