"""The expectation-gap audit of any module: every site that drops or adds noise, and whether
training's mean is eval's.

A site is the innermost module that draws random numbers in a training forward, or that is a dropout
by name. Its captured input is held fixed and it is compared with itself, training against eval, so
that nothing non-linear after it counts. Does not know sites that no sample reaches (it names those
that are dropouts), nor the second call of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.audit import batchnorm
from evalmode.export.audit.find_sites import Candidate, Found, find
from evalmode.export.audit.judge import judge
from evalmode.export.audit.site import Kind, Site
from evalmode.export.module.forward import seed_everything
from evalmode.export.module.parts import named_everything, private_copy
from evalmode.export.module.untouched import untouched
from evalmode.export.rules.registry import EXPECTATION_GAP

RULE = EXPECTATION_GAP

# The tests of one site: its mean, its structure, and the structure again after a correction.
_TESTS = 3


@dataclass(frozen=True)
class Audit:
    """Every site in the order of the modules, and the record that sums them up."""

    sites: tuple[Site, ...]
    record: Record


def audit(
    module: nn.Module,
    samples: Sequence[Mapping[str, Tensor]],
    *,
    draws: int | None = None,
    alpha: float = 0.01,
    seed: int = 0,
    progress: Callable[[str], None] = lambda site: None,
) -> Audit:
    """Audit a module on samples: its forward's tensors by argument name, of any shapes and dtypes.

    `alpha` bounds the chance that any site at all is called wrong by accident. `draws` fixes the
    training forwards of each site's test; None takes as many as find gaps of a quarter of the drop
    rate (of .02 at least) 99 times in 100, 20,000 at most. `progress` hears each site's path first.
    The same seed gives the same audit; the module, its state and every generator are left as they
    were. Raises ValueError for no samples, or an alpha or draws out of range, and UnusableInputs
    where no sample runs in either mode.
    """
    if not samples:
        raise ValueError("the audit needs at least one sample")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    if draws is not None and draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws!r}")
    with untouched(module):
        found = find(module, samples, seed=seed)
        sites: list[Site] = []
        warnings: list[Finding] = []
        if found.ran:
            sites, warnings = _audit(
                module, samples, found, draws=draws, alpha=alpha, seed=seed, progress=progress
            )
    return Audit(
        tuple(sites), _record(sites, [*_failed(found), *_empty(samples, found), *warnings], alpha)
    )


def _audit(
    module: nn.Module,
    samples: Sequence[Mapping[str, Tensor]],
    found: Found,
    *,
    draws: int | None,
    alpha: float,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[list[Site], list[Finding]]:
    copied = private_copy(module, parameters=True).eval()
    modules = named_everything(copied)
    norms = batchnorm.batch_norms(modules)
    level = alpha / (_TESTS * max(len(found.candidates), 1))
    sites: list[Site] = []
    warnings: list[Finding] = []
    for index, candidate in enumerate(found.candidates):
        progress(candidate.path or "(root)")
        seed_everything(seed * 1_000_003 + index + 1)
        part = modules[candidate.path]
        given = _held_by_parent(candidate, found.candidates)
        sites += judge(copied, part, candidate, alpha=level, draws=draws, given=given)
        if norms and candidate.training:
            shift = batchnorm.shift(copied, part, norms, samples[found.ran[0]])
            warnings += [] if shift is None else [_warning(candidate, shift)]
    return sites, warnings


def _held_by_parent(candidate: Candidate, every: Sequence[Candidate]) -> bool:
    """Whether the module around a dropout draws with the same rate: it passes the rate on to a
    function.
    """
    parent, _, name = candidate.path.rpartition(".")
    around = [other for other in every if other.training and other.path == parent and name]
    return any(draw.p == candidate.p for other in around for draw in other.training)


def _warning(candidate: Candidate, shift: batchnorm.Shift) -> Finding:
    return Finding(
        severity=Severity.WARNING,
        node=candidate.path or "(root)",
        op=candidate.kind,
        why=shift.sentence,
        fix="put the dropout after the last batch normalisation, or leave it out",
    )


def _failed(found: Found) -> Iterator[Finding]:
    """What no forward could show: unproven when none ran, a warning when some did."""
    severity = Severity.WARNING if found.ran else Severity.UNPROVEN
    for failure in dict.fromkeys(found.failures):
        why = f"the module does not run {failure}"
        yield Finding(
            severity=severity, why=why, fix="give samples that a forward accepts in either mode"
        )


def _empty(samples: Sequence[Mapping[str, Tensor]], found: Found) -> Iterator[Finding]:
    """Unproven where no sample holds a row: torch draws nothing for none, so that no site is
    found.
    """
    sizes = [
        tensor.numel() for index in found.ran for tensor in samples[index].values() if tensor.ndim
    ]
    if sizes and not any(sizes):
        why = "every sample is empty, so nothing can be measured"
        yield Finding(
            severity=Severity.UNPROVEN, why=why, fix="give samples that hold at least one row"
        )


def _record(sites: Sequence[Site], others: Sequence[Finding], alpha: float) -> Record:
    findings = [
        Finding(
            severity=site.severity,
            node=_name(site),
            op=site.type,
            why=f"{site.kind}: {site.sentence}",
            fix=site.fix,
        )
        for site in sites
        if site.severity is not None
    ]
    wrong = sum(site.severity is Severity.ERROR for site in sites)
    unsure = sum(site.kind is Kind.INCONCLUSIVE for site in sites)
    return Record.of(
        RULE,
        [*findings, *others],
        fine="every site passes on in training, on average, what it passes on in eval",
        otherwise=(
            "training and eval differ on average" if wrong else "not every site could be judged"
        ),
        measured=f"{len(sites)} sites, {wrong} with a gap, {unsure} inconclusive",
        limit=f"0 with a gap, false alarms at most {alpha:g} in all",
        sites=tuple(f"{_name(site)} ({site.type}): {site.kind}" for site in sites),
    )


def _name(site: Site) -> str:
    return (site.path or "(root)") + (f", draw {site.draw}" if site.draw else "")
