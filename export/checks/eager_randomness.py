"""Rule eager-randomness: a forward of the eval module draws nothing and repeats itself bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Record, Verdict
from evalmode.export.outputs import flatten
from evalmode.export.witness import draws, plain_forward

RULE = "eager-randomness"

# A private generator leaves the global state alone, and one pair of its draws may coincide: five seldom do.
_REPEATS = 5


def check(module: nn.Module, inputs: Mapping[str, Tensor]) -> Record:
    """Fail for every place that draws in eval, and when two forwards of the same input differ by a bit."""
    found = [str(draw) for draw in draws(module, inputs)]
    differing = _differing(module, inputs)
    if differing:
        found.append(f"outputs differ between forwards of one input: {', '.join(differing)}")
    return Record(
        rule=RULE,
        verdict=Verdict.FAIL if found else Verdict.PASS,
        why="the module is random in eval mode" if found else "no generator moved and every repeat gave the same bits",
        measured=f"{len(found)} places, {_REPEATS} forwards",
        limit="0",
        where=tuple(found),
    )


def _differing(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    with plain_forward():
        first = flatten(module(**inputs))
        repeats = [flatten(module(**inputs)) for _ in range(_REPEATS - 1)]
    return [
        name
        for index, (name, tensor) in enumerate(first.items())
        if any(not _same_bits(tensor, list(repeat.values())[index]) for repeat in repeats)
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)  # equal bits, where == would tell NaN from NaN
