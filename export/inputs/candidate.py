"""What is to be exported: a module in eval mode, and the evidence on which it will be judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from evalmode.export.inputs.axes import Sample
from evalmode.export.inputs.evidence import Evidence
from evalmode.export.module.randomness import Draw

if TYPE_CHECKING:  # an audit has samples too, and need not load onnx
    from evalmode.export.fingerprint import Fingerprint

# Makes another export of the same weights under other seeds. Raises EvalmodeError where it cannot.
Twin: TypeAlias = "Callable[[], Fingerprint]"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module and all that its export needs.

    `example` is what the exporter traces. `exported` is a copy that has never run, and computes the
    function of `module` where the two differ (classic dropout folded into weights); `fresh` is
    another one. `outputs` names the output tensors, `left_out` what the module answers beside
    tensors, `constants` what it is called with beside tensors. `draws` are the places that drew
    while the evidence was made: what a first forward draws and keeps, later ones do not draw.
    `twins` make other exports of it.
    """

    module: nn.Module
    exported: nn.Module
    fresh: nn.Module
    example: Sample
    outputs: tuple[str, ...]
    evidence: Evidence
    draws: tuple[Draw, ...] = ()
    left_out: tuple[str, ...] = ()
    constants: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    twins: tuple[Twin, ...] = ()
