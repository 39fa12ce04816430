"""The inputs on which a module and its graph are compared, from samples to verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evalmode.bundle.frontend import Ids
from evalmode.bundle.known_answers import Tensors


@dataclass(frozen=True, kw_only=True)
class HeldOutBatches:
    """Batches of rows that the training never saw, and the index of the right label of each row."""

    batches: Sequence[Tensors]
    labels: Sequence[Ids]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What every rule that runs something runs it on.

    `probes` are batches that reach both ends of every dynamic axis. `rows` are single rows (leading
    dimension 1) by padded length, empty where rows share no run. `dynamic_axes` names, for each
    input, the axes that vary: {"input_ids": {0: "batch", 1: "length"}}. `labelled` says that the
    largest number of the first output is a label.
    """

    probes: Sequence[Tensors]
    rows: Mapping[int, Sequence[Tensors]] = field(default_factory=dict)
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    labelled: bool = False
    held_out: HeldOutBatches | None = None
