"""What is asked of a verification beside the structure. Knows no rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evalmode.errors import EvalmodeError

_LONGEST_S, _LARGEST_MIB = 1_000_000, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What it may cost to run one file: seconds, and MiB of memory of the process that runs it."""

    time_s: float = 60.0
    memory_mib: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.time_s <= _LONGEST_S:
            raise EvalmodeError(
                f"time_limit must be more than 0 and at most {_LONGEST_S:,} s, got {self.time_s:g}"
            )
        if not 0 < self.memory_mib <= _LARGEST_MIB:
            raise EvalmodeError(
                f"memory_limit must be from 1 to {_LARGEST_MIB:,} MiB, got {self.memory_mib}"
            )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Rules to leave out, inputs to run bare files on, and what running a file may cost.

    `samples` map input names to arrays, or are the reference of the user's code that has them; none
    at all (an empty sequence) asks for inputs that are made of each file's signature. `module` is
    the reference of what the files are to be compared with.
    """

    excluded: Collection[str] = ()
    samples: Sequence[Mapping[str, Any]] | str | None = None
    module: str | None = None
    limits: Limits = field(default_factory=Limits)


DEFAULTS = Options()
