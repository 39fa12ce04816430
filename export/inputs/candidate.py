"""The candidate for an export: a module in eval mode, and the evidence on which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from evalmode.export.inputs.axes import Sample
from evalmode.export.inputs.evidence import Evidence
from evalmode.export.module.randomness import Draw

if TYPE_CHECKING:  # an audit uses this file too, and need not load onnx
    from onnx import ModelProto

    from evalmode.export.fingerprint import Fingerprint

# Exports the same weights again, under other seeds. Raises EvalmodeError if that fails.
Twin: TypeAlias = "Callable[[], Fingerprint]"
# The same function of the same inputs as another graph. All rules judge that one.
Rewrite: TypeAlias = "Callable[[ModelProto], ModelProto]"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module and all that its export needs.

    module       the user's module, which the graph is compared with
    exported     a copy that has never run; it computes the same function as `module`, even if its
                 weights differ (the scale of classic dropout is folded into them)
    fresh        another such copy, for a second export
    example      the inputs that the exporter traces
    outputs      the names of the output tensors
    evidence     the probes and rows
    draws        the sites that drew while the evidence was made; a module may store what its first
                 forward draws, and not draw again
    left_out     what the module returns besides tensors
    constants    the arguments of the module that are no tensors
    twins        functions that export it again under other seeds
    rewrite      what is done to each exported graph, if anything
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
    rewrite: Rewrite | None = None
