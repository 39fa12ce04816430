"""The end of each epoch: its validation loss, the best weights so far, whether it is time to stop.
Knows no files.
"""

from __future__ import annotations

import math
from typing import Any

import lightning
from torch import Tensor, nn

from evalmode.bundle.frontend import FrontEndSpec
from evalmode.errors import EvalmodeError
from evalmode.model.batches import UNLABELLED, Rows
from evalmode.model.metrics import fit_temperature, log_loss, predict, quality


class Diverged(EvalmodeError):  # noqa: N818 - read as a sentence: "raise Diverged"
    """The weights are lost: nothing that training went on with could be resumed."""


class Validation(lightning.Callback):
    """Validates, remembers the weights of the lowest loss, and stops after `patience` epochs
    without a lower one.

    The loss is that at the best temperature, which is what the finished network will have: without
    it, epochs that are right more often but too sure of themselves would lose to earlier ones.
    Rows without a label count in the loss and not in the temperature. An epoch that lowers the loss
    of the labelled rows alone is no better, but training goes on: early on, a network that says
    nothing of any row does best on the others.

    Every process validates all rows: they are few, and so all processes stop at the same epoch
    without exchanging anything.
    """

    def __init__(self, rows: Rows, *, spec: FrontEndSpec, patience: int) -> None:
        self.rows, self.spec, self.patience = rows, spec, patience
        self.best_loss, self.best_labelled_loss = float("inf"), float("inf")
        self.waited, self.epochs = 0, 0
        self.best_weights: dict[str, Tensor] = {}

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """A run that had run out of patience when it was killed must not go on."""
        trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Validate. Also after an epoch that the clock cut short: its weights may be the best there
        are.
        """
        logits, labels = predict(_network(pl_module), self.rows, spec=self.spec), self.rows.labels
        is_labelled = labels != UNLABELLED
        scaled = logits / fit_temperature(logits[is_labelled], labels[is_labelled])
        loss = log_loss(scaled, labels)
        labelled_loss = log_loss(scaled[is_labelled], labels[is_labelled])
        accuracy = quality(logits[is_labelled], labels[is_labelled])["accuracy"]
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
        """What a resumed run needs to judge as this one would have."""
        names = ("best_loss", "best_labelled_loss", "waited", "epochs", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Judge on from there."""
        for name, value in state_dict.items():
            setattr(self, name, value)


def _network(module: lightning.LightningModule) -> nn.Module:
    network = module.network
    assert isinstance(network, nn.Module)
    return network
