"""Runs the checks and fills the certificate. Knows the order of the rules and none of their reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from evalmode.bundle.certificate import Record
from evalmode.export.checks import (
    batch_invariance,
    census,
    eager_randomness,
    escaped_module,
    held_out,
    parity,
    repeatability,
    stochastic_op,
    training_mode,
)
from evalmode.export.subject import Subject

Progress = Callable[[str], None]


def check_module(
    module: nn.Module, probes: Sequence[Mapping[str, Tensor]], *, progress: Progress
) -> tuple[Record, ...]:
    """The rules that need the module alone; one that fails makes an export pointless."""
    progress(escaped_module.RULE)
    escaped = escaped_module.check(module)
    progress(eager_randomness.RULE)
    return escaped, eager_randomness.check(module, probes)


def check_graph(subject: Subject, *, progress: Progress) -> tuple[tuple[Record, ...], dict[int, tuple[int, ...]]]:
    """The rules that need the graph, and the batch sizes that were found stable, by padded length."""
    records = []
    for rule in (stochastic_op, training_mode):
        progress(rule.RULE)
        records.append(rule.check(subject.model))
    for checked in (census, parity, repeatability, held_out):
        progress(checked.RULE)
        records.append(checked.check(subject))
    progress(batch_invariance.RULE)
    row_counts = batch_invariance.measure(subject)
    records.append(batch_invariance.check(subject, row_counts))
    return tuple(records), row_counts
