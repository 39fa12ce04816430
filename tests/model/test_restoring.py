"""A state of the right sha256 whose contents do not fit: one sentence, or the right weights."""

from __future__ import annotations

import copy
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evalmode.model.resume import (
    FOLDER,
    STATE_FILE,
    RunMismatch,
    StateUnusable,
    WholeFiles,
    read_state,
)
from evalmode.model.train import Result
from tests.model.test_train import Killed, contents, train, watch_steps

WAY_OUT = "begin anew with --overwrite, or choose another --out"
FOREIGN: tuple[Any, ...] = (
    *(None, True, -1, 7, 10**30, 0.5, float("nan"), "x", b"x"),
    *([], [1], [{}], {}, {"a": 1}, {0: {}}, (1, 2)),
    *(torch.ones(3), torch.tensor(10.0), torch.ones(400, 16), torch.ones(0)),
)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(data, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module", params=[12, 17], ids=["in-epoch-1", "in-epoch-2"])
def killed(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training that ended in the middle of its first, or its second and last epoch."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        watch_steps(patch, die_at=request.param)
        with pytest.raises(Killed):
            train(data, out)
    return out


@pytest.fixture
def out(killed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(killed, tmp_path / "run")


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
    path = put(out, state)
    try:
        train(data, out, resume=True)
    except (StateUnusable, RunMismatch) as error:
        assert str(path) in str(error), what
        assert "\n" not in str(error), what
        assert len(str(error)) < 600, what
        assert isinstance(error, RunMismatch) or str(error).count(WAY_OUT) == 1, what
        return True
    assert contents(out) == contents(finished.checkpoint), what
    return False


@pytest.mark.parametrize("state", [value for value in FOREIGN if not isinstance(value, Path)])
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
    ways = list(paths(whole, depth=2))
    for number, way in enumerate(ways):
        changes: list[tuple[object, ...]] = [(), *((value,) for value in draw.sample(FOREIGN, 3))]
        for change in changes:
            out = shutil.copytree(killed, tmp_path / "run")
            state = changed(whole, way, *change)
            refused += require_sentence_or_right_weights(data, out, finished, state, (way, change))
            shutil.rmtree(out)
    assert refused > 3 * len(ways)
