"""Rule eager-randomness: a forward of the eval module draws nothing and repeats itself bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.inputs.axes import shapes_of
from evalmode.export.module.forward import as_tensors, copies_of, plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import flatten
from evalmode.export.module.randomness import Draw, Unwatched, watch
from evalmode.export.module.untouched import state_of
from evalmode.export.rules.subject import Subject

RULE = "eager-randomness"

# What leaves no generator's state behind may agree by chance once or twice, seldom five times.
_REPEATS = 5
_NAMED = 3  # of what moved

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
    # In order, each once. Forwards ran before this rule, and may have kept what they drew.
    found = dict.fromkeys(map(_drawn, subject.draws))
    for probe in probes:
        found |= dict.fromkeys(_places(module, probe))
    if not found:
        found |= dict.fromkeys(_differing(subject.network, probes))
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
        _, drawn = watch(module, probe)
        return [_drawn(draw) for draw in drawn]
    except Unwatched as error:
        return [
            Finding(
                severity=Severity.UNPROVEN,
                why=f"a forward cannot be watched: {error}",
                fix=_FIX_UNWATCHED,
            )
        ]
    except Exception as error:
        # The user's own code: whatever it raises on an input it should read is a finding.
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


def _differing(network: Network, probes: Sequence[Mapping[str, Tensor]]) -> list[Finding]:
    """An error for each answer that another forward of one input changes, and for what moved.

    The last probe is answered several times in a row, and once more after the other probes: what
    another input left behind in the module shows then.
    """
    module = network.module

    def answer() -> dict[str, Tensor]:
        # Copies: a forward may write to its input, or answer with one tensor each time.
        return copies_of(flatten(module(**copies_of(probes[-1]))))

    before = state_of(network)
    with plain_forward():
        first, *others = [answer() for _ in range(_REPEATS)]
        if not first:
            return [_error("the forward returns no tensor that could be compared")]
        if any(other.keys() != first.keys() for other in others):
            return [_error("forwards of one input return different numbers of tensors")]
        differing = _names_that_differ(first, others)
        if not differing:
            for probe in probes[:-1]:
                module(**copies_of(probe))
        after = state_of(network)
        if not differing:
            differing = _names_that_differ(first, [answer()])
    if not differing:
        return []
    moved = [name for name in before if name in after and not _equal(before[name], after[name])]
    if moved:
        answers, state = ", ".join(differing), ", ".join(moved[:_NAMED])
        why = f"{answers} depends on the forwards before: {state} moves from one to the next"
        return [_error(why, "keep no state in eval mode, or make it an input and an output")]
    fix = "look for the system's randomness, a clock, a counter"
    return [_error(f"{name} differs between forwards of one input", fix) for name in differing]


def _names_that_differ(first: Mapping[str, Tensor], others: list[dict[str, Tensor]]) -> list[str]:
    return [
        name
        for name, tensor in first.items()
        if any(name not in other or not _same_bits(tensor, other[name]) for other in others)
    ]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and _same_bits(a, b)
    return type(a) is type(b) and a == b


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    # equal bits, where == would tell NaN from NaN
    return tensor.contiguous().reshape(-1).view(torch.uint8)
