"""What is certified: the eval module, its ONNX model, and the inputs on which they are held against one another.

Knows no rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from evalmode.bundle.frontend import Ids
from evalmode.bundle.known_answers import Tensors
from evalmode.bundle.session import Session, open_session
from evalmode.export.convert import serialise
from evalmode.export.outputs import flatten
from evalmode.export.witness import plain_forward

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Batches of rows that the training never saw, and the index of the right label of each row."""

    batches: Sequence[Tensors]
    labels: Sequence[Ids]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A module in eval mode and the model made of it.

    `probes` are batches that reach both ends of every dynamic axis; `rows` are single rows (leading dimension 1) by
    padded length.
    """

    module: nn.Module
    model: onnx.ModelProto
    probes: Sequence[Tensors]
    rows: Mapping[int, Sequence[Tensors]]
    held_out: HeldOut | None = None
    provider: str = "cpu"
    threads: int = 1

    @cached_property
    def data(self) -> bytes:
        """The model's bytes, as they go into the bundle."""
        return serialise(self.model)

    @cached_property
    def served(self) -> Session:
        """A session opened as the service opens it."""
        return open_session(self.data, provider=self.provider, threads=self.threads)

    @cached_property
    def plain(self) -> Session:
        """A session without graph optimisation, which would delete a training-mode Dropout and its evidence."""
        return open_session(self.data, provider=self.provider, threads=self.threads, optimise=False)

    def reference(self, inputs: Tensors) -> Arrays:
        """What the module itself answers, by the names of the model's outputs."""
        with plain_forward():
            answers = flatten(self.module(**as_tensors(inputs)))
        names = [output.name for output in self.model.graph.output]
        return {name: _as_array(tensor) for name, tensor in zip(names, answers.values(), strict=True)}


def as_tensors(inputs: Tensors) -> dict[str, Tensor]:
    """NumPy inputs as torch tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


def _as_array(tensor: Tensor) -> npt.NDArray[np.generic]:
    # NumPy has no bfloat16; every one of its numbers is a float32.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
