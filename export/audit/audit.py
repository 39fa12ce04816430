"""The expectation-gap audit of any module: every site that drops or adds noise, and whether
training's mean is eval's.

A site is the innermost module that draws random numbers in a training forward, or that is a dropout
by name. Its captured calls are held fixed and it is compared with itself, training against eval, so
that nothing non-linear after it counts. The code around the sites is compared without noise. Does
not know sites that no sample reaches; it names those that are dropouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.audit import batchnorm
from evalmode.export.audit.find_sites import PossibleSite, Search, find
from evalmode.export.audit.judge import judge
from evalmode.export.audit.own_code import Difference, differences
from evalmode.export.audit.site import SEVERITIES, Kind, Site
from evalmode.export.audit.verdicts import gap_sentence
from evalmode.export.module.forward import seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.untouched import untouched

RULE = "expectation-gap"

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
    network = Network.of(module)
    with untouched(network):
        search = find(network, samples, seed=seed)
        sites: list[Site] = []
        findings = [*_failed(search), *_empty(samples, search)]
        norms = batchnorm.batch_norms(search.network.parts)
        # Every site's tests together keep to alpha.
        level = alpha / (_TESTS * max(sum(len(site.calls) for site in search.sites), 1))
        for index, possible in enumerate(search.sites if search.ran else ()):
            progress(possible.path or "(root)")
            seed_everything(seed * 1_000_003 + index + 1)
            part = search.network.parts[possible.path]
            given = _held_by_parent(possible, search.sites)
            sites += judge(
                search.network, possible, search.sites, alpha=level, draws=draws, given=given
            )
            if norms and possible.training:
                sample = samples[search.ran[0]]
                shift = batchnorm.shift(search.network, part, norms, sample)
                findings += [] if shift is None else [_warning(possible, shift)]
            findings += _left_out(possible)
        if any(site.calls for site in search.sites):
            around = differences(
                network.copy(parameters=True),
                {site.path for site in search.sites},
                search.trains,
                [samples[index] for index in search.ran if index in search.ran_in_eval],
                seed=seed,
            )
            for difference in around:
                if difference.gap is None:
                    findings.append(_not_judged(difference))
                elif (place := _made_up_for(sites, search.sites, difference)) is not None:
                    sites[place] = _in_two_modules(sites[place], difference)
                else:
                    sites.append(_around(difference, difference.gap))
    return Audit(tuple(sites), _record(sites, findings, alpha))


def _left_out(possible: PossibleSite) -> Iterator[Finding]:
    """Unproven where calls were not looked at whose arguments are unlike those of all that were; a
    warning where only numbers that the module holds have moved on.
    """
    reasons = (
        (Severity.UNPROVEN, possible.left_out, "whose arguments are unlike those of the"),
        (Severity.WARNING, possible.drifted, "before which it held other numbers than before the"),
    )
    for severity, count, unlike in reasons:
        if count:
            yield Finding(
                severity=severity,
                node=possible.path or "(root)",
                op=possible.kind,
                why=(
                    f"{count} of its {possible.count} calls were not looked at, {unlike}"
                    f" {len(possible.calls)} that were"
                ),
                fix="audit it in a module that calls it less often",
            )


def _made_up_for(
    sites: Sequence[Site], candidates: Sequence[PossibleSite], difference: Difference
) -> int | None:
    """The index of the site whose gap the factor of a module around it undoes: a mask in one module
    and its scale in another.

    Only where the site has one verdict, and each of its calls is one of that module's.
    """
    same = [index for index, site in enumerate(sites) if site.path == difference.site]
    counts = [candidate.count for candidate in candidates if candidate.path == difference.site]
    if len(same) != 1 or counts != [difference.calls] or not difference.gap:
        return None
    interval = sites[same[0]].gap_interval
    wrong = sites[same[0]].severity is Severity.ERROR
    undone = interval is not None and interval[0] <= 1 / difference.gap <= interval[1]
    return same[0] if wrong and undone else None


def _in_two_modules(site: Site, difference: Difference) -> Site:
    assert difference.gap is not None
    return replace(
        site,
        kind=Kind.MULTIPLICATIVE,
        gap=None if site.gap is None else site.gap * difference.gap,
        gap_interval=None,
        sentence=f"{difference.path or '(root)'} makes up for what it leaves out: the means agree",
        fix="",
        severity=None,
    )


def _around(difference: Difference, gap: float) -> Site:
    """A site of its own for a module whose own code scales in one mode alone."""
    return Site(
        path=difference.path,
        type=difference.type,
        kind=Kind.WRONG_SCALE,
        gap=gap,
        sentence=(
            f"its own code scales {difference.of} in one mode alone, beside every dropout:"
            f" {gap_sentence(gap)}"
        ),
        fix="remove the factor, or use it in training and in eval alike",
        severity=SEVERITIES[Kind.WRONG_SCALE],
    )


def _not_judged(difference: Difference) -> Finding:
    """Unproven where a module's own code could not be compared; a warning where the difference is
    none of the noise's.
    """
    return Finding(
        severity=Severity.WARNING if difference.apart else Severity.UNPROVEN,
        node=difference.path or "(root)",
        op=difference.type,
        why=f"noise aside, {difference.why}",
        fix="do in training what eval does, or compare the two where that matters",
    )


def _held_by_parent(possible: PossibleSite, sites: Sequence[PossibleSite]) -> bool:
    """Whether the module around a dropout draws with the same rate: it passes the rate on to a
    function.
    """
    parent, _, name = possible.path.rpartition(".")
    around = [other for other in sites if other.training and other.path == parent and name]
    return any(draw.p == possible.p for other in around for draw in other.training)


def _warning(possible: PossibleSite, shift: batchnorm.Shift) -> Finding:
    return Finding(
        severity=Severity.WARNING,
        node=possible.path or "(root)",
        op=possible.kind,
        why=shift.sentence,
        fix="put the dropout after the last batch normalisation, or leave it out",
    )


def _failed(search: Search) -> Iterator[Finding]:
    """What no forward could show: unproven when none ran, a warning when some did."""
    severity = Severity.WARNING if search.ran else Severity.UNPROVEN
    for failure in dict.fromkeys(search.failures):
        why = f"the module does not run {failure}"
        yield Finding(
            severity=severity, why=why, fix="give samples that a forward accepts in either mode"
        )


def _empty(samples: Sequence[Mapping[str, Tensor]], search: Search) -> Iterator[Finding]:
    """Unproven where no sample holds a row: torch draws nothing for none, so that no site is
    found.
    """
    sizes = [
        tensor.numel() for index in search.ran for tensor in samples[index].values() if tensor.ndim
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
            node=site.name,
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
        sites=tuple(f"{site.name} ({site.type}): {site.kind}" for site in sites),
    )
