"""Processes of one server that take turns at trials, and share the outcomes."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evalmode.bundle.errors import BundleCorrupt, BundleError
from evalmode.service.models.shared_trials import SharedTrials, now
from evalmode.service.models.trial import TrialOpener
from tests.service import processes
from tests.service.bundle_folders import WAIT_S, answer, spoil
from tests.service.bundles import make_bundle
from tests.service.harmful_bundles import hanging_when_run


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "shared"
    path.mkdir(0o700)
    return path


def opener(folder: Path, *, timeout_s: float = WAIT_S, **options) -> TrialOpener:
    """The opener of one process. Locks of one process on two open files exclude each other too."""
    return TrialOpener(timeout_s=timeout_s, shared=SharedTrials(folder), **options)


def outcomes(folder: Path) -> dict[Path, str]:
    return {file: file.read_text() for file in folder.glob("trial-*.json")}


def shared_folders(digest: str) -> list[Path]:
    """The folders of all running servers that hold the trial of this bundle."""
    return [
        folder
        for folder in Path("/dev/shm").glob("evalmode-*")
        if any(digest in record for record in outcomes(folder).values())
    ]


def test_only_one_process_has_its_turn_until_it_ends(folder):
    first, second = SharedTrials(folder), SharedTrials(folder)
    assert first.try_take_turn()
    assert first.try_take_turn(), "it has its turn already"
    assert not second.try_take_turn()
    second.take_turn(cancelled=lambda: True)
    first.end_turn()
    second.take_turn(cancelled=lambda: False)
    assert not first.try_take_turn()
    second.end_turn()


def test_a_success_is_taken_over_and_nothing_is_tried_again(bundle, folder):
    first, second = opener(folder), opener(folder)
    model = first.open(bundle)
    before = outcomes(folder)
    copy = second.open(bundle)
    assert outcomes(folder) == before
    assert not second._child.is_running
    assert copy.measured == model.measured
    assert answer(copy) == answer(model)
    first.end_child()


@pytest.mark.parametrize(
    "options", [{"threads": 2}, {"budget_s": 2.0}, {"allow_uncertified": True}]
)
def test_an_outcome_with_other_options_is_not_taken_over(bundle, folder, options):
    for each in (opener(folder), opener(folder, **options)):
        each.open(bundle)
        assert each._child.is_running
        each.end_child()
    assert len(outcomes(folder)) == 2


def test_an_old_success_is_not_taken_over(bundle, folder):
    first, second = opener(folder), opener(folder)
    first.open(bundle)
    (file,) = outcomes(folder)
    record = json.loads(file.read_text())
    record["ended_at"] -= 60
    file.write_text(json.dumps(record))
    second.open(bundle)
    assert json.loads(file.read_text())["ended_at"] > record["ended_at"] + 60
    for each in (first, second):
        each.end_child()


def test_a_process_that_waited_takes_over_a_failure_and_a_later_one_tries_again(tmp_path, folder):
    path = hanging_when_run(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        attempts = [pool.submit(opener(folder, timeout_s=5).open, path) for _ in range(2)]
        errors = {str(attempt.exception()) for attempt in attempts}
    assert len(errors) == 1
    assert "was not finished after 5 s" in errors.pop()
    (before,) = outcomes(folder).values()
    with pytest.raises(BundleError, match="was not finished after 5 s"):
        opener(folder, timeout_s=5).open(path)
    assert outcomes(folder).popitem()[1] != before


def test_a_failure_is_an_outcome_only_for_wishes_before_it(folder):
    shared = SharedTrials(folder)
    assert shared.try_take_turn()
    wished_at = now()
    shared.share("key", {"error": "BundleError", "sentence": "it is broken"})
    assert shared.outcome("key", wished_at=wished_at) is not None
    assert shared.outcome("key", wished_at=now()) is None
    assert shared.outcome("other", wished_at=wished_at) is None
    shared.end_turn()


def test_a_file_that_changes_after_the_trial_is_refused_although_it_passed(tmp_path, folder):
    bundle = make_bundle(tmp_path)
    first = opener(folder)
    first.open(bundle)
    first.end_child()
    spoil(bundle)
    with pytest.raises(BundleCorrupt, match=r"model\.onnx is not the certified file"):
        opener(folder).open(bundle)


def test_a_folder_that_others_can_enter_is_not_used(bundle, folder):
    folder.chmod(0o755)
    each = opener(folder)
    each.open(bundle)
    each.end_child()
    assert not [*folder.iterdir()]


def test_a_folder_that_is_gone_does_no_harm(bundle, folder):
    each = opener(folder)
    folder.rmdir()
    assert each.open(bundle).name == "tiny"
    each.end_child()
    assert not folder.exists()


def test_the_workers_of_a_server_open_a_bundle_after_one_trial(tmp_path):
    # Of a digest that no other test has.
    bundle = make_bundle(tmp_path, name="shared-by-workers")
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    with processes.running(bundle, workers=2, poll_s=0):
        (folder,) = shared_folders(digest)
        (outcome,) = outcomes(folder).values()
        assert json.loads(outcome)["outcome"].keys() >= {"passed", "measured"}
    assert not folder.exists()
