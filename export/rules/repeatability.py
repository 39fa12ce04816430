"""Rule repeatability: in one session the same input gives the same bits, with graph optimisation
off and as served.
"""

from __future__ import annotations

from evalmode.bundle.certificate import Finding, Record, Severity
from evalmode.bundle.session import Session
from evalmode.export.rules.subject import Subject

RULE = "repeatability"

# Every session starts its generators alike, so two fresh sessions agree even on noise: the runs
# share one.
_RUNS = 5


def check(subject: Subject) -> Record:
    """Fail for every probe and session under which one of the runs differs by a bit."""
    differing = {
        kind: _unstable(subject, session)
        for kind, session in (("optimisation off", subject.plain), ("as served", subject.served))
    }
    findings = [
        Finding(
            severity=Severity.ERROR,
            node=name,
            why=(
                f"{kind}: the bits of output {name} differ between runs on one input, on"
                f" {len(indices)} probes"
            ),
            fix=(
                "find what draws: the rules stochastic-op and training-mode name it where it is an"
                " operator"
            ),
        )
        for kind, found in differing.items()
        for name, indices in found.items()
    ]
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


def _unstable(subject: Subject, session: Session) -> dict[str, list[int]]:
    """By output, the probes on which one of the runs differs from the first."""
    found: dict[str, list[int]] = {}
    for index, probe in enumerate(subject.probes):
        first, *others = [session.run(probe) for _ in range(_RUNS)]
        for name, array in first.items():
            if any(other[name].tobytes() != array.tobytes() for other in others):
                found.setdefault(name, []).append(index)
    return found
