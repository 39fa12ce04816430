"""What is to be exported: a module in eval mode, the axes that vary, and the inputs on which it
will be judged.

Knows no rule, no ONNX and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn

from evalmode.bundle.frontend import Ids
from evalmode.bundle.known_answers import Tensors
from evalmode.export.fingerprint import Fingerprint

BATCH = "batch"

Sample: TypeAlias = Mapping[str, Tensor]
# For each input, the axes that vary and their names: {"input_ids": {0: "batch", 1: "length"}}.
Axes: TypeAlias = Mapping[str, Mapping[int, str]]


# Makes another export of the same weights under other seeds. Raises EvalmodeError where it cannot
# be made.
Twin: TypeAlias = Callable[[], Fingerprint]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Batches of rows that the training never saw, and the index of the right label of each row."""

    batches: Sequence[Tensors]
    labels: Sequence[Ids]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module and all that its export needs.

    `example` is what the exporter traces; `probes` are batches that reach both ends of every axis;
    `rows` are single rows (leading dimension 1) by padded length, none where rows share no run.
    `exported` computes the function of `module` where the two differ (classic dropout folded into
    weights); `fresh` is a copy of it that has never run. `labelled` says that the largest number of
    the first output is a label. `left_out` names what the module answers beside tensors,
    `constants` what it is called with beside tensors. `twins` make other exports of it.
    """

    module: nn.Module
    exported: nn.Module
    fresh: nn.Module
    example: Sample
    dynamic_axes: Axes
    outputs: tuple[str, ...]
    probes: Sequence[Tensors]
    rows: Mapping[int, Sequence[Tensors]]
    labelled: bool = False
    left_out: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    constants: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    twins: tuple[Twin, ...] = ()
