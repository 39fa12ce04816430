"""Compares a state with the training that resumes from it, before Lightning restores it.

Lightning and torch accept a state that does not match the training. They ignore keys, resize
optimizer states, and store values of any type. The training then ends with other weights, or fails
many steps later.

`require_matching_state` refuses a state unless all of this is true, in this order:

1. The record of the run is the same.
2. All parts have the keys, types, lengths and shapes that this training would save.
3. All counters agree with the number of steps.
4. The learning rates and the optimizer's options are those of this training at that step.
5. The counts of epochs and batches are possible after so many steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from evalmode.model.early_stopping import Validation
from evalmode.model.learner import Learner
from evalmode.model.resume import START_OVER, StateUnusable, require_same

# A library's error, or a value from a state, is cut to this length in a message.
MOST_CHARACTERS = 200


def require_matching_state(
    state: Mapping[str, Any],
    *,
    trainer: lightning.Trainer,
    learner: Learner,
    validation: Validation,
    record: dict[str, Any],
    path: Path,
) -> None:
    """Raise StateUnusable unless this training could have saved `state`.

    The message names the part of the state that differs. Raises RunMismatch if a run with other
    options saved it. `state` is a result of `read_state`, `path` is its file, and `record`
    describes this run.
    """
    try:
        # Through JSON, in which a tuple becomes a list, as in the record's file.
        stored = json.loads(json.dumps(state["run"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise mismatch_error(path, "run is not the record of a training") from error
    if stored.keys() != record.keys():
        raise mismatch_error(path, "run is not the record of a training of this version")
    require_same(stored, record, path=path)

    # The structure is compared first: the other functions read the numbers that it must contain.
    difference = (
        _difference_in_structure(state, trainer, learner, validation)
        or _difference_in_counts(state, learner)
        or _difference_in_rates(state, learner)
        or _difference_in_epochs(state, learner)
    )
    if difference:
        raise mismatch_error(path, difference)


def mismatch_error(path: Path, difference: str) -> StateUnusable:
    """The error for the state in the file `path`, which this training cannot restore."""
    return StateUnusable(f"{path} does not fit this training: {difference}: {START_OVER}")


def _difference_in_structure(
    state: Mapping[str, Any],
    trainer: lightning.Trainer,
    learner: Learner,
    validation: Validation,
) -> str | None:
    """The first part whose keys, types, lengths or shapes are not those of this training.

    None if there is no such part.
    """
    configured = learner.configure_optimizers()
    optimizer = configured["optimizer"].state_dict()
    # A new AdamW has no moments yet. A saved one has two for each weight, with the weight's shape.
    weights = [
        weight for group in configured["optimizer"].param_groups for weight in group["params"]
    ]
    optimizer["state"] = {
        index: {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
        for index, weight in enumerate(weights)
    }
    batches = learner.batches.state_dict()
    fit_loop = trainer.fit_loop.state_dict() | {"state_dict": {"combined_loader": [batches]}}
    expected = {
        "state_dict": learner.state_dict(),
        "loops": {"fit_loop": fit_loop},
        "optimizer_states": [optimizer],
        "lr_schedulers": [configured["lr_scheduler"]["scheduler"].state_dict()],  # type: ignore[index]
        "batches": batches,
    }
    for key, value in expected.items():
        part = state[key]
        if key == "loops":
            # Lightning does not restore the other loops for a training.
            part = {"fit_loop": part.get("fit_loop")}
        if difference := _difference(part, value, key):
            return difference

    saved = state["callbacks"]
    callbacks = {"Validation": validation.state_dict()}
    # There are best weights after the first validation.
    saved_validation = saved.get("Validation")
    epochs = saved_validation.get("epochs") if isinstance(saved_validation, dict) else None
    if isinstance(epochs, int) and epochs > 0:
        callbacks["Validation"]["best_weights"] = learner.network.state_dict()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # A state may lack the timer, because --max-minutes may differ from call to call.
        if isinstance(callback, Timer) and "Timer" in saved:
            stages = callback.state_dict()["time_elapsed"]
            callbacks["Timer"] = {"time_elapsed": dict.fromkeys(stages, 0.0)}
    for name, value in callbacks.items():
        if difference := _difference(saved.get(name), value, f"callbacks.{name}"):
            return difference
    return None


def _difference_in_counts(state: Mapping[str, Any], learner: Learner) -> str | None:
    """The first counter that does not agree with the number of steps, or None."""
    loop = state["loops"]["fit_loop"]
    step = _steps_of(loop)
    if not 1 <= step <= learner.steps:
        return f"it has taken {step:,} steps, and the training has {learner.steps:,}"
    counts = {
        "batches.taken": state["batches"]["taken"],
        "the loader's taken": loop["state_dict"]["combined_loader"][0]["taken"],
        "epoch_loop.batch_progress": loop["epoch_loop.batch_progress"]["total"]["ready"],
        "epoch_loop.scheduler_progress": loop["epoch_loop.scheduler_progress"]["total"]["ready"],
        "lr_schedulers.0.last_epoch": state["lr_schedulers"][0]["last_epoch"],
    }
    for index, moments in state["optimizer_states"][0]["state"].items():
        counts[f"optimizer_states.0.state.{index}.step"] = moments["step"].item()
    for name, count in counts.items():
        if count != step:
            return f"it has taken {step:,} steps, and {name} is {count:,}"
    return None


def _difference_in_rates(state: Mapping[str, Any], learner: Learner) -> str | None:
    """The first option of the optimizer that is not this training's at the state's step, or None.

    A learning rate is the base rate times the schedule's factor for that step.
    """
    step = _steps_of(state["loops"]["fit_loop"])
    configured = learner.configure_optimizers()
    schedule: Any = configured["lr_scheduler"]["scheduler"]  # type: ignore[index]
    base_rates = state["lr_schedulers"][0]["base_lrs"]
    if base_rates != schedule.base_lrs:
        return f"lr_schedulers.0.base_lrs is {base_rates} and not {schedule.base_lrs}"

    groups = state["optimizer_states"][0]["param_groups"]
    expected_groups = configured["optimizer"].state_dict()["param_groups"]
    for index, group in enumerate(groups):
        rate = schedule.base_lrs[index] * schedule.lr_lambdas[index](step)
        for key, value in (expected_groups[index] | {"lr": rate}).items():
            if group[key] != value:
                name = f"optimizer_states.0.param_groups.{index}.{key}"
                return f"{name} is {str(group[key])[:MOST_CHARACTERS]} and not {value}"
    return None


def _difference_in_epochs(state: Mapping[str, Any], learner: Learner) -> str | None:
    """The counts of epochs and batches, if they are impossible after so many steps, or None."""
    loop = state["loops"]["fit_loop"]
    step, batch_count = _steps_of(loop), len(learner.batches)
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]["current"]["ready"]
    started, finished = epoch["current"]["ready"], epoch["current"]["processed"]
    validated = state["callbacks"]["Validation"]["epochs"]
    is_possible = (
        # --max-minutes may end an epoch early, so there may be more epochs than full ones.
        started == epoch["total"]["ready"] >= math.ceil(step / batch_count)
        and finished == validated
        and 0 <= started - finished <= 1
        and 1 <= batch <= min(step, batch_count)
    )
    if is_possible:
        return None
    return (
        f"after {step:,} steps it has started {started:,} epochs, finished {finished:,}, validated"
        f" {validated:,}, and is at batch {batch:,}"
    )


def _steps_of(fit_loop: Mapping[str, Any]) -> Any:
    """The number of optimizer steps that were taken."""
    progress = fit_loop["epoch_loop.automatic_optimization.optim_progress"]
    return progress["optimizer"]["step"]["total"]["completed"]


def _difference(value: object, expected: object, name: str) -> str | None:
    """The first difference between `value` and `expected`, named by its path from `name`, or None.

    Keys, types, lengths and shapes are compared. The numbers and texts may differ.
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
        for key in value:
            if key not in expected:
                return f"{name} holds {str(key)[:MOST_CHARACTERS]!r}, which is not part of it"
        for key, part in expected.items():
            if difference := _difference(value[key], part, f"{name}.{key}"):
                return difference
        return None

    if isinstance(expected, list | tuple):
        if type(value) is not type(expected):
            return f"{name} is {_kind(value)} and not {_kind(expected)}"
        assert isinstance(value, Sequence)
        if len(value) != len(expected):
            return f"{name} has {len(value)} entries and not {len(expected)}"
        for index, (entry, part) in enumerate(zip(value, expected, strict=True)):
            if difference := _difference(entry, part, f"{name}.{index}"):
                return difference
        return None

    # An int in place of a float restores the same number. A bool does not count as an int.
    is_number = type(expected) is float and type(value) in (int, float)
    if type(value) is type(expected) or is_number:
        return None
    return f"{name} is {_kind(value)} and not {_kind(expected)}"


def _kind(value: object) -> str:
    """What a value is, for a message."""
    if value is None:
        return "nothing"
    return f"of type {type(value).__name__}"
