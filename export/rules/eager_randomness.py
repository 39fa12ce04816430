"""Rule eager-randomness: a forward of the eval module draws nothing and repeats itself bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.inputs.axes import shapes_of
from evalmode.export.module.forward import as_tensors, copies_of, plain_forward
from evalmode.export.module.network import Network
from evalmode.export.module.outputs import flatten
from evalmode.export.module.randomness import Draw, Unwatched, watch
from evalmode.export.module.untouched import state_of
from evalmode.export.rules.subject import Subject

RULE = "eager-randomness"

# Randomness that does not come from a generator may give two equal answers by chance. Five equal
# answers are unlikely.
_REPEATS = 5
# A finding names this many attributes that changed; a large module may have hundreds.
_NAMED_ATTRIBUTES = 3

_FIX_DRAW = (
    "pass training=self.training, or p=0.0 outside of training, so that nothing is drawn in eval"
    " mode"
)
_FIX_UNWATCHED = (
    "export a module without data-dependent branches: only the branch that runs can be watched"
)


def check(subject: Subject) -> Record:
    """Fail for code that draws in eval mode, and for an answer that does not repeat itself.

    1. Every draw while the evidence was made. These were the module's first forwards, and it may
       have stored what they drew.
    2. Every draw in a forward of each probe. Unproven for a forward that cannot be watched, such as
       one with `torch.cond`. A forward that raises is an error.
    3. If 1 and 2 find nothing: an answer that differs by a bit between forwards of one input. The
       reason is the system's randomness, a clock, a counter or state.
    """
    module = subject.network.module
    probes = [as_tensors(probe) for probe in subject.evidence.probes]
    findings = [_draw_finding(draw) for draw in subject.draws]
    for probe in probes:
        try:
            _, draws_of_probe = watch(module, probe)
            findings += [_draw_finding(draw) for draw in draws_of_probe]
        except Unwatched as error:
            why = f"a forward cannot be watched: {error}"
            findings.append(Finding(severity=Severity.UNPROVEN, why=why, fix=_FIX_UNWATCHED))
        except Exception as error:  # the user's own code, on an input that it should read
            why = f"the forward fails on {shapes_of(probe)}: {type(error).__name__}: {error}"
            findings.append(_error(why, "give inputs that the module reads"))
    if not findings:
        findings = _repeat_findings(subject.network, probes)
    findings = list(dict.fromkeys(findings))
    return Record.of(
        RULE,
        findings,
        fine="no generator was used, and every repeat gave the same bits",
        otherwise="the module is not shown to be free of randomness in eval mode",
        measured=f"{len(findings)} places in {len(probes)} forwards, {_REPEATS} repeats",
        limit="0",
    )


def _draw_finding(draw: Draw) -> Finding:
    rate = "" if draw.p is None else f", p={draw.p:g}"
    return Finding(
        severity=Severity.ERROR,
        node=draw.path or "(root)",
        op=f"{draw.kind}{rate}",
        why=f"{draw.operator} at {draw.line} draws in eval mode",
        fix=_FIX_DRAW,
    )


def _error(why: str, fix: str = "") -> Finding:
    return Finding(severity=Severity.ERROR, why=why, fix=fix)


def _repeat_findings(network: Network, probes: Sequence[Mapping[str, Tensor]]) -> list[Finding]:
    """An error for each answer that differs between forwards of the last probe.

    The last probe runs several times in a row, and once more after the other probes, which shows
    state that another input left in the module.
    """
    module = network.module

    def answer() -> dict[str, Tensor]:
        # Copies, because a forward may write to its input, or return one tensor each time.
        return copies_of(flatten(module(**copies_of(probes[-1]))))

    state_before = state_of(network)
    with plain_forward():
        first, *others = [answer() for _ in range(_REPEATS)]
        if not first:
            return [_error("the forward returns no tensor that could be compared")]
        if any(other.keys() != first.keys() for other in others):
            return [_error("forwards of one input return different numbers of tensors")]
        differing = _differing_names(first, others)
        if not differing:
            for probe in probes[:-1]:
                module(**copies_of(probe))
        state_after = state_of(network)
        if not differing:
            differing = _differing_names(first, [answer()])
    if not differing:
        return []

    # If the module's own state changed, the answer depends on the state, and nothing may be random.
    changed = []
    for name, before in state_before.items():
        if name not in state_after:
            continue
        after = state_after[name]
        # Tensors are compared by their bits, numbers by value.
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            is_equal = before.dtype == after.dtype and _has_same_bits(before, after)
        else:
            is_equal = type(before) is type(after) and before == after
        if not is_equal:
            changed.append(name)
    if changed:
        answers, state = ", ".join(differing), ", ".join(changed[:_NAMED_ATTRIBUTES])
        why = f"{answers} depends on earlier forwards: {state} changes from one to the next"
        return [_error(why, "keep no state in eval mode, or make it an input and an output")]
    fix = "look for the system's randomness, a clock, a counter"
    return [_error(f"{name} differs between forwards of one input", fix) for name in differing]


def _differing_names(first: Mapping[str, Tensor], others: list[dict[str, Tensor]]) -> list[str]:
    names = []
    for name, tensor in first.items():
        if not all(name in other and _has_same_bits(tensor, other[name]) for other in others):
            names.append(name)
    return names


def _has_same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have equal bits: NaN equals NaN, and 0.0 differs from -0.0."""
    if first.shape != second.shape:
        return False
    first_bytes, second_bytes = (
        tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)
    )
    return torch.equal(first_bytes, second_bytes)
