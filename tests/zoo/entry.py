"""An entry of the zoo: a network, the samples that it is exported with, and the verdict that it
deserves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Sample: TypeAlias = dict[str, Tensor]
# A batch of the given sizes: rows, then the sizes of the other axes that vary.
MakeBatch: TypeAlias = Callable[..., Sample]
Sizes: TypeAlias = tuple[tuple[int, ...], ...]

# Of the noise that stands for training: with the small weights that networks start from, attention
# looks everywhere alike, and a mask that is read wrongly hardly shows.
_NOISE = 0.1


def visible(sample: Mapping[str, Tensor]) -> Tensor | None:
    """The positions that are not padding, as a boolean of [rows, length]; None without a mask."""
    mask = sample.get("attention_mask")
    return None if mask is None else mask.bool()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network of the zoo.

    `sizes` are those of the samples that it is exported with, `fresh_sizes` those of the inputs
    that confirm the certificate. `refused` is a part of the reason of a network that must not be
    certified. An `everyday` entry runs in the ordinary test suite. `as_built` keeps the weights
    that the network starts from.
    """

    name: str
    family: str
    factory: Callable[[], nn.Module]
    batch: MakeBatch
    sizes: Sizes
    fresh_sizes: Sizes
    refused: str | None = None
    everyday: bool = False
    as_built: bool = False
    visible: Callable[[Mapping[str, Tensor]], Tensor | None] = visible

    @property
    def reference(self) -> str:
        """The entry as `evalmode export` is given it, without `.build` or `.inputs`."""
        return f"{self.factory.__module__}:{self.factory.__name__}"

    def build(self) -> nn.Module:
        """The network in training mode, with weights as if it had been trained."""
        module = self.factory()
        if not self.as_built:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter += _NOISE * torch.randn_like(parameter)
        return module

    def inputs(self) -> list[Sample]:
        """The samples that the network is exported with."""
        generator = torch.Generator().manual_seed(0)
        return [self.batch(generator, *sizes) for sizes in self.sizes]

    def fresh_inputs(self) -> list[Sample]:
        """Inputs of other values and sizes than the samples."""
        generator = torch.Generator().manual_seed(2**20)
        return [self.batch(generator, *sizes) for sizes in self.fresh_sizes]


def entry(
    family: str,
    batch: MakeBatch,
    *,
    sizes: Sizes,
    fresh_sizes: Sizes,
    refused: str | None = None,
    everyday: bool = False,
    as_built: bool = False,
    visible: Callable[[Mapping[str, Tensor]], Tensor | None] = visible,
) -> Callable[[Callable[[], nn.Module]], Entry]:
    """Make an entry of the function that returns the network; the function's name is the
    entry's.
    """

    def made(factory: Callable[[], nn.Module]) -> Entry:
        return Entry(
            name=factory.__name__,
            family=family,
            factory=factory,
            batch=batch,
            sizes=sizes,
            fresh_sizes=fresh_sizes,
            refused=refused,
            everyday=everyday,
            as_built=as_built,
            visible=visible,
        )

    return made
