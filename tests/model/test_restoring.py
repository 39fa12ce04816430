"""A state of the right sha256 whose contents do not fit: one sentence, or the right weights."""

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
    FOLDER,
    STATE_FILE,
    RunMismatch,
    StateUnusable,
    WholeFiles,
    read_state,
)
from evalmode.model.train import Result
from tests.model.conftest import Killed, contents, killed_run, train, watch_steps

WAY_OUT = "begin anew with --overwrite, or choose another --out"
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


def put(out: Path, state: object) -> Path:
    """Make `state` the state of the run in `out`, with the right sha256."""
    path = out / FOLDER / STATE_FILE
    WholeFiles().save_checkpoint(state, path)  # type: ignore[arg-type]
    return path


def paths(part: object, *, depth: int) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of nested dictionaries and lists, down to `depth` steps."""
    entries = part.items() if isinstance(part, dict) else enumerate(part)  # type: ignore[arg-type]
    for key, value in entries:
        yield (key,)
        if depth > 1 and isinstance(value, dict | list):
            yield from ((key, *way) for way in paths(value, depth=depth - 1))


def changed(state: dict[str, Any], way: tuple[Any, ...], *change: object) -> dict[str, Any]:
    """A copy in which the entry at `way` is the given value, or away where none is given."""
    state = copy.deepcopy(state)
    *above, key = way
    part: Any = state
    for step in above:
        part = part[step]
    if change:
        part[key] = change[0]
    else:
        del part[key]
    return state


def require_sentence_or_right_weights(
    data: Path, out: Path, finished: Result, state: object, what: object
) -> bool:
    """Whether the state was refused, in one sentence that says where and what to do."""
    path, refusal = put(out, state), None
    try:
        train(data, out, resume=True)
    except (StateUnusable, RunMismatch) as error:
        refusal = error
    if refusal is None:
        assert contents(out) == contents(finished.checkpoint), what
        return False
    sentence = str(refusal)
    assert str(path) in sentence, what
    assert "\n" not in sentence, what
    assert len(sentence) < 600, what
    assert isinstance(refusal, RunMismatch) or sentence.count(WAY_OUT) == 1, what
    return True


@pytest.mark.parametrize("state", FOREIGN)
def test_what_is_no_state_at_all_is_refused_before_any_work(data, out, state):
    path = put(out, state)
    # The data is not there either: nothing has looked for it yet.
    with pytest.raises(StateUnusable, match=f"{STATE_FILE} .* state of a training") as refused:
        train(data.with_name("absent.csv"), out, resume=True)
    assert str(path) in str(refused.value)
    assert str(refused.value).endswith(WAY_OUT)


@pytest.mark.timeout(300)
def test_a_state_with_a_foreign_part_is_refused_or_gives_the_right_weights(
    data, killed, tmp_path, finished
):
    whole, refused = read_state(killed / FOLDER / STATE_FILE), 0
    draw = random.Random(0)
    # Every entry of the first two levels, and some of those below.
    ways = list(paths(whole, depth=2))
    ways += draw.sample([way for way in paths(whole, depth=9) if len(way) > 2], 30)
    for way in ways:
        for change in [(), *((value,) for value in draw.sample(FOREIGN, 2))]:
            if way == ("callbacks", "Validation", "best_loss") and change == (7,):
                continue  # a number that may well be a loss
            out = shutil.copytree(killed, tmp_path / "run")
            state = changed(whole, way, *change)
            refused += require_sentence_or_right_weights(data, out, finished, state, (way, change))
            shutil.rmtree(out)
    assert refused > 2 * len(ways)


STEPS = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer")


@pytest.mark.parametrize(
    ("way", "value", "reason"),
    [
        (("pytorch-lightning_version",), "2.5.0", "is of Lightning '2.5.0', and"),
        (("state_dict", "network.head.bias"), torch.ones(3), "has the shape torch.Size([3]) and"),
        (
            ("state_dict", "network.head.bias"),
            torch.ones(2).double(),
            "has the dtype torch.float64",
        ),
        (("optimizer_states", 0, "state", 3, "exp_avg"), torch.ones(2), "has the shape"),
        (("optimizer_states", 0, "state", 3, "step"), torch.tensor(2.0), "state.3.step says 2"),
        (("optimizer_states", 0, "param_groups", 0, "lr"), 99.0, "param_groups.0.lr is 99.0 and"),
        (("optimizer_states", 0, "param_groups", 1, "betas"), [0.9, 0.98], "is of type list and"),
        (("optimizer_states",), [], "optimizer_states has 0 entries and not 1"),
        (("lr_schedulers", 0, "base_lrs"), [0.1, 0.1], "lr_schedulers.0.base_lrs is [0.1, 0.1]"),
        (("lr_schedulers", 0, "last_epoch"), 3, "lr_schedulers.0.last_epoch says 3"),
        (("batches", "taken"), 0, "batches.taken says 0"),
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
def test_a_state_that_does_not_fit_says_where(data, out, way, value, reason):
    path = put(out, changed(read_state(out / FOLDER / STATE_FILE), way, value))
    before = contents(out / FOLDER)
    with pytest.raises((StateUnusable, RunMismatch)) as refused:
        train(data, out, resume=True)
    assert str(path) in str(refused.value)
    assert reason in str(refused.value)
    assert contents(out / FOLDER) == before


def test_every_state_of_a_training_fits_it_also_after_it_was_killed_again_and_again(
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


def test_the_clock_may_be_set_and_unset_between_two_calls(data, tmp_path, monkeypatch, finished):
    for number, (step, minutes) in enumerate([(7, 9.0), (12, None), (20, 9.0)]):
        with monkeypatch.context() as patch:
            watch_steps(patch, die_at=step)
            with pytest.raises(Killed):
                train(data, tmp_path, resume=number > 0, max_minutes=minutes)
    train(data, tmp_path, resume=True)
    assert contents(tmp_path) == contents(finished.checkpoint)


def test_what_lightning_refuses_while_it_restores_is_one_sentence(data, out, monkeypatch):
    """A quirk that the comparison does not know of must not reach the user as a traceback."""
    path = out / FOLDER / STATE_FILE
    state = read_state(path)
    # The same keys, shapes and types, and nothing that can be copied.
    bias = torch.ones(2, device="meta")
    put(out, changed(state, ("state_dict", "network.head.bias"), bias))
    with pytest.raises(StateUnusable, match="does not fit this training: RuntimeError") as refused:
        train(data, out, resume=True)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_error_of_the_training_itself_is_not_blamed_on_the_state(data, out, monkeypatch):
    def failing(self, batch, batch_idx):
        raise RuntimeError("the training's own")

    monkeypatch.setattr(Learner, "training_step", failing)
    with pytest.raises(RuntimeError, match=r"^the training's own$"):
        train(data, out, resume=True)
