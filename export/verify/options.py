"""The options of a verification: rules to leave out, inputs for bare files, and limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evalmode.errors import EvalmodeError
from evalmode.export.exact import limits as exact_limits

_MAX_TIME_S, _MAX_MEMORY_MIB = 1_000_000, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits for running one file: its time, and the memory of the process that runs it."""

    time_s: float = 60.0
    memory_mib: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.time_s <= _MAX_TIME_S:
            raise EvalmodeError(
                f"time_limit must be more than 0 and at most {_MAX_TIME_S:,} s, got {self.time_s:g}"
            )
        if not 0 < self.memory_mib <= _MAX_MEMORY_MIB:
            raise EvalmodeError(
                f"memory_limit must be from 1 to {_MAX_MEMORY_MIB:,} MiB, got {self.memory_mib}"
            )


@dataclass(frozen=True, kw_only=True)
class Options:
    """How targets are verified.

    `excluded` names rules to leave out. `samples` are the inputs on which bare files run:

    - None: bare files do not run.
    - An empty sequence: inputs are generated from each file's signature.
    - Mappings from input names to arrays.
    - A reference `package.module:sample_inputs` to user code that returns them.

    `module` is the reference `package.module:factory` of the module that bare files are compared
    with.

    `exact` limits what callers may send, for the proof that nothing rounds. A bundle's manifest has
    limits of its own, which the service enforces. So they come before these.
    """

    excluded: Collection[str] = ()
    samples: Sequence[Mapping[str, Any]] | str | None = None
    module: str | None = None
    limits: Limits = field(default_factory=Limits)
    exact: exact_limits.Limits = field(default_factory=exact_limits.Limits)


DEFAULTS = Options()
