"""What is certified: the eval module, its ONNX model, and the inputs on which they are held against
one another.

Knows no rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.row_counts import stable_row_counts
from evalmode.bundle.session import Session, open_session
from evalmode.export.graph import Graph, graph_of
from evalmode.export.inputs.candidate import HeldOut, Twin
from evalmode.export.module.forward import plain_forward
from evalmode.export.module.outputs import flatten

# The batch sizes that are measured.
COUNTS = tuple(range(1, 65))

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A module in eval mode and the model made of it.

    `probes` are batches that reach both ends of every dynamic axis; `rows` are single rows (leading
    dimension 1) by padded length. `module` is None for a file that came without one. `bounds` holds
    the sizes of axes up to which the graph was traced. `labelled` says that the largest number of
    the first output is a label. `unoptimised` is the graph before constants were folded, `twins`
    make exports of the same weights under other seeds. A model that lies in a file, `path`, comes
    with the graph that was `opened` from it.
    """

    module: nn.Module | None
    model: onnx.ModelProto
    probes: Sequence[Tensors]
    rows: Mapping[int, Sequence[Tensors]]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    bounds: Mapping[str, int] = field(default_factory=dict)
    labelled: bool = False
    held_out: HeldOut | None = None
    unoptimised: onnx.ModelProto | None = None
    twins: Sequence[Twin] = ()
    path: Path | None = None
    opened: Graph | None = None
    provider: str = "cpu"
    threads: int = 1

    @cached_property
    def data(self) -> bytes:
        """The model's bytes, as they go into the bundle."""
        return serialise(self.model)

    @cached_property
    def graph(self) -> Graph:
        """The model as a rule reads it."""
        return self.opened or graph_of(self.model)

    @cached_property
    def row_counts(self) -> dict[int, tuple[int, ...]]:
        """By padded length, the batch sizes of 1..64 at which a row has the bits it has alone, as
        served.
        """
        return {
            length: stable_row_counts(self.served.run, rows, COUNTS)
            for length, rows in self.rows.items()
        }

    @cached_property
    def served(self) -> Session:
        """A session opened as the service opens it."""
        return open_session(self.path or self.data, provider=self.provider, threads=self.threads)

    @cached_property
    def plain(self) -> Session:
        """A session without graph optimisation, which would delete a training-mode Dropout and its
        evidence.
        """
        source = self.path or self.data
        return open_session(source, provider=self.provider, threads=self.threads, optimise=False)

    @cached_property
    def answers(self) -> list[tuple[Arrays, Arrays]]:
        """For each probe what the module answers (nothing without one) and what the graph does, as
        served.
        """
        return [
            ({} if self.module is None else self.reference(probe), self.served.run(probe))
            for probe in self.probes
        ]

    def reference(self, inputs: Tensors) -> Arrays:
        """What the module itself answers, by the names of the model's outputs."""
        assert self.module is not None, "a rule that compares with the module is given one"
        with plain_forward():
            answers = flatten(self.module(**as_tensors(inputs)))
        names = [output.name for output in self.model.graph.output]
        return {
            name: _as_array(tensor) for name, tensor in zip(names, answers.values(), strict=True)
        }


def serialise(model: onnx.ModelProto) -> bytes:
    """The model's bytes: the same for the same model."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def as_tensors(inputs: Tensors) -> dict[str, Tensor]:
    """NumPy inputs as torch tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


def _as_array(tensor: Tensor) -> npt.NDArray[np.generic]:
    # NumPy has no bfloat16; every one of its numbers is a float32.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
