"""What one training step does: the loss, its two figures, the optimizer and its schedule, as
Lightning wants them.

A step depends on the weights, the batch, and (seed, step, rank); on nothing that a kill could lose.
Knows no files.
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

# as Vaswani et al. 2017, section 5.3: a run of a thousand steps cannot average over more
BETAS = (0.9, 0.98)


class Learner(lightning.LightningModule):
    """The network in training, on the batches it is given."""

    def __init__(
        self, network: nn.Module, *, config: TrainConfig, batches: Batches, steps: int
    ) -> None:
        super().__init__()
        self.network, self.config, self.batches, self.steps = network, config, batches, steps

    def train_dataloader(self) -> Batches:
        """The batches; Lightning's own sampler has no part in them."""
        return self.batches

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make this step's dropout masks a function of the seed, the step and the process."""
        torch.manual_seed(step_seed(self.config.seed, step=self.global_step, rank=self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss to descend, and how many of the labelled rows were right."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits, labels = self.network(**inputs), batch["labels"]
        right = (logits.detach().argmax(-1) == labels).sum() / (labels != UNLABELLED).sum().clamp(
            min=1
        )
        return {"loss": loss_of(logits, labels), "accuracy": right}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW (Loshchilov and Hutter 2019), whose decay reaches the weights of linear layers
        alone.
        """
        decayed = [
            module.weight for module in self.network.modules() if isinstance(module, nn.Linear)
        ]
        reached = {id(weight) for weight in decayed}
        others = [weight for weight in self.network.parameters() if id(weight) not in reached]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        # fused: 2 ms a step instead of 7 for a table of three million weights.
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=BETAS, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: pace(step, steps=self.steps, warmup=self.config.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the batches stand."""
        checkpoint["batches"] = self.batches.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Stand there again; Lightning restores a loader only when it was left in the middle of an
        epoch.
        """
        self.batches.load_state_dict(checkpoint["batches"])


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, logits (B, C) against labels (B,); a row with no label is to give every
    label 1 / C.
    """
    log_p = logits.log_softmax(-1)
    given = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)  # (B,)
    return -torch.where(labels == UNLABELLED, log_p.mean(-1), given).mean()


def pace(step: int, *, steps: int, warmup: int) -> float:
    """The learning rate at `step` as a share of its peak: a linear rise, then half a cosine down to
    0 at `steps`.
    """
    warmup = min(warmup, steps // 10)  # a short run warms up too, but not all the way to its end
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """63 bits that no other (seed, step, rank) shares, for all practical purposes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1
