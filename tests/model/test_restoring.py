"""States with the right sha256 and foreign contents: refused, or restored to the right weights."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evalmode.model.learner import Learner
from evalmode.model.resume import (
    STATE_FILE,
    STATE_FOLDER,
    AtomicCheckpointIO,
    RunMismatch,
    StateUnusable,
    read_state,
)
from evalmode.model.train import Result
from tests.model.conftest import Killed, contents, killed_run, train, watch_steps

REMEDY = "start over with --overwrite, or choose another --out"
FOREIGN: tuple[Any, ...] = (
    *(None, True, -1, 7, 10**30, 0.5, float("nan"), "x", b"x"),
    *([], [1], [{}], {}, {"a": 1}, {0: {}}, (1, 2)),
    *(torch.ones(3), torch.tensor(10.0), torch.ones(400, 8), torch.ones(0)),
)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(data, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module", params=[12, 17], ids=["in-epoch-1", "in-epoch-2"])
def killed(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training that ended in the middle of its first, or its second and last epoch."""
    return killed_run(data, tmp_path_factory.mktemp("killed"), die_at=request.param)


def write_state(out: Path, state: object) -> Path:
    """Write `state` as the state of the run in `out`, with the right sha256; return its file."""
    path = out / STATE_FOLDER / STATE_FILE
    AtomicCheckpointIO().save_checkpoint(state, path)  # type: ignore[arg-type]
    return path


