"""Measures training, the export and the verifier, against torch's own layers where they exist.

    python bench/training.py [--checkpoint runs/languages --bundle bundles/languages/1]

Training steps/s of the float32 network are compared with those of the same network on torch's own
layers: nn.Embedding, nn.Dropout and nn.TransformerEncoder. A second comparison replaces the encoder
alone, and a third compares our Dropout with `nn.Dropout`. Both sides are measured in each round,
and the ratios are within a round. Export and verify are timed as commands, if their inputs are
passed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from evalmode.model.config import TrainConfig, TransformerConfig
from evalmode.model.dropout import Dropout
from evalmode.model.learner import BETAS
from evalmode.model.transformer import Transformer

EVALMODE = str(Path(sys.executable).with_name("evalmode"))
TRAINING = TrainConfig()
# The network of the default model: 60 languages, and 16 hashed n-grams in each position.
NETWORK = TransformerConfig(
    vocabulary=65_536, labels=60, positions=32, ids_per_position=16, ngram_dropout=0.3
)
# Most rows of the default data are padded to 8 positions.
POSITIONS = 8


class TorchEmbedding(nn.Module):
    """The same embedding on torch's own layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocabulary, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.positions, config.width)
        self.ngram_dropout = nn.Dropout(config.ngram_dropout)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T, G) -> (B, T, D)."""
        b, t, g = ids.shape
        weights = self.ngram_dropout(self.table.weight.new_full((b, t, 1, g), 1.0 / g))
        x = (weights @ self.table(ids)).squeeze(2)
        return self.dropout(x + self.positions.weight[:t])


class TorchTransformer(Transformer):
    """The same network on torch's own layers, with dropout in the same places.

    With `encoder_only` the embedding is ours.
    """

    def __init__(self, config: TransformerConfig, *, encoder_only: bool = False) -> None:
        super().__init__(config)
        if not encoder_only:
            self.embedding = TorchEmbedding(config)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.feed_forward,
            # One rate for all places, as in the default network.
            dropout=config.residual_dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.ModuleList()
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)

    def hidden(self, ids: Tensor, real: Tensor) -> Tensor:
        """ids (B, T, G), real (B, T) bool -> (B, T, D)."""
        return self.norm(self.encoder(self.embedding(ids), src_key_padding_mask=~real))


def training_step(network: nn.Module) -> Callable[[], None]:
    """A function that takes one step on a batch of random ids with the optimizer of a training."""
    generator = torch.Generator().manual_seed(0)
    shape = (TRAINING.batch_rows, POSITIONS, NETWORK.ids_per_position)
    ids = torch.randint(1, NETWORK.vocabulary, shape, generator=generator)
    labels = torch.randint(NETWORK.labels, (TRAINING.batch_rows,), generator=generator)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=TRAINING.learning_rate,
        weight_decay=TRAINING.weight_decay,
        betas=BETAS,
        fused=True,
    )
    network.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(ids), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), TRAINING.clip_norm)
        optimizer.step()

    return step


def dropout_step(dropout: nn.Module) -> Callable[[], None]:
    """A function that runs a dropout forward and backward on the default batch, (B, T, D)."""
    x = torch.ones(TRAINING.batch_rows, POSITIONS, NETWORK.width, requires_grad=True)
    gradient = torch.ones_like(x)

    def step() -> None:
        dropout(x).backward(gradient)

    return step


def steps_per_s(step: Callable[[], None], *, seconds: float) -> float:
    """How often `step` runs in a second."""
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
        count += 1
    return count / elapsed


def compare(
    ours: Callable[[], None], theirs: Callable[[], None], *, rounds: int, seconds: float, title: str
) -> tuple[str, str, str]:
    """The median steps/s of both, and the median of their ratios with its range."""
    rates: list[tuple[float, float]] = []
    ours()  # warm up
    theirs()
    for index in track(range(rounds), description=title, transient=True):
        # Either one begins in turn, so a drift of the machine favours none.
        if index % 2 == 0:
            our_rate = steps_per_s(ours, seconds=seconds)
            their_rate = steps_per_s(theirs, seconds=seconds)
        else:
            their_rate = steps_per_s(theirs, seconds=seconds)
            our_rate = steps_per_s(ours, seconds=seconds)
        rates.append((our_rate, their_rate))
    ratios = [our_rate / their_rate for our_rate, their_rate in rates]
    return (
        f"{statistics.median(rate for rate, _ in rates):,.1f}",
        f"{statistics.median(rate for _, rate in rates):,.1f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
    )


def command_s(arguments: Sequence[str]) -> float:
    """The seconds of one evalmode command. Ends the bench with its output if it fails."""
    started = time.perf_counter()
    process = subprocess.run(
        [EVALMODE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        sys.exit(process.stdout)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="also time its export")
    parser.add_argument("--bundle", help="also time its verification")
    parser.add_argument("--seconds", type=float, default=5, help="of each timing (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    arguments = parser.parse_args()
    if arguments.seconds <= 0 or arguments.rounds < 1:
        parser.error("--seconds must be above 0, and --rounds at least 1")

    # A training uses one thread by default: its bits then do not depend on the number of cores.
    torch.set_num_threads(TRAINING.threads)
    torch.manual_seed(TRAINING.seed)
    options = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    table = Table("steps/s", "ours", "torch's", "ratio", title_justify="left")
    for title, encoder_only in (
        ("training, against torch's own layers", False),
        ("training, against nn.TransformerEncoder alone", True),
    ):
        table.add_row(
            title,
            *compare(
                training_step(Transformer(NETWORK)),
                training_step(TorchTransformer(NETWORK, encoder_only=encoder_only)),
                title="training",
                **options,
            ),
        )
    table.add_row(
        "Dropout forward and backward, against nn.Dropout",
        *compare(
            dropout_step(Dropout(TRAINING.dropout)),
            dropout_step(nn.Dropout(TRAINING.dropout)),
            title="dropout",
            **options,
        ),
    )
    Console().print(table)

    for name, source in (("export", arguments.checkpoint), ("verify", arguments.bundle)):
        if source is None:
            continue
        times_s = []
        for _ in track(range(arguments.rounds), description=name, transient=True):
            with tempfile.TemporaryDirectory() as folder:
                out = ["--out", folder] if name == "export" else []
                times_s.append(command_s([name, source, *out]))
        Console().print(
            f"{name}: {statistics.median(times_s):.1f} s, median of {arguments.rounds}",
            highlight=False,
        )


if __name__ == "__main__":
    main()
