"""Whether a state fits the training that goes on from it, before and while Lightning restores it.

Lightning and torch take much that does not fit: they ignore keys, resize optimizer states, and
store values of any type. The training then ends with other weights, or fails many steps later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from evalmode.model.early_stopping import Validation
from evalmode.model.learner import Learner
from evalmode.model.resume import BEGIN_ANEW, StateUnusable, require_same

MOST_CHARACTERS = 200  # of a reason that is Lightning's or torch's


class MarkRestored(lightning.Callback):
    """Knows whether the restoring is over: what fails from then on is the training's own."""

    def __init__(self) -> None:
        self.is_over = False

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Lightning calls it after the last part of the state is restored."""
        self.is_over = True


def require_fit(
    state: Mapping[str, Any],
    *,
    trainer: lightning.Trainer,
    learner: Learner,
    validation: Validation,
    record: dict[str, Any],
    where: Path,
) -> None:
    """Raise StateUnusable, naming the place in the state, unless this training could have saved it.

    RunMismatch when another run saved it. `state` is what `read_state` returned.
    """
    try:
        stored = json.loads(json.dumps(state["run"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise misfit(where, "run is not the record of a training") from error
    if stored.keys() != record.keys():
        raise misfit(where, "run is not the record of a training of this version")
    require_same(stored, record, where=where)
    difference = _misfit(state, trainer, learner, validation) or _miscount(state, learner)
    if difference:
        raise misfit(where, difference)


def misfit(where: Path, difference: str) -> StateUnusable:
    """The error for a state that cannot be restored."""
    return StateUnusable(f"{where} does not fit this training: {difference}: {BEGIN_ANEW}")


def reason_of(error: Exception) -> str:
    """What Lightning or torch says of a state, as a part of one sentence."""
    words = " ".join(str(error).split())[:MOST_CHARACTERS]
    return f"{type(error).__name__} {words}".strip()


def _misfit(
    state: Mapping[str, Any],
    trainer: lightning.Trainer,
    learner: Learner,
    validation: Validation,
) -> str | None:
    """The first place where the state differs in its keys, types or shapes from one that this
    training would save.
    """
    configured = learner.configure_optimizers()
    optimizer = configured["optimizer"].state_dict()
    weights = [
        weight for group in configured["optimizer"].param_groups for weight in group["params"]
    ]
    optimizer["state"] = {
        number: {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
        for number, weight in enumerate(weights)
    }
    batches = learner.batches.state_dict()
    loops = trainer.fit_loop.state_dict()
    # The other loops are not restored for a training.
    expected = {
        "state_dict": learner.state_dict(),
        "loops": {"fit_loop": loops | {"state_dict": {"combined_loader": [batches]}}},
        "optimizer_states": [optimizer],
        "lr_schedulers": [configured["lr_scheduler"]["scheduler"].state_dict()],  # type: ignore[index]
        "batches": batches,
    }
    for key, value in expected.items():
        part = {"fit_loop": state[key].get("fit_loop")} if key == "loops" else state[key]
        if difference := _difference(part, value, key):
            return difference

    saved = state["callbacks"]
    callbacks = {"Validation": validation.state_dict()}
    # There are best weights as soon as an epoch was validated.
    judged = saved.get("Validation")
    epochs = judged.get("epochs") if isinstance(judged, dict) else None
    if isinstance(epochs, int) and epochs > 0:
        callbacks["Validation"]["best_weights"] = learner.network.state_dict()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # The state may lack it: --max-minutes may change from call to call.
        if isinstance(callback, Timer) and "Timer" in saved:
            stages = callback.state_dict()["time_elapsed"]
            callbacks["Timer"] = {"time_elapsed": dict.fromkeys(stages, 0.0)}
    for name, value in callbacks.items():
        if difference := _difference(saved.get(name), value, f"callbacks.{name}"):
            return difference
    return None


def _miscount(state: Mapping[str, Any], learner: Learner) -> str | None:
    """The first of the state's counters that does not agree with its number of steps."""
    loop = state["loops"]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    step, batches = steps["total"]["completed"], loop["epoch_loop.batch_progress"]
    if not 1 <= step <= learner.steps:
        return f"it has taken {step:,} steps, and the training has {learner.steps:,}"
    counts = {
        "batches.taken": state["batches"]["taken"],
        "the loader's taken": loop["state_dict"]["combined_loader"][0]["taken"],
        "epoch_loop.batch_progress": batches["total"]["ready"],
        "epoch_loop.scheduler_progress": loop["epoch_loop.scheduler_progress"]["total"]["ready"],
        "lr_schedulers.0.last_epoch": state["lr_schedulers"][0]["last_epoch"],
    }
    for number, moments in state["optimizer_states"][0]["state"].items():
        counts[f"optimizer_states.0.state.{number}.step"] = moments["step"].item()
    for name, count in counts.items():
        if count != step:
            return f"it has taken {step:,} steps, and {name} says {count:,}"

    configured = learner.configure_optimizers()
    schedule: Any = configured["lr_scheduler"]["scheduler"]  # type: ignore[index]
    rates = [
        base * factor(step)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    if (base_rates := state["lr_schedulers"][0]["base_lrs"]) != schedule.base_lrs:
        return f"lr_schedulers.0.base_lrs is {base_rates} and not {schedule.base_lrs}"
    groups = state["optimizer_states"][0]["param_groups"]
    expected_groups = configured["optimizer"].state_dict()["param_groups"]
    for number, (group, expected, rate) in enumerate(
        zip(groups, expected_groups, rates, strict=True)
    ):
        for key, value in (expected | {"lr": rate}).items():
            if group[key] != value:
                name = f"optimizer_states.0.param_groups.{number}.{key}"
                return f"{name} is {str(group[key])[:MOST_CHARACTERS]} and not {value}"

    epochs = state["callbacks"]["Validation"]["epochs"]
    epoch, batch = loop["epoch_progress"], batches["current"]["ready"]
    begun, done = epoch["current"]["ready"], epoch["current"]["processed"]
    # The clock may end an epoch early, so there may be more epochs than the steps fill.
    if not (
        begun == epoch["total"]["ready"] >= -(-step // len(learner.batches))
        and done == epochs
        and 0 <= begun - done <= 1
        and 1 <= batch <= min(step, len(learner.batches))
    ):
        return (
            f"after {step:,} steps it has begun {begun:,} epochs, finished {done:,}, validated"
            f" {epochs:,}, and stands at batch {batch:,}"
        )
    return None


def _difference(value: object, expected: object, name: str) -> str | None:
    """Where `value` first differs from `expected` in keys, types, lengths or shapes; numbers and
    texts themselves may differ.
    """
    if isinstance(expected, Tensor):
        if not isinstance(value, Tensor):
            return f"{name} is {_kind(value)} and not a tensor"
        for attribute in ("shape", "dtype", "layout"):
            actual, needed = getattr(value, attribute), getattr(expected, attribute)
            if actual != needed:
                return f"{name} has the {attribute} {actual} and not {needed}"
        return None
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            return f"{name} is {_kind(value)} and not a dictionary"
        for key in expected:
            if key not in value:
                return f"{name} lacks {key!r}"
        if surplus := [key for key in value if key not in expected]:
            return f"{name} holds {str(surplus[0])[:MOST_CHARACTERS]!r}, which is not part of it"
        children = [(key, value[key], part) for key, part in expected.items()]
    elif isinstance(expected, list | tuple):
        if type(value) is not type(expected):
            return f"{name} is {_kind(value)} and not {_kind(expected)}"
        assert isinstance(value, Sequence)
        if len(value) != len(expected):
            return f"{name} has {len(value)} entries and not {len(expected)}"
        children = [(index, *pair) for index, pair in enumerate(zip(value, expected, strict=True))]
    else:
        is_number = type(expected) in (int, float) and type(value) in (int, float)
        if type(value) is type(expected) or (is_number and type(expected) is float):
            return None
        return f"{name} is {_kind(value)} and not {_kind(expected)}"
    for key, part, expected_part in children:
        if difference := _difference(part, expected_part, f"{name}.{key}"):
            return difference
    return None


def _kind(value: object) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"
