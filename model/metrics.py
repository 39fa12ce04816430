"""How well a network answers: logits of many rows, accuracy, macro-F1, and the temperature that
makes scores honest.

Everything is in eval mode and in a fixed order, so the same weights give the same figures. Knows
nothing of training.
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
from evalmode.model.batches import Rows, padded

# accuracy, macro_f1 and rows; where classes have no rows also `classes` and `not_tested`
Measures: TypeAlias = Mapping[str, JsonValue]

EVAL_ROWS = 256
# what a temperature may be: on a few rows, all of them right, the best would be 0
SHARPEST, SOFTEST = (0.25, 4.0)


def predict(network: nn.Module, rows: Rows, *, spec: FrontEndSpec) -> npt.NDArray[np.float64]:
    """Logits (N, C) float64 of the rows, in their order; the network is left as it was, in training
    or not.
    """
    device = next(network.parameters()).device
    order = np.argsort(rows.lengths, kind="stable")
    found: list[Tensor] = []
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
                found.append(
                    network(**{name: tensor.to(device) for name, tensor in batch.items()}).cpu()
                )
    finally:
        network.train(was_training)
    logits = torch.cat(found).double().numpy()
    return logits[np.argsort(order)]


def log_loss(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """Mean of -log p(label) in nats."""
    shifted = logits - logits.max(1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    return float((np.log(np.exp(shifted).sum(1)) - picked).mean())


def quality(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, and macro-F1: the mean over all classes of 2 tp / (2 tp + fp + fn).

    A class without a row among `labels` counts 0: nothing was seen of how well it is told, and a
    mean over the others would hide that. `not_tested` names such classes.
    """
    guesses, count = logits.argmax(1), logits.shape[1]
    hits = np.bincount(labels[guesses == labels], minlength=count)
    guessed, present = np.bincount(guesses, minlength=count), np.bincount(labels, minlength=count)
    f1 = 2 * hits / np.maximum(guessed + present, 1)
    return {"accuracy": float((guesses == labels).mean()), "macro_f1": float(f1.mean())}


def not_tested(labels: npt.NDArray[np.int64], names: Sequence[str]) -> Measures:
    """How many classes there are and which of them have no row among `labels`; {} for none."""
    present = np.bincount(labels, minlength=len(names))
    absent: list[JsonValue] = [name for name, rows in zip(names, present, strict=True) if not rows]
    return {"classes": len(names), "not_tested": absent} if absent else {}


def fit_temperature(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """The t in [SHARPEST, SOFTEST] that minimises the log loss of logits / t (Guo et al. 2017,
    section 4.2).

    The loss is convex in 1 / t, so golden-section search finds it, with the same bits every time.
    """
    golden = (math.sqrt(5) - 1) / 2
    low, high = 1 / SOFTEST, 1 / SHARPEST
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if log_loss(logits * left, labels) <= log_loss(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)


@torch.no_grad()
def fold_temperature(head: nn.Linear, temperature: float) -> None:
    """Divide a head's logits by `temperature`, in its weights: the graph gains no operator."""
    head.weight.div_(temperature)
    head.bias.div_(temperature)
