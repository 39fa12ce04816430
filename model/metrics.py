"""The quality of a network: its logits, accuracy and macro-F1, and the temperature of its scores.

Everything runs in eval mode and in a fixed order, so the same weights give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from evalmode.bundle.frontend import FrontEndSpec
from evalmode.model.batches import UNLABELLED, Rows, padded

# accuracy, macro_f1 and rows; where classes have no rows also `classes` and `not_tested`
Measures: TypeAlias = Mapping[str, JsonValue]

# Rows of a batch in eval mode.
EVAL_ROWS = 256
# The range of a temperature: the search is between the first two, then between the last two.
SHARPEST, SOFT, SOFTEST = 0.25, 4.0, 1_000.0


def predict(network: nn.Module, rows: Rows, *, spec: FrontEndSpec) -> npt.NDArray[np.float64]:
    """The logits (N, C) float64 of the rows, in their order.

    The network returns to the mode that it was in, training or eval.
    """
    device = next(network.parameters()).device
    order = np.argsort(rows.lengths, kind="stable")
    outputs: list[Tensor] = []
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), EVAL_ROWS):
                numbers = order[start : start + EVAL_ROWS]
                length = spec.padded_length(int(rows.lengths[numbers[-1]]))
                batch = padded(
                    [rows[number] for number in numbers], rows.labels[numbers], length=length
                )
                del batch["labels"]
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                outputs.append(network(**inputs).cpu())
    finally:
        network.train(was_training)
    logits = torch.cat(outputs).double().numpy()
    return logits[np.argsort(order)]


def log_loss(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """Mean of -log p(label) in nats; the target of a row without a label is 1 / C for each."""
    shifted = logits - logits.max(1, keepdims=True)  # (N, C)
    picked = shifted[np.arange(len(labels)), labels]  # (N,)
    picked = np.where(labels == UNLABELLED, shifted.mean(1), picked)
    return float((np.log(np.exp(shifted).sum(1)) - picked).mean())


def accuracy_and_f1(
    logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Accuracy, and macro-F1: the mean over all classes of 2 tp / (2 tp + fp + fn).

    A class without a row in `labels` counts 0: a mean over the other classes would hide that it was
    never tested. `not_tested` names such classes.
    """
    guesses, count = logits.argmax(1), logits.shape[1]
    hits = np.bincount(labels[guesses == labels], minlength=count)
    guessed, present = np.bincount(guesses, minlength=count), np.bincount(labels, minlength=count)
    f1 = 2 * hits / np.maximum(guessed + present, 1)
    return {"accuracy": float((guesses == labels).mean()), "macro_f1": float(f1.mean())}


def untested_classes(labels: npt.NDArray[np.int64], names: Sequence[str]) -> Measures:
    """The number of classes, and the classes without a row in `labels`; {} if all have one."""
    present = np.bincount(labels, minlength=len(names))
    absent: list[JsonValue] = [name for name, rows in zip(names, present, strict=True) if not rows]
    return {"classes": len(names), "not_tested": absent} if absent else {}


def optimal_temperature(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """The temperature t of the lowest log loss of logits / t (Guo et al. 2017, section 4.2).

    It is higher if so few rows do not support such high scores. N correct rows support a score of
    (N + 1) / (N + 2) by Laplace's rule of succession, so no row may have a higher one. The loss
    alone is no bound: on a few rows that are all correct, its best temperature is 0.
    """
    temperature = _least_loss(logits, labels, sharpest=SHARPEST, softest=SOFT)
    if temperature > 0.999 * SOFT:
        temperature = _least_loss(logits, labels, sharpest=SOFT, softest=SOFTEST)
    behind = logits.max(axis=1, keepdims=True) - logits
    behind[np.arange(len(labels)), logits.argmax(axis=1)] = np.inf  # (N, C), but for the best label
    supported = math.log(len(labels) + 1)  # the log odds of (N + 1) / (N + 2)
    # `not >` instead of `<=`: NaN logits return here, and their loss shows that they are NaN.
    if not _highest_log_odds(behind / temperature) > supported:
        return temperature
    # The odds of every row fall as its logits shrink, so bisection finds the limit. It takes the
    # same steps, and gives the same bits, every time.
    low, high = 0.0, 1 / temperature
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if _highest_log_odds(behind * middle) > supported:
            high = middle
        else:
            low = middle
    return 1 / low


def _least_loss(
    logits: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    *,
    sharpest: float,
    softest: float,
) -> float:
    """The temperature in [sharpest, softest] of the lowest log loss.

    The loss is convex in 1 / t, so golden-section search finds it, with the same bits every time.
    """
    golden = (math.sqrt(5) - 1) / 2
    low, high = 1 / softest, 1 / sharpest
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if log_loss(logits * left, labels) <= log_loss(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)


def _highest_log_odds(behind: npt.NDArray[np.float64]) -> float:
    """The highest log(p / (1 - p)) of the best label of a row.

    behind (N, C): by how much each logit is lower than the row's best one; inf for the best one.
    """
    least = behind.min(axis=1, keepdims=True)
    return float((least[:, 0] - np.log(np.exp(least - behind).sum(axis=1))).max())


@torch.no_grad()
def fold_temperature(head: nn.Linear, temperature: float) -> None:
    """Divide a head's logits by `temperature`, in its weights: the graph gains no operator."""
    head.weight.div_(temperature)
    head.bias.div_(temperature)
