"""The progress of a training on the console: a bar with loss and accuracy, and a line an epoch."""

from __future__ import annotations

from typing import Any

import lightning
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# The figures are running means over about 50 steps: those of one batch are noise.
MEMORY = 0.98


class ShowProgress(lightning.Callback):
    """Draws the bar if `console` is a terminal, and prints a line at the end of each epoch."""

    def __init__(self, console: Console, *, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.means: dict[str, float] = {}
        self.bar: Progress | None = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Open the bar at the current step: a resumed run starts in the middle."""
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console
        )
        total = int(trainer.num_training_batches) * self.epochs
        self.bar.add_task("training", total=total, completed=trainer.global_step, figures="")
        self.bar.start()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        *_: Any,
    ) -> None:
        """Update the bar every 10 steps: reading the figures waits for the step on a GPU."""
        if not trainer.is_global_zero or trainer.global_step % 10:
            return
        for name in ("loss", "accuracy"):
            value = float(outputs[name])
            self.means[name] = value + (self.means.get(name, value) - value) * MEMORY**10
        if self.bar is not None:
            figures = f"loss {self.means['loss']:.3f}  accuracy {self.means['accuracy']:.3f}"
            task = self.bar.task_ids[0]
            self.bar.update(
                task,
                completed=trainer.global_step,
                figures=figures,
                description=self._epoch(trainer),
            )

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Print the figures of the epoch. This callback comes after the one that validates."""
        if trainer.is_global_zero:
            figures = self.means | {
                name: float(value) for name, value in trainer.callback_metrics.items()
            }
            line = self._epoch(trainer)
            for name, value in figures.items():
                line += f"  {name.replace('_', ' ')} {value:.3f}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Close the bar at the last step of the run."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=trainer.global_step)
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the bar: an open one leaves the terminal without a cursor."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _epoch(self, trainer: lightning.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{self.epochs}"
