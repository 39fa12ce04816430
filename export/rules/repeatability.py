"""Rule repeatability: in one session the same input gives the same bits, with graph optimisation
off and as served.
"""

from __future__ import annotations

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.export.rules.subject import Subject

RULE = "repeatability"

# All runs share a session. Every session starts its generators from the same seed, so the first
# runs of two new sessions would agree even on noise.
_RUNS = 5

_FIX = "find what draws; if it is an operator, the rules stochastic-op and training-mode name it"


def check(subject: Subject) -> Record:
    """Fail for every output, in either session, that differs by a bit between runs on a probe."""
    findings = []
    for label, session in (("optimisation off", subject.plain), ("as served", subject.served)):
        # Output -> the number of probes on which one of the runs differs from the first.
        probe_counts: dict[str, int] = {}
        for probe in subject.probes:
            first, *others = [session.run(probe) for _ in range(_RUNS)]
            for name, array in first.items():
                if any(other[name].tobytes() != array.tobytes() for other in others):
                    probe_counts[name] = probe_counts.get(name, 0) + 1
        for name, count in probe_counts.items():
            why = (
                f"{label}: the bits of output {name} differ between runs on one input, on {count}"
                " probes"
            )
            findings.append(Finding(severity=Severity.ERROR, node=name, why=why, fix=_FIX))
    return Record.of(
        RULE,
        findings,
        fine="the same input gives the same bits",
        otherwise="the same input gives different answers",
        measured=(
            f"{len(findings)} outputs differ, {2 * len(subject.probes)} probes, {_RUNS} runs each"
        ),
        limit="0",
    )
