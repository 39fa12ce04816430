"""The end of each epoch: its validation loss, the best weights so far, and early stopping."""

from __future__ import annotations

import math
from typing import Any

import lightning
from torch import Tensor, nn

from evalmode.bundle.frontend import FrontEndSpec
from evalmode.errors import EvalmodeError
from evalmode.model.batches import UNLABELLED, Rows
from evalmode.model.metrics import accuracy_and_f1, log_loss, optimal_temperature, predict


class Diverged(EvalmodeError):  # noqa: N818 - read as a sentence: "raise Diverged"
    """The validation loss is not finite, so the weights are lost."""


class Validation(lightning.Callback):
    """Stores the weights of the lowest validation loss, and stops the training.

    1. The loss is measured at the best temperature, as the finished network has it. Otherwise
       epochs with a higher accuracy, but too high scores, would lose to earlier ones.
    2. Rows without a label count in the loss, but not in the temperature.
    3. A lower loss than ever before: the weights are the best ones.
    4. Else, a lower loss of the labelled rows: training continues. At first, a network with even
       scores for all rows has the lowest loss on rows without a label.
    5. Else, the epoch counts against `patience`.

    Every process validates all rows, which are few. So all stop at the same epoch without
    communication.
    """

    def __init__(self, rows: Rows, *, spec: FrontEndSpec, patience: int) -> None:
        self.rows, self.spec, self.patience = rows, spec, patience
        self.best_loss, self.best_labelled_loss = float("inf"), float("inf")
        self.waited, self.epochs = 0, 0
        self.best_weights: dict[str, Tensor] = {}

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Stop a resumed run whose patience was exhausted before it was killed."""
        trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Validate, even after an epoch that `max_minutes` cut short: it may be the best."""
        logits, labels = predict(_network(pl_module), self.rows, spec=self.spec), self.rows.labels
        is_labelled = labels != UNLABELLED
        scaled = logits / optimal_temperature(logits[is_labelled], labels[is_labelled])
        loss = log_loss(scaled, labels)
        labelled_loss = log_loss(scaled[is_labelled], labels[is_labelled])
        accuracy = accuracy_and_f1(logits[is_labelled], labels[is_labelled])["accuracy"]
        pl_module.log_dict({"validation_loss": loss, "validation_accuracy": accuracy})
        self.epochs += 1
        if not math.isfinite(loss):
            raise Diverged(
                f"the validation loss is not finite after epoch {self.epochs}: lower"
                " --learning-rate"
            )
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            weights = _network(pl_module).state_dict()
            self.best_weights = {
                name: tensor.detach().cpu().clone() for name, tensor in weights.items()
            }
        elif labelled_loss < self.best_labelled_loss:
            self.waited = 0
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience
        self.best_labelled_loss = min(labelled_loss, self.best_labelled_loss)

    def state_dict(self) -> dict[str, Any]:
        """The losses, counters and weights that a resumed run continues with."""
        names = ("best_loss", "best_labelled_loss", "waited", "epochs", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the losses, counters and weights of a saved state."""
        for name, value in state_dict.items():
            setattr(self, name, value)


def _network(module: lightning.LightningModule) -> nn.Module:
    network = module.network
    assert isinstance(network, nn.Module)
    return network
