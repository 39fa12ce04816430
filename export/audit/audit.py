"""The expectation-gap audit of a module.

Does every site that drops or adds noise return in training, on average, what it returns in eval?

A site is the innermost module that draws random numbers in a training forward, or that is a dropout
by name. The audit has three parts:

1. `find_sites` runs the samples, finds the sites and captures the calls that reach them.
2. `judge` repeats each captured call in training and in eval. The site runs alone, so that
   non-linear modules after it do not matter. `verdicts.KIND_REPORTS` has the sentences.
3. `surrounding_code` compares the modules around the sites, without noise: a factor beside a
   dropout is not visible at the dropout.

A site that no sample reaches is not found, unless it is a dropout by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.audit import batchnorm
from evalmode.export.audit.find_sites import PossibleSite, Search, find_sites
from evalmode.export.audit.judge import judge
from evalmode.export.audit.site import Kind, SiteReport
from evalmode.export.audit.surrounding_code import Difference, find_differences
from evalmode.export.audit.verdicts import KIND_REPORTS, gap_sentence
from evalmode.export.module.forward import seed_everything
from evalmode.export.module.network import Network
from evalmode.export.module.untouched import untouched

RULE = "expectation-gap"

# One site may be tested three times: its mean, its structure, and the structure again after a
# correction. Each test gets a third of the site's share of alpha.
_TESTS_PER_SITE = 3


@dataclass(frozen=True)
class Audit:
    """The reports on all sites in the order of the modules, and the record that sums them up."""

    sites: tuple[SiteReport, ...]
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
    """Audit a module on samples: its forward's tensors by argument name, of any shape and dtype.

        result = audit(model, [{"input_ids": ids}])
        print(result.record.verdict, [site.kind for site in result.sites])

    `alpha` bounds the probability of any false alarm, over all sites together. `draws` fixes the
    training forwards of each test. None takes as many as detect a gap of a quarter of the drop rate
    99 times in 100, up to `site.MOST_DRAWS`. `progress` gets the path of each site before it is
    judged.

    The same seed gives the same audit. The module, its state and every generator are left as they
    were. Raises ValueError for no samples, or for an alpha or draws out of range, and
    UnusableInputs where no sample runs in either mode.
    """
    if not samples:
        raise ValueError("the audit needs at least one sample")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    if draws is not None and draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws!r}")

    network = Network.of(module)
    with untouched(network):
        # 1. The sites, and the calls that reach them.
        search = find_sites(network, samples, seed=seed)
        findings = list(_sample_findings(samples, search))

        # 2. Each site alone. Bonferroni: all tests of all sites and calls together keep to alpha.
        call_count = sum(len(possible_site.calls) for possible_site in search.sites)
        level = alpha / (_TESTS_PER_SITE * max(call_count, 1))
        norms = batchnorm.batch_norms(search.network.parts)
        sites: list[SiteReport] = []
        possible_sites = search.sites if search.samples_in_training else ()
        for index, possible_site in enumerate(possible_sites):
            progress(possible_site.path or "(root)")
            # A seed per site: its verdict does not depend on how much the sites before it drew.
            seed_everything(seed * 1_000_003 + index + 1)
            sites += judge(search.network, possible_site, search.sites, alpha=level, draws=draws)
            if norms and possible_site.training_draws:
                part = search.network.parts[possible_site.path]
                sample = samples[search.samples_in_training[0]]
                shift = batchnorm.variance_shift(search.network, part, norms, sample)
                if shift is not None:
                    warning = Finding(
                        severity=Severity.WARNING,
                        node=possible_site.path or "(root)",
                        op=possible_site.type,
                        why=shift.sentence,
                        fix=batchnorm.FIX,
                    )
                    findings.append(warning)
            findings += _uncaptured_call_findings(possible_site)

        # 3. The code around the sites.
        if call_count:
            sites, more_findings = _judge_surrounding_code(
                network, search, samples, sites, seed=seed
            )
            findings += more_findings
    return Audit(tuple(sites), _record(sites, findings, alpha))


def _sample_findings(samples: Sequence[Mapping[str, Tensor]], search: Search) -> Iterator[Finding]:
    """Samples that did not run, or that hold nothing.

    A sample that failed is unproven where no training forward ran, else a warning. Empty samples
    are unproven: torch draws nothing for them, so that no site is found.
    """
    severity = Severity.WARNING if search.samples_in_training else Severity.UNPROVEN
    for failure in dict.fromkeys(search.failures):
        yield Finding(
            severity=severity,
            why=f"the module does not run {failure}",
            fix="give samples that a forward accepts in either mode",
        )

    sizes = []
    for index in search.samples_in_training:
        sizes += [tensor.numel() for tensor in samples[index].values() if tensor.ndim]
    if sizes and not any(sizes):
        yield Finding(
            severity=Severity.UNPROVEN,
            why="every sample is empty, so nothing can be measured",
            fix="give samples that hold at least one row",
        )


def _uncaptured_call_findings(possible_site: PossibleSite) -> Iterator[Finding]:
    """Calls that were not judged.

    Unproven where their arguments are unlike those of all that were. A warning where only the
    numbers in the module differ, as those of a counter do.
    """
    new_arguments = "whose arguments are unlike those of the"
    new_state = "before which it held other numbers than before the"
    captured_count = len(possible_site.calls)
    for severity, count, difference in (
        (Severity.UNPROVEN, possible_site.uncaptured_new_arguments, new_arguments),
        (Severity.WARNING, possible_site.uncaptured_new_state, new_state),
    ):
        if count:
            yield Finding(
                severity=severity,
                node=possible_site.path or "(root)",
                op=possible_site.type,
                why=(
                    f"{count} of its {possible_site.call_count} calls were not looked at,"
                    f" {difference} {captured_count} that were"
                ),
                fix="audit it in a module that calls it less often",
            )


def _judge_surrounding_code(
    network: Network,
    search: Search,
    samples: Sequence[Mapping[str, Tensor]],
    sites: Sequence[SiteReport],
    *,
    seed: int,
) -> tuple[list[SiteReport], list[Finding]]:
    """The reports on the sites with those on the code around them, and further findings.

    A factor in that code is a gap. But it may undo the gap of a site: the mask is in one module,
    and its scale in another. The report on the site is then replaced.
    """
    reports, findings = list(sites), []
    differences = find_differences(
        network.copy(parameters=True),
        {possible_site.path for possible_site in search.sites},
        search.training_flags,
        [samples[i] for i in search.samples_in_training if i in search.samples_in_eval],
        seed=seed,
    )
    for difference in differences:
        path, gap = difference.path or "(root)", difference.gap

        # No factor explains the difference.
        if gap is None:
            finding = Finding(
                severity=Severity.WARNING if difference.harmless else Severity.UNPROVEN,
                node=path,
                op=difference.type,
                why=f"noise aside, {difference.reason}",
                fix="do in training what eval does, or compare the two where that matters",
            )
            findings.append(finding)
            continue

        # A factor that undoes the gap of a site.
        index = _undone_gap_index(difference, gap, reports, search.sites)
        if index is not None:
            report = reports[index]
            reports[index] = replace(
                report,
                kind=Kind.MULTIPLICATIVE,
                gap=None if report.gap is None else report.gap * gap,
                gap_interval=None,
                sentence=f"{path} makes up for what it leaves out: the means agree",
                fix="",
                severity=None,
            )
            continue

        # A factor that is a gap.
        report = SiteReport(
            path=difference.path,
            type=difference.type,
            kind=Kind.WRONG_SCALE,
            gap=gap,
            sentence=(
                f"its own code scales {difference.scaled} in one mode alone, beside every dropout:"
                f" {gap_sentence(gap)}"
            ),
            fix="remove the factor, or use it in training and in eval alike",
            severity=KIND_REPORTS[Kind.WRONG_SCALE].severity,
        )
        reports.append(report)
    return reports, findings


def _undone_gap_index(
    difference: Difference,
    gap: float,
    sites: Sequence[SiteReport],
    possible_sites: Sequence[PossibleSite],
) -> int | None:
    """The index of the site whose gap the factor of `difference` undoes; None if it undoes none.

    Only where the site has a single verdict, and is called once per call of the module with the
    factor. Otherwise some of its calls would stay unscaled.
    """
    indices = [index for index, site in enumerate(sites) if site.path == difference.site]
    call_counts = [c.call_count for c in possible_sites if c.path == difference.site]
    if len(indices) != 1 or call_counts != [difference.call_count] or not gap:
        return None
    site = sites[indices[0]]
    if site.severity is not Severity.ERROR or site.gap_interval is None:
        return None
    low, high = site.gap_interval
    return indices[0] if low <= 1 / gap <= high else None


def _record(sites: Sequence[SiteReport], other_findings: Sequence[Finding], alpha: float) -> Record:
    """The record of all sites: one finding for each site that is reported, then the others."""
    findings = []
    for site in sites:
        if site.severity is not None:
            finding = Finding(
                severity=site.severity,
                node=site.name,
                op=site.type,
                why=f"{site.kind}: {site.sentence}",
                fix=site.fix,
            )
            findings.append(finding)
    gap_count = sum(site.severity is Severity.ERROR for site in sites)
    inconclusive_count = sum(site.kind is Kind.INCONCLUSIVE for site in sites)
    failure = "not every site could be judged"
    if gap_count:
        failure = "training and eval differ on average"
    return Record.of(
        RULE,
        [*findings, *other_findings],
        fine="every site passes on in training, on average, what it passes on in eval",
        otherwise=failure,
        measured=f"{len(sites)} sites, {gap_count} with a gap, {inconclusive_count} inconclusive",
        limit=f"0 with a gap, false alarms at most {alpha:g} in all",
        sites=tuple(f"{site.name} ({site.type}): {site.kind}" for site in sites),
    )
