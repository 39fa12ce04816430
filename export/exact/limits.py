"""What a caller may send, for the proof: ranges of inputs, and largest sizes of axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from evalmode.bundle.frontend import FrontEndSpec
from evalmode.bundle.manifest import Manifest
from evalmode.errors import EvalmodeError
from evalmode.export.exact.values import (
    COARSEST,
    FINEST,
    FLOAT32,
    SIGNIFICAND_BITS,
    Bounds,
    bounded,
)
from evalmode.export.graph import Graph


@dataclass(frozen=True, kw_only=True)
class FloatRange:
    """The numbers of a float32 input: multiples of 2^grid from `low` to `high`.

    A zero may be -0.0, because rounding in the caller's code makes it of small negative numbers.
    Raises EvalmodeError for an empty range, and for one beyond what the proof follows.

    >>> FloatRange(low=0, high=255, grid=0)  # pixels
    FloatRange(low=0, high=255, grid=0)
    """

    low: float
    high: float
    grid: int

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise EvalmodeError(f"a range must not be empty, got {self.low:g} to {self.high:g}")
        if not FINEST <= self.grid <= COARSEST:
            raise EvalmodeError(
                f"the step of a range must be from 2^{FINEST} to 2^{COARSEST}, got 2^{self.grid}"
            )
        if max(-self.low, self.high) > 2.0**COARSEST:
            raise EvalmodeError(
                f"a range must lie within 2^{COARSEST}, got {self.low:g} to {self.high:g}"
            )

    @property
    def bounds(self) -> Bounds:
        """What the proof knows of the input."""
        return bounded(
            FLOAT32,
            low=self.low,
            high=self.high,
            grid=self.grid,
            # A wide range has multiples that no float32 is; the input has none of them.
            bits=SIGNIFICAND_BITS,
            negative_zero=True,
            what="the input",
        )


# The smallest and the largest integer of an integer input, or the numbers of a float32 input.
Range: TypeAlias = tuple[int, int] | FloatRange


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a caller may send: ranges of inputs, and largest sizes of axes that vary.

    `prove` describes the names.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> Limits:
        """The limits that a bundle's front end, or the bounds of its inputs, set."""
        ranges: dict[str, Range] = {}
        largest: dict[str, int] = {}
        for tensor in manifest.inputs:
            for bound in tensor.bounds:
                if not bound.part and bound.minimum is not None and bound.maximum is not None:
                    ranges[tensor.name] = (bound.minimum, bound.maximum)
        limits = cls(ranges=ranges, largest=largest)
        if manifest.frontend is not None:
            names = [tensor.name for tensor in manifest.inputs]
            limits = limits.updated(cls.of_frontend(manifest.frontend, names))
        return limits

    @classmethod
    def of_frontend(cls, frontend: FrontEndSpec, names: Iterable[str]) -> Limits:
        """The limits that a front end sets for inputs of these names, which `collate` makes."""
        ranges: dict[str, Range] = {}
        largest: dict[str, int] = {}
        for name in names:
            # The ids, and a mask where positions have one id each.
            ranges[name] = (0, 1 if name == "attention_mask" else frontend.vocabulary - 1)
            largest[f"{name}:1"] = frontend.lengths[-1]
        return cls(ranges=ranges, largest=largest)

    def updated(self, other: Limits) -> Limits:
        """These limits, with those of `other` in the place of equal names."""
        return Limits(
            ranges={**self.ranges, **other.ranges}, largest={**self.largest, **other.largest}
        )

    def within(self, graph: Graph) -> Limits:
        """The limits whose names the graph has."""
        inputs = graph.proto.graph.input
        names = {value.name for value in inputs}
        axes = set()
        for value in inputs:
            for index, dim in enumerate(value.type.tensor_type.shape.dim):
                axes |= {dim.dim_param, f"{value.name}:{index}"}
        return Limits(
            ranges={name: limit for name, limit in self.ranges.items() if name in names},
            largest={name: limit for name, limit in self.largest.items() if name in axes},
        )