def paths(part: object, *, depth: int) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each entry of nested dictionaries and lists.

    Entries below `depth` levels are left out.
    """
    entries = part.items() if isinstance(part, dict) else enumerate(part)  # type: ignore[arg-type]
    for key, value in entries:
        yield (key,)
        if depth > 1 and isinstance(value, dict | list):
            for path in paths(value, depth=depth - 1):
                yield (key, *path)


def changed(state: dict[str, Any], path: tuple[Any, ...], *replacement: object) -> dict[str, Any]:
    """A copy in which the entry at `path` is replaced, or removed if there is no replacement."""
    state = copy.deepcopy(state)
    *parents, key = path
    part: Any = state
    for parent in parents:
        part = part[parent]
    if replacement:
        (part[key],) = replacement
    else:
        del part[key]
    return state


def is_refused(
    data: Path, out: Path, finished: Result, state: object, change: tuple[object, ...]
) -> bool:
    """Whether a run refuses to resume from `state`, with one line that names the file and a remedy.

    If it resumes, it must end with the bytes of the run that was never killed.
    """
    path, refusal = write_state(out, state), None
    try:
        train(data, out, resume=True)
    except (StateUnusable, RunMismatch) as error:
        refusal = error
    if refusal is None:
        assert contents(out) == contents(finished.checkpoint), change
        return False
    message = str(refusal)
    assert str(path) in message, change
    assert "\n" not in message, change
    assert len(message) < 600, change
    assert isinstance(refusal, RunMismatch) or message.count(REMEDY) == 1, change
    return True


@pytest.mark.parametrize("state", FOREIGN)
def test_a_file_that_is_no_state_is_refused_before_any_work(data, out, state):
    path = write_state(out, state)
    # The data does not exist: the state must be refused before the data is read.
    with pytest.raises(StateUnusable, match=f"{STATE_FILE} .* state of a training") as refusal:
        train(data.with_name("absent.csv"), out, resume=True)
    assert str(path) in str(refusal.value)
    assert str(refusal.value).endswith(REMEDY)


@pytest.mark.timeout(300)
def test_a_state_with_a_foreign_part_is_refused_or_gives_the_right_weights(
    data, killed, tmp_path, finished
):
    original, refusals = read_state(killed / STATE_FOLDER / STATE_FILE), 0
    draw = random.Random(0)
    # All entries of the first two levels, and some of the deeper ones.
    chosen = list(paths(original, depth=2))
    chosen += draw.sample([path for path in paths(original, depth=9) if len(path) > 2], 30)
    for path in chosen:
        for replacement in [(), *((value,) for value in draw.sample(FOREIGN, 2))]:
            # A loss may be 7: this state is valid, and no comparison could refuse it.
            if path == ("callbacks", "Validation", "best_loss") and replacement == (7,):
                continue
            out = shutil.copytree(killed, tmp_path / "run")
            state = changed(original, path, *replacement)
            refusals += is_refused(data, out, finished, state, (path, replacement))
            shutil.rmtree(out)
    assert refusals > 2 * len(chosen)


STEPS = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("pytorch-lightning_version",), "2.5.0", "was written by Lightning '2.5.0', and"),
        (("state_dict", "network.head.bias"), torch.ones(3), "has the shape torch.Size([3]) and"),
        (
            ("state_dict", "network.head.bias"),
            torch.ones(2).double(),
            "has the dtype torch.float64",
        ),
        (("optimizer_states", 0, "state", 3, "exp_avg"), torch.ones(2), "has the shape"),
        (("optimizer_states", 0, "state", 3, "step"), torch.tensor(2.0), "state.3.step is 2"),
        (("optimizer_states", 0, "param_groups", 0, "lr"), 99.0, "param_groups.0.lr is 99.0 and"),
        (("optimizer_states", 0, "param_groups", 1, "betas"), [0.9, 0.98], "is of type list and"),
        (("optimizer_states",), [], "optimizer_states has 0 entries and not 1"),
        (("lr_schedulers", 0, "base_lrs"), [0.1, 0.1], "lr_schedulers.0.base_lrs is [0.1, 0.1]"),
        (("lr_schedulers", 0, "last_epoch"), 3, "lr_schedulers.0.last_epoch is 3"),
        (("batches", "taken"), 0, "batches.taken is 0"),
        (("callbacks", "Validation", "waited"), "x", "Validation.waited is of type str and not of"),
        (("callbacks", "Validation", "epochs"), torch.ones(9), "epochs is of type Tensor"),
        (
            ("callbacks", "Validation", "best_weights"),
            {"a": 1},
            "callbacks.Validation.best_weights",
        ),
        ((*STEPS, "step", "total", "completed"), 10**30, "it has taken 1,000,000,000,000,000,000,"),
        (
            (*STEPS, "step", "total", "completed"),
            0,
            "it has taken 0 steps, and the training",
        ),
        (("run", "seed"), 1, "state.ckpt describes another training: seed was 1 and is now 0"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_part_that_differs(
    data, out, path, value, reason
):
    file = write_state(out, changed(read_state(out / STATE_FOLDER / STATE_FILE), path, value))
    before = contents(out / STATE_FOLDER)
    with pytest.raises((StateUnusable, RunMismatch)) as refusal:
        train(data, out, resume=True)
    assert str(file) in str(refusal.value)
    assert reason in str(refusal.value)
    assert contents(out / STATE_FOLDER) == before


def test_a_training_that_is_killed_many_times_resumes_from_each_of_its_states(
    data, tmp_path, monkeypatch, finished
):
    for number, step in enumerate((1, 5, 12, 13, 14, 20, 25)):
        with monkeypatch.context() as patch:
            watch_steps(patch, die_at=step)
            with pytest.raises(Killed):
                train(data, tmp_path, resume=number > 0, save_steps=1)
    steps = watch_steps(monkeypatch)
    train(data, tmp_path, resume=True, save_steps=1)
    assert steps == [25]
    weights = "model.safetensors"
    assert contents(tmp_path)[weights] == contents(finished.checkpoint)[weights]


def test_max_minutes_may_differ_between_two_calls(data, tmp_path, monkeypatch, finished):
    for number, (step, minutes) in enumerate([(7, 9.0), (12, None), (20, 9.0)]):
        with monkeypatch.context() as patch:
            watch_steps(patch, die_at=step)
            with pytest.raises(Killed):
                train(data, tmp_path, resume=number > 0, max_minutes=minutes)
    train(data, tmp_path, resume=True)
    assert contents(tmp_path) == contents(finished.checkpoint)


def test_an_error_of_lightning_while_it_restores_is_one_sentence(data, out, monkeypatch):
    """Not a traceback, although `require_matching_state` did not see the difference."""
    path = out / STATE_FOLDER / STATE_FILE
    state = read_state(path)
    # The same keys, shapes and types, but a meta tensor has no data to copy.
    bias = torch.ones(2, device="meta")
    write_state(out, changed(state, ("state_dict", "network.head.bias"), bias))
    with pytest.raises(StateUnusable, match="does not fit this training: RuntimeError") as refusal:
        train(data, out, resume=True)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_error_of_the_training_itself_is_not_blamed_on_the_state(data, out, monkeypatch):
    def failing(self, batch, batch_idx):
        raise RuntimeError("the training's own")

    monkeypatch.setattr(Learner, "training_step", failing)
    with pytest.raises(RuntimeError, match=r"^the training's own$"):
        train(data, out, resume=True)
