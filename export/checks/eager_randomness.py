"""Rule eager-randomness: a forward of the eval module draws nothing and repeats itself bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.outputs import flatten
from evalmode.export.witness import Unwatched, draws, plain_forward

RULE = "eager-randomness"

# What leaves no generator's state behind may agree by chance once or twice, seldom five times.
_REPEATS = 5


def check(module: nn.Module, probes: Sequence[Mapping[str, Tensor]]) -> Record:
    """Fail for every place that draws in eval on one of the probes, and when two forwards of the last differ by a bit.

    Unproven where a forward cannot be watched (`torch.cond`: the branch that was not taken is not seen).
    """
    found: dict[str, None] = {}  # in order, each once
    try:
        for probe in probes:
            found |= dict.fromkeys(_places(module, probe))
    except Unwatched as error:
        return Record(rule=RULE, verdict=Verdict.UNPROVEN, why="a forward cannot be watched", where=(str(error),))
    if not found:
        found |= dict.fromkeys(_differing(module, probes[-1]))
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if found else Verdict.PASS,
        why="the module is random in eval mode" if found else "no generator moved and every repeat gave the same bits",
        measured=f"{len(found)} places in {len(probes)} forwards, {_REPEATS} repeats",
        limit="0",
        where=tuple(found),
    )


def _places(module: nn.Module, probe: Mapping[str, Tensor]) -> list[str]:
    try:
        return [str(draw) for draw in draws(module, probe)]
    except Unwatched:
        raise
    except Exception as error:  # the user's own code: whatever it raises on an input it should read is a finding
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in probe.items())
        return [f"the forward fails on {shapes}: {type(error).__name__}: {error}"]


def _differing(module: nn.Module, probe: Mapping[str, Tensor]) -> list[str]:
    with plain_forward():
        first, *others = [flatten(module(**probe)) for _ in range(_REPEATS)]
    if not first:
        return ["the forward returns no tensor that could be compared"]
    if any(other.keys() != first.keys() for other in others):
        return ["forwards of one input return different numbers of tensors"]
    return [
        f"{name} differs between forwards of one input"
        for name, tensor in first.items()
        if any(not _same_bits(tensor, other[name]) for other in others)
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)  # equal bits, where == would tell NaN from NaN
