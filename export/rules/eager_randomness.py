"""Rule eager-randomness: a forward of the eval module draws nothing and repeats itself bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.inputs.axes import shapes_of
from evalmode.export.module.forward import as_tensors, copies_of, plain_forward
from evalmode.export.module.outputs import flatten
from evalmode.export.module.randomness import Draw, Unwatched, draws
from evalmode.export.rules.subject import Subject

RULE = "eager-randomness"

# What leaves no generator's state behind may agree by chance once or twice, seldom five times.
_REPEATS = 5

_FIX = (
    "pass training=self.training, or p=0.0 outside of training, so that nothing is drawn in eval"
    " mode"
)
_FIX_UNWATCHED = (
    "export a module without data-dependent branches: the branch that was not taken is not seen"
)


def check(subject: Subject) -> Record:
    """Fail for every place that draws in eval on one of the probes, and when two forwards of the
    last differ by a bit.

    Unproven where a forward cannot be watched (`torch.cond`: the branch that was not taken is not
    seen).
    """
    module = subject.network.module
    probes = [as_tensors(probe) for probe in subject.evidence.probes]
    found: dict[Finding, None] = {}  # in order, each once
    for probe in probes:
        found |= dict.fromkeys(_places(module, probe))
    if not found:
        found |= dict.fromkeys(_differing(module, probes[-1]))
    return Record.of(
        RULE,
        found,
        fine="no generator moved and every repeat gave the same bits",
        otherwise="the module is not shown to be free of randomness in eval mode",
        measured=f"{len(found)} places in {len(probes)} forwards, {_REPEATS} repeats",
        limit="0",
    )


def _places(module: nn.Module, probe: Mapping[str, Tensor]) -> list[Finding]:
    try:
        return [_drawn(draw) for draw in draws(module, probe)]
    except Unwatched as error:
        return [
            Finding(
                severity=Severity.UNPROVEN,
                why=f"a forward cannot be watched: {error}",
                fix=_FIX_UNWATCHED,
            )
        ]
    except (
        Exception
    ) as error:  # the user's own code: whatever it raises on an input it should read is a finding
        why = f"the forward fails on {shapes_of(probe)}: {type(error).__name__}: {error}"
        return [_error(why, "give inputs that it reads")]


def _drawn(draw: Draw) -> Finding:
    rate = "" if draw.p is None else f", p={draw.p:g}"
    return Finding(
        severity=Severity.ERROR,
        node=draw.path or "(root)",
        op=f"{draw.kind}{rate}",
        why=f"{draw.operator} at {draw.line} draws in eval mode",
        fix=_FIX,
    )


def _error(why: str, fix: str = "") -> Finding:
    return Finding(severity=Severity.ERROR, why=why, fix=fix)


def _differing(module: nn.Module, probe: Mapping[str, Tensor]) -> list[Finding]:
    with plain_forward():
        # Copies: a forward may write to its input, or answer with one tensor each time.
        runs = [copies_of(flatten(module(**copies_of(probe)))) for _ in range(_REPEATS)]
    first, *others = runs
    if not first:
        return [_error("the forward returns no tensor that could be compared")]
    if any(other.keys() != first.keys() for other in others):
        return [_error("forwards of one input return different numbers of tensors")]
    return [
        _error(
            f"{name} differs between forwards of one input",
            "look for the system's randomness, a clock, a counter",
        )
        for name, tensor in first.items()
        if any(not _same_bits(tensor, other[name]) for other in others)
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    # equal bits, where == would tell NaN from NaN
    return tensor.contiguous().reshape(-1).view(torch.uint8)
