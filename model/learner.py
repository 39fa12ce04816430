"""One training step as a Lightning module: the loss, the accuracy, the optimizer and its schedule.

A step depends on the weights, the batch and (seed, step, rank) alone, so a kill loses nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from evalmode.model.batches import UNLABELLED, Batch, Batches
from evalmode.model.config import TrainConfig

# As Vaswani et al. 2017, section 5.3. A run of a thousand steps is too short for the usual 0.999,
# which averages over the last thousand.
BETAS = (0.9, 0.98)


class Learner(lightning.LightningModule):
    """The network in training on `batches`, for at most `steps` steps."""

    def __init__(
        self, network: nn.Module, *, config: TrainConfig, batches: Batches, steps: int
    ) -> None:
        super().__init__()
        self.network, self.config, self.batches, self.steps = network, config, batches, steps

    def train_dataloader(self) -> Batches:
        """The batches, in the order of model/batches.py."""
        return self.batches

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch, so that the dropout masks depend on the seed, the step and the process."""
        torch.manual_seed(step_seed(self.config.seed, step=self.global_step, rank=self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch, and the accuracy on its labelled rows."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits, labels = self.network(**inputs), batch["labels"]
        correct = (logits.detach().argmax(-1) == labels).sum()
        labelled = (labels != UNLABELLED).sum().clamp(min=1)
        return {"loss": loss_of(logits, labels), "accuracy": correct / labelled}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW (Loshchilov and Hutter 2019); only the weights of linear layers decay."""
        decayed = [
            module.weight for module in self.network.modules() if isinstance(module, nn.Linear)
        ]
        decayed_ids = {id(weight) for weight in decayed}
        others = [weight for weight in self.network.parameters() if id(weight) not in decayed_ids]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        # fused: 2 ms a step instead of 7 ms for a table of three million weights.
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=BETAS, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: pace(step, steps=self.steps, warmup=self.config.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the position in the batches."""
        checkpoint["batches"] = self.batches.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the position in the batches.

        Lightning itself restores a loader only in the middle of an epoch.
        """
        self.batches.load_state_dict(checkpoint["batches"])


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) and labels (B,).

    The target of a row without a label is 1 / C for every label.
    """
    log_p = logits.log_softmax(-1)
    label_log_p = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)  # (B,)
    return -torch.where(labels == UNLABELLED, log_p.mean(-1), label_log_p).mean()


def pace(step: int, *, steps: int, warmup: int) -> float:
    """The learning rate at `step` as a share of its peak.

    It rises linearly, then falls along half a cosine to 0 at `steps`.
    """
    # At most a tenth of the steps: a short run must not warm up until its end.
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """A seed of 63 bits; another (seed, step, rank) gives another one, but for a hash collision."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1
