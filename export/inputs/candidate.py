"""What is to be exported: a module in eval mode, and the evidence on which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from evalmode.export.inputs.axes import Sample
from evalmode.export.inputs.evidence import Evidence
from evalmode.export.module.randomness import Draw

if TYPE_CHECKING:  # an audit uses this file too, and need not load onnx
    from evalmode.export.fingerprint import Fingerprint

# Exports the same weights again, under other seeds. Raises EvalmodeError where it cannot.
Twin: TypeAlias = "Callable[[], Fingerprint]"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module and all that its export needs.

    module       the user's module, which the graph is compared with
    exported     a copy that has never run; it computes the function of `module`, also where its
                 weights differ (classic dropout, folded into the weights)
    fresh        another such copy, for a second export
    example      the inputs that the exporter traces
    outputs      the names of the output tensors
    evidence     the probes and rows
    draws        the places that drew while the evidence was made: a draw of the first forward that
                 the module keeps is not repeated later
    left_out     what the module answers besides tensors
    constants    what the module is called with besides tensors
    twins        export it again under other seeds
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
